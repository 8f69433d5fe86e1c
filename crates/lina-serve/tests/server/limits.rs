//! Clients that ask for much, take long or go away, and a server that ends.

use std::io::{BufReader, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::{self, connect, encode, read_answer, read_chunk};
use crate::stand_in::{PATIENCE, completion, start};

const JSON: &[(&str, &str)] = &[("Content-Type", "application/json")];

/// The bytes of a request for a long stream.
fn long_stream() -> Vec<u8> {
    let body = completion("a", json!({"max_tokens": 4000, "stream": true})).to_string();
    encode("POST", "/v1/completions", JSON, body.as_bytes())
}

#[test]
fn a_client_that_goes_away_frees_its_place() {
    let server = start(|setting| setting.step_time = Duration::from_millis(2));
    for stream in [true, false] {
        let body = completion("a", json!({"max_tokens": 4000, "stream": stream})).to_string();
        let mut connection = connect(server.port);
        connection.write_all(&encode("POST", "/v1/completions", JSON, body.as_bytes())).unwrap();
        server.wait_until("it runs", |status| status.running == 1);
        let cancelled = server.engine.status().cancelled_requests;
        drop(connection);
        server.wait_until("it leaves", |status| status.running == 0 && status.kv_pages_used == 0);
        assert_eq!(server.engine.status().cancelled_requests, cancelled + 1, "stream: {stream}");
    }
}

#[test]
fn a_full_queue_turns_away() {
    let server = start(|setting| {
        setting.step_time = Duration::from_millis(2);
        (setting.engine.max_running, setting.engine.max_queue) = (1, 1);
    });
    let mut held = Vec::new();
    for in_flight in 1..=2 {
        let mut connection = connect(server.port);
        connection.write_all(&long_stream()).unwrap();
        held.push(connection);
        server.wait_until("it runs or waits", |status| status.running + status.queued == in_flight);
    }
    let answer = server.complete("a", json!({}));
    assert_eq!(answer.status, 429);
    assert!(answer.error().starts_with("2 requests are being served or wait"), "{answer:?}");
    assert_eq!(answer.json()["error"]["code"], "queue_full");
    let after: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&after), "{after}");

    drop(held);
    server.wait_until("both leave", |status| status.running + status.queued == 0);
    assert_eq!(server.complete("a", json!({})).status, 200);
}

#[test]
fn several_prompts_take_places_together_or_not_at_all() {
    let server = start(|setting| {
        setting.step_time = Duration::from_millis(2);
        (setting.engine.max_running, setting.engine.max_queue) = (1, 1);
    });
    let body = json!({"model": crate::stand_in::MODEL, "prompt": ["a", "a", "a"], "max_tokens": 4000});
    assert_eq!(server.post("/v1/completions", &body).status, 429);
    server.wait_until("those that were taken leave", |status| status.running + status.queued == 0);
}

#[test]
fn a_head_or_a_body_that_does_not_come() {
    let quick = Duration::from_millis(200);
    let server = start(|setting| {
        setting.options.timeouts.head = quick;
        setting.options.timeouts.body = quick;
    });
    for head in [&b""[..], b"POST /v1/completions HTTP/1.1\r\nContent-"] {
        let mut connection = connect(server.port);
        connection.write_all(head).unwrap();
        let begin = Instant::now();
        let mut rest = Vec::new();
        connection.read_to_end(&mut rest).unwrap();
        assert!(begin.elapsed() < PATIENCE, "the connection is closed");
    }
    let request = encode("POST", "/v1/completions", JSON, &[b' '; 100]);
    let mut connection = connect(server.port);
    connection.write_all(&request[..request.len() - 50]).unwrap();
    let answer = read_answer(&mut BufReader::new(connection)).unwrap();
    let sentence = "the body was not complete after 0.2 s, expected it by then";
    assert_eq!((answer.status, answer.error().as_str()), (408, sentence));
}

#[test]
fn a_client_that_does_not_read_is_dropped() {
    let server = start(|setting| setting.options.timeouts.write = Duration::from_millis(300));
    // Answers of a size that no buffer of the network takes, one after the other on the same connection.
    let request = encode("GET", "/", &[], b"");
    let mut connection = connect(server.port);
    connection.set_write_timeout(Some(PATIENCE)).unwrap();
    let begin = Instant::now();
    let error = loop {
        if let Err(error) = connection.write_all(&request) {
            break error;
        }
        assert!(begin.elapsed() < PATIENCE, "the server goes on writing");
    };
    assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn connections_beyond_the_limit_wait() {
    let server = start(|setting| setting.options.max_connections = 2);
    let held = [connect(server.port), connect(server.port)];
    // Connections are taken in order: both are by now, or will be before the third.
    let mut third = connect(server.port);
    third.write_all(&encode("GET", "/health", &[], b"")).unwrap();
    third.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let error = third.read(&mut [0]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    drop(held);
    third.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(read_answer(&mut BufReader::new(third)).unwrap().status, 200);
}

#[test]
fn a_server_that_ends_finishes_what_runs() {
    let server = start(|setting| setting.step_time = Duration::from_millis(2));
    let body = completion("a", json!({"max_tokens": 300, "stream": true})).to_string();
    let mut connection = BufReader::new(connect(server.port));
    connection.get_mut().write_all(&encode("POST", "/v1/completions", JSON, body.as_bytes())).unwrap();
    server.wait_until("it runs", |status| status.running == 1);
    server.shutdown.request();
    let begin = Instant::now();
    while server.get("/health").status == 200 {
        assert!(begin.elapsed() < PATIENCE);
    }
    let answer = server.complete("a", json!({}));
    assert_eq!(answer.status, 503);
    assert_eq!(answer.error(), "the server is shutting down and takes no new requests");
    assert_eq!(server.get("/health").json()["reason"], "the server is shutting down");
    assert!(!server.ended());

    let answer = read_answer(&mut connection).unwrap();
    let text: String = answer.events().iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(text.len(), 300, "the stream is complete");
    let summary = server.join().unwrap();
    assert_eq!((summary.finished_requests, summary.generated_tokens), (1, 300));
    assert!(summary.emulated);
}

#[test]
fn a_connection_serves_one_request_after_the_other() {
    let server = start(|_| {});
    let mut connection = BufReader::new(connect(server.port));
    for (method, path, status) in [("GET", "/health", 200), ("GET", "/nowhere", 404), ("POST", "/v1/completions", 400)]
    {
        connection.get_mut().write_all(&encode(method, path, JSON, b"{}")).unwrap();
        assert_eq!(read_answer(&mut connection).unwrap().status, status);
    }
    let body = completion("a", json!({"stream": true})).to_string();
    for _ in 0..3 {
        connection.get_mut().write_all(&encode("POST", "/v1/completions", JSON, body.as_bytes())).unwrap();
        assert_eq!(read_answer(&mut connection).unwrap().events().len(), 17, "16 tokens and the end");
    }
}

#[test]
fn a_stream_is_not_kept_until_its_end() {
    let server = start(|setting| setting.step_time = Duration::from_millis(5));
    let mut connection = BufReader::new(connect(server.port));
    connection.get_mut().write_all(&long_stream()).unwrap();
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        std::io::BufRead::read_line(&mut connection, &mut line).unwrap();
    }
    let first = String::from_utf8(read_chunk(&mut connection).unwrap()).unwrap();
    assert!(first.starts_with("data: ") && first.ends_with("\n\n"), "{first:?}");
    assert_eq!(server.engine.status().running, 1, "the answer is still being made");
}

#[test]
fn what_is_no_http_ends_its_connection_only() {
    let server = start(|_| {});
    for bytes in [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], b"GET\r\n\r\n", b"\r\n\r\n\r\nhello\r\n\r\n"] {
        let mut connection = connect(server.port);
        connection.write_all(bytes).unwrap();
        // The end of what is sent makes half a head a whole mistake.
        connection.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        let _ = connection.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{answer:?}");
    }
    assert_eq!(client::request(server.port, "GET", "/health", &[], b"").status, 200);
}
