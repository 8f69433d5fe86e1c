//! Whatever is sent, the answer is well-formed, is no failure of the server, and the next client is served.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::client::Answer;
use crate::stand_in::{MODEL, Server, start};

static SERVER: LazyLock<Server> = LazyLock::new(|| start(|_| {}));

const PATHS: [&str; 2] = ["/v1/completions", "/v1/chat/completions"];

/// Fields that mean something, so that values get past the first check.
const FIELDS: &[&str] = &[
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "n",
    "stream",
    "stream_options",
    "stop",
    "seed",
    "logprobs",
    "top_logprobs",
    "user",
    "echo",
    "best_of",
    "logit_bias",
    "tools",
    "response_format",
    "role",
    "content",
    "type",
    "text",
    "include_usage",
    "other",
];

fn check(answer: &Answer) -> Result<(), TestCaseError> {
    if answer.status == 200 {
        if answer.header("content-type") == Some("text/event-stream") {
            prop_assert!(!answer.events().is_empty());
        } else {
            prop_assert!(answer.json()["usage"]["total_tokens"].as_u64() > Some(0), "{:?}", answer);
        }
    } else {
        prop_assert!((400..500).contains(&answer.status), "{:?}", answer);
        answer.error();
    }
    prop_assert_eq!(SERVER.get("/health").status, 200);
    Ok(())
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0..300_i64).prop_map(Value::from),
        "\\PC{0,20}".prop_map(Value::from),
        prop::sample::select(vec![MODEL, "user", "text", "assistant"]).prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        let name =
            prop_oneof![prop::sample::select(FIELDS).prop_map(str::to_owned), "\\PC{0,8}".prop_map(String::from)];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::hash_map(name, inner, 0..6)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// A request that would be answered.
fn valid(path: &str) -> Value {
    let messages =
        json!([{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]);
    let mut body = json!({
        "model": MODEL, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "repetition_penalty": 1.1,
        "n": 1, "stream": true, "stream_options": {"include_usage": true}, "stop": ["x", "y"], "seed": 3, "user": "me",
    });
    let more = if path.ends_with("chat/completions") {
        json!({"messages": messages, "logprobs": true, "top_logprobs": 2})
    } else {
        json!({"prompt": ["a", "b"], "logprobs": 2})
    };
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[test]
fn what_is_mutated_is_valid() {
    for path in PATHS {
        assert_eq!(SERVER.post(path, &valid(path)).status, 200, "{path}");
    }
}

/// Puts `value` at a place in `body` that `choices` leads to.
fn put(body: &mut Value, choices: &[usize], value: Value) {
    let Some((&choice, rest)) = choices.split_first() else { return *body = value };
    match body {
        Value::Object(fields) if !fields.is_empty() => {
            let at = choice % fields.len();
            if let Some(inner) = fields.values_mut().nth(at) {
                put(inner, rest, value);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            let at = choice % items.len();
            put(&mut items[at], rest, value);
        }
        other => *other = value,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(path in prop::sample::select(&PATHS[..]), bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        check(&SERVER.post_raw(path, &bytes))?;
    }

    #[test]
    fn any_value(path in prop::sample::select(&PATHS[..]), body in any_json()) {
        check(&SERVER.post(path, &body))?;
    }

    #[test]
    fn any_fields(
        path in prop::sample::select(&PATHS[..]),
        fields in prop::collection::hash_map(prop::sample::select(FIELDS), any_json(), 0..8),
    ) {
        let mut body = valid(path);
        body.as_object_mut().unwrap().extend(fields.into_iter().map(|(name, value)| (name.to_owned(), value)));
        check(&SERVER.post(path, &body))?;
    }

    #[test]
    fn a_value_at_any_place(
        path in prop::sample::select(&PATHS[..]),
        choices in prop::collection::vec(any::<usize>(), 1..4),
        value in any_json(),
    ) {
        let mut body = valid(path);
        put(&mut body, &choices, value);
        check(&SERVER.post(path, &body))?;
    }

    #[test]
    fn bytes_in_between(
        path in prop::sample::select(&PATHS[..]),
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<usize>()),
    ) {
        let mut bytes = valid(path).to_string().into_bytes();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut % bytes.len());
        }
        check(&SERVER.post_raw(path, &bytes))?;
    }

    #[test]
    fn any_path(path in "/[!-~]{0,40}") {
        let answer = SERVER.get(&path);
        prop_assert!((200..500).contains(&answer.status), "{:?}", answer);
    }
}
