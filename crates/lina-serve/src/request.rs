//! What both kinds of completions ask for in the same words.

use std::hash::{BuildHasher, Hasher, RandomState};

use lina_infer::Sampling;
use serde_json::Value;

use crate::error::ApiError;
use crate::fields::{Fields, mismatch, shorten, string};
use crate::options::RequestDefaults;
use crate::server::Server;

/// Most stop strings, as in OpenAI's interface.
const MOST_STOPS: usize = 4;
/// Longest stop string, in bytes.
const LONGEST_STOP_BYTES: usize = 1024;
/// Most likely tokens that can be reported, as in OpenAI's interface for conversations.
pub(crate) const MOST_TOP_LOGPROBS: i64 = 20;

/// How an answer is to be made and delivered.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Longest answer in tokens, if given.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) sampling: Sampling,
    /// Strings that end the answer and are no part of it.
    pub(crate) stops: Vec<String>,
    /// Whether the answer comes piece by piece.
    pub(crate) stream: bool,
    /// Whether the last piece of a stream says how many tokens there were.
    pub(crate) include_usage: bool,
}

impl Settings {
    /// Takes the settings out of a request's fields. `max_tokens` are the names of the field for the longest answer.
    pub(crate) fn take(fields: &mut Fields, max_tokens: &[&str], defaults: &RequestDefaults) -> Result<Self, ApiError> {
        let mut longest = None;
        for name in max_tokens {
            let given = fields.integer(name, 1..=i64::MAX)?;
            longest = longest.or(given.map(|given| usize::try_from(given).unwrap_or(usize::MAX)));
        }
        let mut sampling = defaults.sampling.clone();
        if let Some(given) = fields.number("temperature", "a number from 0 to 2", |it| (0.0..=2.0).contains(&it))? {
            sampling.temperature = given as f32;
        }
        let share = |it: f64| it > 0.0 && it <= 1.0;
        if let Some(given) = fields.number("top_p", "a number above 0, at most 1", share)? {
            // A number that is no 0 in 64 bits can be one in 32.
            sampling.top_p = (given as f32).max(f32::MIN_POSITIVE);
        }
        if let Some(given) = fields.integer("top_k", -1..=i64::MAX)? {
            // -1 is vLLM's way to say all.
            sampling.top_k = usize::try_from(given).unwrap_or(0);
        }
        let penalty = |it: f64| (0.01..=100.0).contains(&it);
        if let Some(given) = fields.number("repetition_penalty", "a number from 0.01 to 100", penalty)? {
            sampling.repetition_penalty = given as f32;
        }
        sampling.seed = match fields.integer("seed", i64::MIN..=i64::MAX)? {
            Some(seed) => seed as u64,
            None => random(),
        };
        let stops = fields.take("stop").map(|(path, value)| stops(&path, value)).transpose()?.unwrap_or_default();
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let include_usage = match fields.take("stream_options") {
            None => false,
            Some((path, value)) => {
                if !stream {
                    let message = format!("`{path}` is given, expected it only with `stream` being true");
                    return Err(ApiError::field(&path, message));
                }
                let mut options = Fields::of(&path, value)?;
                let include_usage = options.boolean("include_usage")?.unwrap_or(false);
                options.refuse_unless("include_obfuscation", |value| value == false)?;
                options.finish()?;
                include_usage
            }
        };
        // For OpenAI's records; nothing is kept here.
        for name in ["user", "safety_identifier", "prompt_cache_key"] {
            fields.string(name)?;
        }
        for name in ["frequency_penalty", "presence_penalty"] {
            fields.refuse_unless(name, is_zero)?;
        }
        fields.refuse_unless("n", |value| value.as_f64() == Some(1.0))?;
        fields.refuse_unless("logit_bias", is_empty)?;
        Ok(Settings { max_tokens: longest, sampling, stops, stream, include_usage })
    }
}

/// Refuses a model that this server does not have.
pub(crate) fn check_model(fields: &mut Fields, server: &Server) -> Result<(), ApiError> {
    let (path, value) = fields.require("model", &server.known_models())?;
    let name = string(&path, value)?;
    if server.model.names.contains(&name) {
        return Ok(());
    }
    let message = format!("the model {:?} is not served here, expected {}", shorten(&name), server.known_models());
    Err(ApiError::unknown_model(message))
}

fn stops(path: &str, value: Value) -> Result<Vec<String>, ApiError> {
    let check = |path: &str, value: Value| {
        let stop = string(path, value)?;
        let expected = || format!("a string of 1 to {LONGEST_STOP_BYTES} bytes");
        let fits = (1..=LONGEST_STOP_BYTES).contains(&stop.len());
        if fits { Ok(stop) } else { Err(mismatch(path, &Value::String(stop), &expected())) }
    };
    match value {
        Value::Array(items) if items.len() > MOST_STOPS => {
            let message = format!("`{path}` has {} strings, expected at most {MOST_STOPS}", items.len());
            Err(ApiError::field(path, message))
        }
        Value::Array(items) => {
            items.into_iter().enumerate().map(|(i, item)| check(&format!("{path}[{i}]"), item)).collect()
        }
        Value::String(_) => Ok(vec![check(path, value)?]),
        other => Err(mismatch(path, &other, "a string or a list of strings")),
    }
}

/// Whether a value says 0.
pub(crate) fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

/// Whether a value has nothing in it.
pub(crate) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// A number that nobody chose. The standard library seeds its hash maps with such numbers.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn settings(body: Value) -> Result<Settings, ApiError> {
        let mut fields = Fields::of("", body)?;
        let settings = Settings::take(&mut fields, &["max_tokens"], &RequestDefaults::default())?;
        fields.finish()?;
        Ok(settings)
    }

    fn message(body: Value) -> String {
        settings(body).unwrap_err().message
    }

    #[test]
    fn what_is_given_replaces_the_defaults() {
        let given = settings(json!({
            "max_tokens": 7, "temperature": 0, "top_p": 0.5, "top_k": -1, "repetition_penalty": 1.5, "seed": -1,
            "stop": ["a", "b"], "stream": true, "stream_options": {"include_usage": true}, "user": "me",
            "n": 1, "presence_penalty": 0, "logit_bias": {},
        }))
        .unwrap();
        let sampling = Sampling {
            temperature: 0.0,
            top_p: 0.5,
            top_k: 0,
            repetition_penalty: 1.5,
            seed: u64::MAX,
            top_logprobs: 0,
        };
        assert_eq!((given.max_tokens, given.sampling), (Some(7), sampling));
        assert_eq!((given.stops, given.stream, given.include_usage), (vec!["a".into(), "b".into()], true, true));

        let (one, other) = (settings(json!({})).unwrap(), settings(json!({"seed": null})).unwrap());
        assert_eq!((one.max_tokens, one.sampling.temperature), (None, 1.0));
        assert_ne!(one.sampling.seed, other.sampling.seed);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        assert_eq!(message(json!({"temperature": 2.5})), "`temperature` is 2.5, expected a number from 0 to 2");
        assert_eq!(message(json!({"top_p": 0})), "`top_p` is 0, expected a number above 0, at most 1");
        assert_eq!(message(json!({"max_tokens": 0})), "`max_tokens` is 0, expected a whole number of at least 1");
        assert_eq!(
            message(json!({"stop": ["a", ""]})),
            "`stop[1]` is the string \"\", expected a string of 1 to 1024 bytes"
        );
        assert_eq!(message(json!({"stop": ["a", "a", "a", "a", "a"]})), "`stop` has 5 strings, expected at most 4");
        assert_eq!(message(json!({"n": 2})), "`n` is 2, which this server does not support");
        assert_eq!(
            message(json!({"presence_penalty": 0.5})),
            "`presence_penalty` is 0.5, which this server does not support"
        );
        assert_eq!(
            message(json!({"stream_options": {}})),
            "`stream_options` is given, expected it only with `stream` being true"
        );
        assert_eq!(
            message(json!({"stream": true, "stream_options": {"usage": true}})),
            "`stream_options.usage` is not a field that this server knows"
        );
    }
}
