//! What comes back when all is well.

use serde_json::{Value, json};

use crate::client::Answer;
use crate::stand_in::{ALIAS, MODEL, completion, start};

/// The concatenated text of a stream's pieces, and its reason to end.
fn joined(answer: &Answer, index: usize) -> (String, Value) {
    let (mut text, mut finish) = (String::new(), Value::Null);
    for event in answer.events() {
        for choice in event["choices"].as_array().unwrap().iter().filter(|choice| choice["index"] == index) {
            assert!(finish.is_null(), "nothing follows the end: {event}");
            text += choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or("");
            finish = choice["finish_reason"].clone();
        }
    }
    (text, finish)
}

#[test]
fn a_completion_goes_on_to_its_length() {
    let server = start(|_| {});
    let answer = server.complete("x", json!({"max_tokens": 5, "user": "me", "stop": null}));
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
    let body = answer.json();
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-") && body["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!((&body["object"], &body["model"]), (&json!("text_completion"), &json!(MODEL)));
    assert_eq!(body["choices"], json!([{"index": 0, "text": "yzabc", "logprobs": null, "finish_reason": "length"}]));
    assert_eq!(body["usage"], json!({"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}));

    let body = server.post("/v1/completions", &json!({"model": ALIAS, "prompt": [97, 98]})).json();
    assert_eq!((&body["choices"][0]["text"], &body["model"]), (&json!("cdefghijklmnopqr"), &json!(MODEL)));
    assert_eq!(body["usage"]["completion_tokens"], 16);
}

#[test]
fn an_end_token_or_a_stop_string_ends_it() {
    let server = start(|_| {});
    let body = server.complete("~", json!({"max_tokens": 5})).json();
    assert_eq!(body["choices"][0], json!({"index": 0, "text": "", "logprobs": null, "finish_reason": "stop"}));

    for stop in [json!("efg"), json!(["zzz", "efg", "fgh"])] {
        for stream in [false, true] {
            let answer = server.complete("a", json!({"max_tokens": 50, "stop": stop, "stream": stream}));
            let (text, finish) = if stream {
                joined(&answer, 0)
            } else {
                let choice = &answer.json()["choices"][0];
                (choice["text"].as_str().unwrap().to_owned(), choice["finish_reason"].clone())
            };
            assert_eq!((text.as_str(), finish), ("bcd", json!("stop")));
        }
    }
    server.wait_until("what a stop string has ended leaves the engine", |status| status.running == 0);
}

#[test]
fn several_prompts_are_several_choices() {
    let server = start(|_| {});
    for prompt in [json!(["a", "m"]), json!([[97], [109]]), json!(["a", "m"])] {
        let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 3});
        let answer = server.post("/v1/completions", &body).json();
        let texts: Vec<&Value> = answer["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
        assert_eq!(texts, ["bcd", "nop"]);
        assert_eq!(answer["usage"], json!({"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}));
    }
    let body = json!({"model": MODEL, "prompt": ["a", "m"], "max_tokens": 3, "stream": true});
    let answer = server.post("/v1/completions", &body);
    assert_eq!(joined(&answer, 0), ("bcd".into(), json!("length")));
    assert_eq!(joined(&answer, 1), ("nop".into(), json!("length")));
}

#[test]
fn a_stream_comes_in_order_and_in_whole_characters() {
    let server = start(|_| {});
    let more = json!({"max_tokens": 12, "stream": true, "stream_options": {"include_usage": true}});
    let answer = server.complete("!", more);
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/event-stream")));
    let events = answer.events();
    let texts: Vec<&str> = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(texts, ["é", "漢", "🦀", "a", "b", "c", ""]);
    let (last, pieces) = events.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"], json!({"prompt_tokens": 1, "completion_tokens": 12, "total_tokens": 13}));
    assert!(pieces.iter().all(|piece| piece.get("usage") == Some(&Value::Null) && piece["id"] == last["id"]));

    let answer = server.complete("a", json!({"max_tokens": 2, "stream": true}));
    assert!(answer.events().iter().all(|event| event.get("usage").is_none()));
}

#[test]
fn a_character_that_stays_incomplete_is_shown_as_such() {
    let server = start(|_| {});
    let body = server.complete("!", json!({"max_tokens": 3})).json();
    assert_eq!(body["choices"][0]["text"], "é\u{fffd}");
}

#[test]
fn probabilities_of_a_completion_are_four_lists() {
    let server = start(|_| {});
    let expected = json!({
        "tokens": ["token_id:195", "é", "token_id:230"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"token_id:195": -0.5, "?": -1.5}, {"é": -0.5, "token_id:63": -1.5}, {}],
        "text_offset": [0, 0, 1],
    });
    let body = server.complete("!", json!({"max_tokens": 3, "logprobs": 2})).json();
    let found = &body["choices"][0]["logprobs"];
    for list in ["tokens", "token_logprobs", "text_offset"] {
        assert_eq!(found[list], expected[list], "{list}");
    }
    assert_eq!(found["top_logprobs"][0], expected["top_logprobs"][0]);

    let more = json!({"max_tokens": 3, "logprobs": 2, "stream": true});
    let mut tokens = Vec::new();
    for event in server.complete("!", more).events() {
        tokens.extend(event["choices"][0]["logprobs"]["tokens"].as_array().unwrap().clone());
    }
    assert_eq!(json!(tokens), expected["tokens"], "every token of a stream has its place in a piece");

    // The chosen token is always listed; a probability of 0 has no logarithm.
    let body = server.complete("a", json!({"max_tokens": 1, "logprobs": 0})).json();
    assert_eq!(body["choices"][0]["logprobs"]["top_logprobs"], json!([{"b": -0.5}]));
    let body = server.complete("a", json!({"max_tokens": 1, "logprobs": 3})).json();
    let tops = &body["choices"][0]["logprobs"]["top_logprobs"];
    assert_eq!(tops, &json!([{"b": -0.5, "?": -1.5, "token_id:195": -9999.0}]));
}

fn chat(more: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[test]
fn a_conversation_goes_through_its_template() {
    let server = start(|_| {});
    let body = server.post("/v1/chat/completions", &chat(json!({"max_completion_tokens": 3, "tools": []}))).json();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["object"], "chat.completion");
    let message = json!({"role": "assistant", "content": "abc", "refusal": null});
    let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "length"});
    assert_eq!(body["choices"], json!([choice]));
    let prompt_tokens = "<system>Be brief.<user>ab<assistant>".len();
    assert_eq!(body["usage"]["prompt_tokens"], prompt_tokens);

    // Without a limit, an answer ends where the model's positions do.
    let body = server.post("/v1/chat/completions", &chat(json!({}))).json();
    assert_eq!(body["usage"]["total_tokens"], crate::stand_in::POSITIONS);
}

#[test]
fn a_conversation_is_streamed_as_deltas() {
    let server = start(|_| {});
    let more = json!({"max_tokens": 2, "stream": true, "logprobs": true, "top_logprobs": 1});
    let events = server.post("/v1/chat/completions", &chat(more)).events();
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]).collect();
    let expected =
        [json!({"role": "assistant", "content": ""}), json!({"content": "a"}), json!({"content": "b"}), json!({})];
    assert_eq!(deltas, expected.iter().collect::<Vec<_>>());
    let finishes: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["finish_reason"]).collect();
    assert_eq!(finishes, [&Value::Null, &Value::Null, &Value::Null, &json!("length")]);
    let likely = json!({"token": "a", "logprob": -0.5, "bytes": [97]});
    let token = json!({"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [likely]});
    assert_eq!(events[1]["choices"][0]["logprobs"], json!({"content": [token], "refusal": null}));
}

#[test]
fn models_are_listed_by_their_names() {
    let server = start(|_| {});
    let list = server.get("/v1/models").json();
    assert_eq!(list["object"], "list");
    let ids: Vec<&Value> = list["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
    assert_eq!(ids, [MODEL, ALIAS]);
    for path in ["/v1/models/org/alphabet-2", "/v1/models/org%2Falphabet-2"] {
        let model = server.get(path).json();
        assert_eq!((&model["id"], &model["object"], &model["root"]), (&json!(ALIAS), &json!("model"), &json!(MODEL)));
    }
}

#[test]
fn many_requests_at_once_keep_their_own_text() {
    let server = start(|_| {});
    std::thread::scope(|scope| {
        for letter in b'a'..=b'z' {
            let server = &server;
            scope.spawn(move || {
                let prompt = char::from(letter).to_string();
                let expected: String = (1..100).map(|after| char::from(b'a' + (letter - b'a' + after) % 26)).collect();
                let answer =
                    server.post("/v1/completions", &completion(&prompt, json!({"max_tokens": 99, "stream": true})));
                assert_eq!(joined(&answer, 0), (expected, json!("length")));
            });
        }
    });
}
