//! HTTP by hand: a client that can also do what no decent client does.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The sentence of an error, whose shape is checked.
    pub fn error(&self) -> String {
        let body = self.json();
        let error = body["error"].as_object().unwrap_or_else(|| panic!("{self:?}"));
        assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        assert!(error["type"].is_string() && (error["param"].is_null() || error["param"].is_string()), "{self:?}");
        let message = error["message"].as_str().unwrap_or_else(|| panic!("{self:?}"));
        assert!(!message.is_empty() && !message.contains('\n') && message.len() < 500, "one sentence: {message}");
        message.to_owned()
    }

    /// The JSON of a stream's events. The last event must be the end's.
    pub fn events(&self) -> Vec<Value> {
        let mut events: Vec<&str> = self.body.split("\n\n").collect();
        assert_eq!(events.pop(), Some(""), "{self:?}");
        assert_eq!(events.pop(), Some("data: [DONE]"), "{self:?}");
        events.iter().map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }
}

/// A connection that gives up waiting at some point.
pub fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

/// The bytes of a request.
pub fn encode(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

/// One request on a connection of its own.
pub fn request(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let mut stream = connect(port);
    stream.write_all(&encode(method, path, headers, body)).unwrap();
    read_answer(&mut BufReader::new(stream)).expect("an answer")
}

/// The next answer; `None` if the connection ends before one begins.
pub fn read_answer(stream: &mut impl BufRead) -> Option<Answer> {
    let line = read_line(stream)?;
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{line:?}"));
    let mut headers = Vec::new();
    loop {
        let line = read_line(stream).expect("the head's end");
        let Some((name, value)) = line.split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut answer = Answer { status, headers, body: String::new() };
    let mut body = Vec::new();
    if answer.header("transfer-encoding") == Some("chunked") {
        while let Some(chunk) = read_chunk(stream) {
            body.extend(chunk);
        }
    } else {
        let length = answer.header("content-length").map_or(0, |length| length.parse().unwrap());
        body.resize(length, 0);
        stream.read_exact(&mut body).unwrap();
    }
    answer.body = String::from_utf8(body).unwrap();
    Some(answer)
}

/// The next chunk of a body; `None` at its end.
pub fn read_chunk(stream: &mut impl BufRead) -> Option<Vec<u8>> {
    let length = usize::from_str_radix(&read_line(stream).expect("a chunk"), 16).unwrap();
    let mut chunk = vec![0; length + 2];
    stream.read_exact(&mut chunk).unwrap();
    chunk.truncate(length);
    (length > 0).then_some(chunk)
}

fn read_line(stream: &mut impl BufRead) -> Option<String> {
    let mut line = String::new();
    (stream.read_line(&mut line).unwrap() > 0).then(|| line.trim_end().to_owned())
}
