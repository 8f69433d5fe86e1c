//! What a model folder says of generation: the tokens that end an answer, and how tokens are to be chosen.
//!
//! `generation_config.json` comes first, then `config.json`. Where both are silent, the values of Hugging Face
//! transformers' `generate` hold.

use std::path::Path;

use lina_data::Tokenizer;
use serde_json::{Map, Value};

use crate::{InferError, Sampling};

/// Value of `top_k` in transformers where a folder names none.
const DEFAULT_TOP_K: usize = 50;

/// Settings of a model folder; `None` where it says nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end an answer (`eos_token_id`).
    pub end_tokens: Vec<u32>,
    /// Whether tokens are drawn, rather than the likeliest taken.
    pub do_sample: Option<bool>,
    /// As in [`Sampling`].
    pub temperature: Option<f32>,
    /// As in [`Sampling`].
    pub top_p: Option<f32>,
    /// As in [`Sampling`].
    pub top_k: Option<usize>,
    /// As in [`Sampling`].
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads a folder's files, of which each may be missing.
    ///
    /// # Errors
    /// If a file cannot be read, is no JSON object, or a value is none of its kind.
    pub fn for_model_folder(folder: impl AsRef<Path>) -> Result<Self, InferError> {
        let folder = folder.as_ref();
        let own = Fields::read(folder, "generation_config.json")?;
        let mut end_tokens = own.tokens("eos_token_id")?;
        if end_tokens.is_empty() {
            end_tokens = Fields::read(folder, "config.json")?.tokens("eos_token_id")?;
        }
        let config = GenerationConfig {
            end_tokens,
            do_sample: own.value("do_sample", "true or false", Value::as_bool)?,
            temperature: own.number("temperature")?,
            top_p: own.number("top_p")?,
            top_k: own.value("top_k", "a number of tokens", |it| it.as_u64()?.try_into().ok())?,
            repetition_penalty: own.number("repetition_penalty")?,
        };
        config.sampling().check().map_err(|reason| own.error(&reason))?;
        Ok(config)
    }

    /// How tokens are chosen where a request does not say: as transformers' `generate` does.
    pub fn sampling(&self) -> Sampling {
        let likeliest = Sampling { repetition_penalty: self.repetition_penalty.unwrap_or(1.0), ..Sampling::default() };
        if self.do_sample == Some(true) { self.drawing() } else { likeliest }
    }

    /// How tokens are drawn by who wants them drawn, whatever [`GenerationConfig::do_sample`] says.
    pub fn drawing(&self) -> Sampling {
        Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_p: self.top_p.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(DEFAULT_TOP_K),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            ..Sampling::default()
        }
    }

    /// The tokens that end an answer; the tokenizer's end-of-text token where the folder names none.
    pub fn stop_tokens(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        if self.end_tokens.is_empty() { tokenizer.end_of_text().into_iter().collect() } else { self.end_tokens.clone() }
    }
}

/// Fields of one of a folder's JSON files; none if there is no file.
pub(crate) struct Fields {
    file: String,
    fields: Map<String, Value>,
}

impl Fields {
    pub(crate) fn read(folder: &Path, name: &str) -> Result<Self, InferError> {
        let path = folder.join(name);
        let mut this = Fields { file: path.display().to_string(), fields: Map::new() };
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(this),
            Err(error) => return Err(InferError::Input(format!("cannot read `{}`: {error}", this.file))),
        };
        this.fields = serde_json::from_slice(&text)
            .map_err(|error| this.error(&format_args!("{error}; expected a JSON object")))?;
        Ok(this)
    }

    /// An error in this file.
    pub(crate) fn error(&self, reason: &dyn std::fmt::Display) -> InferError {
        InferError::Input(format!("`{}`: {reason}", self.file))
    }

    /// A field that is there and not null.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    /// All fields.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.fields.iter()
    }

    fn value<T>(&self, key: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, InferError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.error(&format_args!("`{key}` is {value}, expected {expected}")))
    }

    fn number(&self, key: &str) -> Result<Option<f32>, InferError> {
        self.value(key, "a number", |it| it.as_f64().map(|number| number as f32))
    }

    /// A token id or a list of them.
    fn tokens(&self, key: &str) -> Result<Vec<u32>, InferError> {
        let token = |value: &Value| -> Option<u32> { value.as_u64()?.try_into().ok() };
        let tokens = self.value(key, "a token id or a list of them", |value| match value {
            Value::Array(values) => values.iter().map(token).collect(),
            value => Some(vec![token(value)?]),
        })?;
        Ok(tokens.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(generation: Option<&str>, config: Option<&str>) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("generation_config.json", generation), ("config.json", config)] {
            if let Some(text) = text {
                std::fs::write(folder.path().join(name), text).unwrap();
            }
        }
        folder
    }

    #[test]
    fn a_folder_says_how_tokens_are_chosen() {
        let read = |generation, config| GenerationConfig::for_model_folder(folder(generation, config).path()).unwrap();
        let silent = read(None, None);
        assert_eq!(silent, GenerationConfig::default());
        assert_eq!(silent.sampling(), Sampling::default());
        assert_eq!(silent.drawing(), Sampling { temperature: 1.0, top_k: 50, ..Sampling::default() });
        assert!(silent.stop_tokens(&Tokenizer::bytes()).is_empty());
        let ended = Tokenizer::bytes().with_end_of_text(Some(10)).unwrap();
        assert_eq!(silent.stop_tokens(&ended), [10]);

        let config = r#"{"eos_token_id": 2, "vocab_size": 7}"#;
        assert_eq!(read(Some(r#"{"eos_token_id": null}"#), Some(config)).stop_tokens(&ended), [2]);
        let full = r#"{"eos_token_id": [3, 4], "do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20,
            "repetition_penalty": 1.05, "pad_token_id": 0}"#;
        let found = read(Some(full), Some(config));
        assert_eq!(found.end_tokens, [3, 4]);
        let expected =
            Sampling { temperature: 0.6, top_p: 0.95, top_k: 20, repetition_penalty: 1.05, ..Sampling::default() };
        assert_eq!(found.sampling(), expected);
        // What is not drawn is penalised all the same.
        let likeliest = read(Some(r#"{"temperature": 0.6, "repetition_penalty": 1.2}"#), None).sampling();
        assert_eq!(likeliest, Sampling { repetition_penalty: 1.2, ..Sampling::default() });
    }

    #[test]
    fn errors_name_the_file_and_the_key() {
        for (text, expected) in [
            (r#"{"temperature": "hot"}"#, "`temperature` is \"hot\", expected a number"),
            (r#"{"top_k": -1}"#, "`top_k` is -1, expected a number of tokens"),
            (r#"{"eos_token_id": [1, "x"]}"#, "`eos_token_id` is [1,\"x\"], expected a token id or a list of them"),
            (r#"{"do_sample": true, "top_p": 7}"#, "top_p is 7, expected a number from 0 to 1"),
            ("[]", "invalid type: sequence, expected a map at line 1 column 0; expected a JSON object"),
        ] {
            let folder = folder(Some(text), None);
            let message = GenerationConfig::for_model_folder(folder.path()).unwrap_err().to_string();
            assert_eq!(message, format!("`{}`: {expected}", folder.path().join("generation_config.json").display()));
        }
    }
}
