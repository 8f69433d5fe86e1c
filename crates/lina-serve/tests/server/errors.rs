//! What comes back when something is wrong: the status, OpenAI's shape, and one sentence.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use crate::client;
use crate::stand_in::{MODEL, POSITIONS, start};

const JSON: (&str, &str) = ("Content-Type", "application/json");

#[test]
fn bodies_that_are_no_request() {
    let server = start(|_| {});
    for path in ["/v1/completions", "/v1/chat/completions"] {
        for (body, sentence) in [
            (&b""[..], "the body is empty, expected a JSON object"),
            (b" \n", "the body is empty, expected a JSON object"),
            (b"[1]", "the body is a list, expected an object"),
            (b"7", "the body is 7, expected an object"),
            (b"{\"a\": \xff}", "the body is no UTF-8 at byte 6 (0xff), expected JSON in UTF-8"),
            (b"{\"a\": \"\xe6\xbc", "the body is no UTF-8 at byte 7 (0xe6), expected JSON in UTF-8"),
            (b"{\"a\": ", "the body is no JSON (EOF while parsing a value at line 1 column 6), expected a JSON object"),
            (
                b"{\"a\": \"\\ud800\"}",
                "the body is no JSON (unexpected end of hex escape at line 1 column 14), expected a JSON object",
            ),
        ] {
            let answer = server.post_raw(path, body);
            assert_eq!((answer.status, answer.error().as_str()), (400, sentence), "{path}");
        }
        let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
        let answer = server.post_raw(path, &deep);
        assert_eq!(answer.status, 400);
        assert!(answer.error().contains("recursion limit exceeded"), "{answer:?}");
    }
}

#[test]
fn fields_that_are_wrong() {
    let server = start(|_| {});
    let text = |more: Value| {
        let mut body = json!({"model": MODEL, "prompt": "a"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ("/v1/completions", body)
    };
    let chat = |more: Value| {
        let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "a"}]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ("/v1/chat/completions", body)
    };
    let messages = |messages: Value| chat(json!({"messages": messages}));
    let too_long = vec![97; POSITIONS];
    let cases = [
        (text(json!({"model": null})), "model", "`model` is missing, expected \"alphabet\" or \"org/alphabet-2\""),
        (text(json!({"model": 3})), "model", "`model` is 3, expected a string"),
        (text(json!({"prompt": null})), "prompt", "`prompt` is missing, expected a string or a list of token ids"),
        (
            text(json!({"prompt": {}})),
            "prompt",
            "`prompt` is an object, expected a string, a list of token ids, or a list of either",
        ),
        (text(json!({"prompt": ""})), "prompt", "the prompt has no tokens, expected at least one"),
        (
            text(json!({"prompt": []})),
            "prompt",
            "`prompt` is an empty list, expected a string, a list of token ids, or a list of either",
        ),
        (text(json!({"prompt": ["a", 1]})), "prompt[1]", "`prompt[1]` is 1, expected a string"),
        (text(json!({"prompt": [1, "a"]})), "prompt[1]", "`prompt[1]` is the string \"a\", expected a token id"),
        (text(json!({"prompt": [[1], [-2]]})), "prompt[1][0]", "`prompt[1][0]` is -2, expected a token id"),
        (
            text(json!({"prompt": [[1], []]})),
            "prompt[1]",
            "`prompt[1]` is an empty list, expected a string or a list of token ids",
        ),
        (text(json!({"prompt": [97, 300]})), "prompt", "the prompt has token id 300, expected ids below 256"),
        (text(json!({"prompt": too_long})), "prompt", "the prompt has 4096 tokens, expected at most 4095"),
        (text(json!({"prompt": vec!["a"; 129]})), "prompt", "`prompt` has 129 prompts, expected at most 128"),
        (
            text(json!({"max_tokens": 4096})),
            "max_tokens",
            "the prompt has 1 tokens and `max_tokens` is 4096, expected at most 4096 together",
        ),
        (
            text(json!({"max_tokens": "5"})),
            "max_tokens",
            "`max_tokens` is the string \"5\", expected a whole number of at least 1",
        ),
        (text(json!({"logprobs": true})), "logprobs", "`logprobs` is true, expected a whole number from 0 to 20"),
        (text(json!({"stream": 1})), "stream", "`stream` is 1, expected true or false"),
        (text(json!({"echo": true})), "echo", "`echo` is true, which this server does not support"),
        (text(json!({"best_of": 2})), "best_of", "`best_of` is 2, which this server does not support"),
        (text(json!({"suffix": "b"})), "suffix", "`suffix` is the string \"b\", which this server does not support"),
        (text(json!({"messages": []})), "messages", "`messages` is not a field that this server knows"),
        (text(json!({"temprature": 1})), "temprature", "`temprature` is not a field that this server knows"),
        (chat(json!({"prompt": "a"})), "prompt", "`prompt` is not a field that this server knows"),
        (chat(json!({"tools": [{}]})), "tools", "`tools` is a list, which this server does not support"),
        (
            chat(json!({"response_format": {"type": "json_object"}})),
            "response_format",
            "`response_format` is an object, which this server does not support",
        ),
        (
            chat(json!({"top_logprobs": 2})),
            "top_logprobs",
            "`top_logprobs` is given, expected it only with `logprobs` being true",
        ),
        (
            chat(json!({"logprobs": true, "top_logprobs": 21})),
            "top_logprobs",
            "`top_logprobs` is 21, expected a whole number from 0 to 20",
        ),
        (messages(json!([])), "messages", "`messages` is an empty list, expected a list of messages"),
        (messages(json!(["a"])), "messages[0]", "`messages[0]` is the string \"a\", expected an object"),
        (
            messages(json!([{"content": "a"}])),
            "messages[0].role",
            "`messages[0].role` is missing, expected system, developer, user or assistant",
        ),
        (
            messages(json!([{"role": "tool", "content": "a"}])),
            "messages[0].role",
            "`messages[0].role` is the string \"tool\", expected system, developer, user or assistant",
        ),
        (
            messages(json!([{"role": "user", "content": 3}])),
            "messages[0].content",
            "`messages[0].content` is 3, expected a string",
        ),
        (
            messages(json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])),
            "messages[0].content[0].type",
            "`messages[0].content[0].type` is the string \"image_url\", expected \"text\", the only type that this \
             server supports",
        ),
        (
            messages(json!([{"role": "user", "content": "a", "mood": "good"}])),
            "messages[0].mood",
            "`messages[0].mood` is not a field that this server knows",
        ),
    ];
    for ((path, body), param, sentence) in cases {
        let answer = server.post(path, &body);
        assert_eq!((answer.status, answer.error().as_str()), (400, sentence));
        assert_eq!(answer.json()["error"]["param"], param);
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
    }
}

#[test]
fn paths_methods_and_models_that_do_not_exist() {
    let server = start(|_| {});
    let answer = server.get("/v2/completions");
    assert_eq!(answer.status, 404);
    assert!(answer.error().starts_with("the path \"/v2/completions\" does not exist, expected /v1/completions"));

    let answer = server.get("/v1/completions");
    assert_eq!((answer.status, answer.header("allow")), (405, Some("POST")));
    assert_eq!(answer.error(), "the method GET is not for /v1/completions, expected POST");
    let answer = server.post("/health", &json!({}));
    assert_eq!((answer.status, answer.error().as_str()), (405, "the method POST is not for /health, expected GET"));

    let sentence = "the model \"gpt-4\" is not served here, expected \"alphabet\" or \"org/alphabet-2\"";
    let unknown = server.post("/v1/completions", &json!({"model": "gpt-4", "prompt": "a"}));
    for answer in [unknown, server.get("/v1/models/gpt-4")] {
        assert_eq!((answer.status, answer.error().as_str()), (404, sentence));
        assert_eq!(answer.json()["error"]["code"], "model_not_found");
    }
}

#[test]
fn bodies_of_another_type_or_size() {
    let server = start(|setting| setting.options.max_body_bytes = 1000);
    for (headers, found) in [(vec![], "missing"), (vec![("Content-Type", "text/plain")], "\"text/plain\"")] {
        let answer = client::request(server.port, "POST", "/v1/completions", &headers, b"{}");
        let sentence = format!("the header Content-Type is {found}, expected \"application/json\"");
        assert_eq!((answer.status, answer.error()), (415, sentence));
    }
    let declared = [("Content-Type", "Application/JSON; charset=utf-8")];
    assert_eq!(client::request(server.port, "POST", "/v1/completions", &declared, b"{}").status, 400);

    for bytes in [1001, 10_000, 10_000_000] {
        let answer = server.post_raw("/v1/completions", &vec![b' '; bytes]);
        let sentence = "the body has more than 1000 bytes, expected at most that many";
        assert_eq!((answer.status, answer.error().as_str()), (413, sentence), "{bytes}");
    }
    assert_eq!(server.post_raw("/v1/completions", &[b' '; 1000]).status, 400);
}

#[test]
fn a_prompt_above_the_servers_own_limit() {
    let server = start(|setting| setting.options.max_prompt_tokens = Some(3));
    assert_eq!(server.complete("abc", json!({})).status, 200);
    let answer = server.complete("abcd", json!({}));
    assert_eq!((answer.status, answer.error().as_str()), (400, "the prompt has 4 tokens, expected at most 3"));
    assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
}

#[test]
fn a_key_is_asked_for() {
    let server = start(|setting| setting.options.api_key = Some("s3cret".into()));
    let get = |path: &str, key: Option<&str>| {
        let headers: Vec<(&str, &str)> = key.map(|key| ("Authorization", key)).into_iter().collect();
        client::request(server.port, "GET", path, &headers, b"")
    };
    assert_eq!(get("/v1/models", Some("Bearer s3cret")).status, 200);
    for (key, found) in [
        (None, "is missing"),
        (Some("s3cret"), "is missing"),
        (Some("Basic s3cret"), "is missing"),
        (Some("Bearer "), "is missing"),
        (Some("Bearer s3cre"), "is another one"),
        (Some("Bearer s3cret2"), "is another one"),
    ] {
        let answer = get("/v1/models", key);
        let sentence = format!("the API key {found}, expected the header `Authorization: Bearer KEY`");
        assert_eq!((answer.status, answer.error(), answer.header("www-authenticate")), (401, sentence, Some("Bearer")));
    }
    for body in [&b"not even JSON"[..], &[b' '; 5_000_000]] {
        let answer = client::request(server.port, "POST", "/v1/completions", &[JSON], body);
        assert_eq!(answer.status, 401, "nobody looks at the body without the key");
    }
    for open in ["/health", "/metrics", "/status", "/"] {
        assert_eq!(get(open, None).status, 200, "{open}");
    }
}

#[test]
fn a_conversation_without_a_template_or_against_it() {
    let server = start(|setting| setting.template = false);
    let body = |content: &str| json!({"model": MODEL, "messages": [{"role": "user", "content": content}]});
    let answer = server.post("/v1/chat/completions", &body("a"));
    let sentence = "the model \"alphabet\" has no chat template, so it cannot take `messages`, expected a request to \
                    /v1/completions";
    assert_eq!((answer.status, answer.error().as_str()), (400, sentence));

    let server = start(|_| {});
    let answer = server.post("/v1/chat/completions", &body("refuse me"));
    assert_eq!(answer.status, 400);
    assert!(answer.error().contains("refused"), "{answer:?}");
}

#[test]
fn an_engine_that_fails() {
    let server = start(|setting| setting.step_time = std::time::Duration::from_millis(5));
    let more = |stream: bool| json!({"max_tokens": 4000, "stream": stream});
    std::thread::scope(|scope| {
        let whole = scope.spawn(|| server.complete("a", more(false)));
        let streamed = scope.spawn(|| server.complete("a", more(true)));
        server.wait_until("both run", |status| status.running == 2);
        server.fails.store(true, Ordering::Relaxed);
        let sentence = "the engine has failed: rank 1 was lost";

        let answer = whole.join().unwrap();
        assert_eq!((answer.status, answer.error().as_str()), (500, sentence));
        assert_eq!(answer.json()["error"]["type"], "server_error");
        let events = streamed.join().unwrap().events();
        assert_eq!(events.last().unwrap()["error"]["message"], sentence, "the end of a stream says so");

        let answer = server.complete("a", json!({}));
        assert_eq!((answer.status, answer.error().as_str()), (500, sentence));
        let health = server.get("/health");
        assert_eq!((health.status, health.json()["reason"].as_str()), (503, Some(sentence)));
    });
    assert_eq!(server.join().unwrap_err().to_string(), "the engine has failed: rank 1 was lost");
}

#[test]
fn an_address_that_cannot_be_had() {
    use lina_serve::{Listener, ServeOptions};
    let server = start(|_| {});
    let sentence = |host: &str, port: u16| {
        let error = Listener::bind(&ServeOptions { host: host.into(), port, ..ServeOptions::default() }).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let port = server.port;
    assert_eq!(sentence("127.0.0.1", port), format!("port {port} of 127.0.0.1 is in use, expected one that is free"));
    assert_eq!(
        sentence("192.0.2.1", 0),
        "host \"192.0.2.1\" is no address of this machine, expected one that is, or 0.0.0.0 for all"
    );
    assert!(sentence("no such host", 0).starts_with("host \"no such host\" is not known ("));
}
