//! Reads a request's JSON object strictly: every field is either asked for, or refused by name. An error says where the
//! value is (`messages[2].content`), what was found and what is expected.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

/// Longest part of a value that an error repeats, in characters.
const SHOWN_CHARS: usize = 60;

/// The fields of an object that have not been asked for yet.
pub(crate) struct Fields {
    /// Path of the object; empty for the body.
    path: String,
    rest: Map<String, Value>,
}

impl Fields {
    /// The object at `path`.
    pub(crate) fn of(path: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(rest) => Ok(Fields { path: path.to_owned(), rest }),
            other => Err(mismatch(path, &other, "an object")),
        }
    }

    /// Path of one of its fields.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The field's value, with its path; a field that is null is not there.
    pub(crate) fn take(&mut self, name: &str) -> Option<(String, Value)> {
        let value = self.rest.shift_remove(name).filter(|value| !value.is_null())?;
        Some((self.path(name), value))
    }

    /// As [`Fields::take`], of a field that must be there.
    pub(crate) fn require(&mut self, name: &str, expected: &str) -> Result<(String, Value), ApiError> {
        self.take(name).ok_or_else(|| {
            let path = self.path(name);
            ApiError::field(&path, format!("`{path}` is missing, expected {expected}"))
        })
    }

    /// A string, if it is there.
    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.take(name).map(|(path, value)| string(&path, value)).transpose()
    }

    /// `true` or `false`, if it is there.
    pub(crate) fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        let read =
            |(path, value): (String, Value)| value.as_bool().ok_or_else(|| mismatch(&path, &value, "true or false"));
        self.take(name).map(read).transpose()
    }

    /// A whole number in `range`, if it is there.
    pub(crate) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let read = |(path, value): (String, Value)| {
            let expected = || match (*range.start(), *range.end()) {
                (i64::MIN, i64::MAX) => "a whole number of 64 bits".to_owned(),
                (start, i64::MAX) => format!("a whole number of at least {start}"),
                (start, end) => format!("a whole number from {start} to {end}"),
            };
            let number = value.as_i64().filter(|number| range.contains(number));
            number.ok_or_else(|| mismatch(&path, &value, &expected()))
        };
        self.take(name).map(read).transpose()
    }

    /// A number for which `fits` holds, if it is there; `expected` says in words for which it does.
    pub(crate) fn number(
        &mut self,
        name: &str,
        expected: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ApiError> {
        let read = |(path, value): (String, Value)| {
            value.as_f64().filter(|&number| fits(number)).ok_or_else(|| mismatch(&path, &value, expected))
        };
        self.take(name).map(read).transpose()
    }

    /// Refuses a field of OpenAI's that this server does not carry out, unless its value changes nothing anyway.
    pub(crate) fn refuse_unless(&mut self, name: &str, neutral: impl Fn(&Value) -> bool) -> Result<(), ApiError> {
        match self.take(name) {
            Some((path, value)) if !neutral(&value) => {
                let message = format!("`{path}` is {}, which this server does not support", excerpt(&value));
                Err(ApiError::field(&path, message))
            }
            _ => Ok(()),
        }
    }

    /// Ends the object: whatever has not been asked for is unknown.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.rest.keys().next() {
            None => Ok(()),
            Some(name) => {
                let path = self.path(&shorten(name));
                Err(ApiError::field(&path, format!("`{path}` is not a field that this server knows")))
            }
        }
    }
}

/// The string at `path`.
pub(crate) fn string(path: &str, value: Value) -> Result<String, ApiError> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(mismatch(path, &other, "a string")),
    }
}

/// `value` at `path` is not what is expected.
pub(crate) fn mismatch(path: &str, value: &Value, expected: &str) -> ApiError {
    let place = if path.is_empty() { "the body".to_owned() } else { format!("`{path}`") };
    ApiError::field(path, format!("{place} is {}, expected {expected}", excerpt(value)))
}

/// A value in a few words.
fn excerpt(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) | Value::Number(_) => shorten(&value.to_string()),
        Value::String(text) => format!("the string {:?}", shorten(text)),
        Value::Array(items) if items.is_empty() => "an empty list".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}

/// The beginning of a text.
pub(crate) fn shorten(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
        result.unwrap_err().message
    }

    #[test]
    fn errors_say_where_what_and_what_instead() {
        let mut fields = Fields::of(
            "messages[2]",
            json!({"content": 3, "on": "yes", "n": 2.5, "t": -1, "big": u64::MAX, "echo": true, "extra": [], "nil": null}),
        )
        .unwrap();
        assert_eq!(message(fields.string("content")), "`messages[2].content` is 3, expected a string");
        assert_eq!(message(fields.boolean("on")), "`messages[2].on` is the string \"yes\", expected true or false");
        assert_eq!(message(fields.integer("n", 1..=4)), "`messages[2].n` is 2.5, expected a whole number from 1 to 4");
        assert_eq!(
            message(fields.integer("big", i64::MIN..=i64::MAX)),
            "`messages[2].big` is 18446744073709551615, expected a whole number of 64 bits"
        );
        assert_eq!(
            message(fields.number("t", "a number of at least 0", |t| t >= 0.0)),
            "`messages[2].t` is -1, expected a number of at least 0"
        );
        assert_eq!(
            message(fields.refuse_unless("echo", |value| value == false)),
            "`messages[2].echo` is true, which this server does not support"
        );
        assert_eq!(message(fields.require("nil", "a role")), "`messages[2].nil` is missing, expected a role");
        assert_eq!(message(fields.finish()), "`messages[2].extra` is not a field that this server knows");
        assert_eq!(message(Fields::of("", json!([])).map(|_| ())), "the body is an empty list, expected an object");
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        let shown = shorten(&"é".repeat(1000));
        assert_eq!(shown.chars().count(), SHOWN_CHARS + 1);
        assert_eq!(shorten("short"), "short");
    }
}
