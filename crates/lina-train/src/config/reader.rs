//! From a tree of values to typed sections, with errors that say where, what was found and what is expected.
//!
//! A `serde` deserializer of its own, because `serde` tells an error type what went wrong as data (the unknown field
//! and its siblings, the value and the expected type), and the usual error types keep only a string of it. Sections
//! need nothing but `derive(Deserialize)`, whichever crate they are in.

use std::collections::btree_map;
use std::fmt;

use serde::de::value::StringDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, Error as _, Expected, IntoDeserializer, MapAccess,
    SeqAccess, Unexpected, Visitor,
};
use serde::forward_to_deserialize_any;

use super::document::{Node, Origin, Table, Value};

/// Reads all sections at once.
pub(super) fn read<T: DeserializeOwned>(table: Table) -> Result<T, ReadError> {
    // The top level is written nowhere; its origin is never asked for.
    T::deserialize(Node { value: Value::Table(table), origin: Origin::Line(1) })
}

/// Why a section could not be read.
#[derive(Debug)]
pub(super) struct ReadError {
    fault: Fault,
    /// Keys from the inside out, list items as `[index]`.
    path: Vec<String>,
    /// Where the value at fault was written, if anywhere.
    pub(super) origin: Option<Origin>,
}

#[derive(Debug)]
enum Fault {
    UnknownKey { key: String, known: &'static [&'static str] },
    MissingKey(&'static str),
    Unexpected { found: String, expected: String },
    Other(String),
}

impl ReadError {
    fn new(fault: Fault) -> Self {
        ReadError { fault, path: Vec::new(), origin: None }
    }

    /// The same error, seen from around the value named `key`.
    fn within(mut self, key: String, origin: &Origin) -> Self {
        self.path.push(key);
        self.at(origin)
    }

    fn at(mut self, origin: &Origin) -> Self {
        self.origin.get_or_insert_with(|| origin.clone());
        self
    }

    /// The dotted path of the value at fault, and `key` below it if given.
    fn dotted(&self, key: Option<&str>) -> String {
        let mut dotted = String::new();
        for part in self.path.iter().rev().map(String::as_str).chain(key) {
            if !dotted.is_empty() && !part.starts_with('[') {
                dotted.push('.');
            }
            dotted.push_str(part);
        }
        dotted
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.fault {
            Fault::UnknownKey { key, known } => {
                write!(f, "unknown key `{}`, ", self.dotted(Some(key)))?;
                match nearest(key, known) {
                    Some(name) => write!(f, "did you mean `{name}`?"),
                    None => write!(f, "expected {}", one_of(known)),
                }
            }
            Fault::MissingKey(key) => write!(f, "`{}` has no `{key}`, which it needs", self.dotted(None)),
            Fault::Unexpected { found, expected } => {
                write!(f, "`{}` is {found}, expected {expected}", self.dotted(None))
            }
            Fault::Other(message) => write!(f, "`{}`: {message}", self.dotted(None)),
        }
    }
}

impl std::error::Error for ReadError {}

impl de::Error for ReadError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        ReadError::new(Fault::Other(message.to_string()))
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        ReadError::new(Fault::Unexpected { found: describe(found), expected: in_words(&expected.to_string()) })
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn unknown_variant(variant: &str, known: &'static [&'static str]) -> Self {
        ReadError::new(Fault::Unexpected { found: format!("{variant:?}"), expected: one_of(known) })
    }

    fn unknown_field(field: &str, known: &'static [&'static str]) -> Self {
        ReadError::new(Fault::UnknownKey { key: field.to_owned(), known })
    }

    fn missing_field(field: &'static str) -> Self {
        ReadError::new(Fault::MissingKey(field))
    }
}

/// The known key that `key` was probably meant to be.
fn nearest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    const ALIKE: f64 = 0.85;
    known
        .iter()
        .map(|name| (strsim::jaro_winkler(key, name), *name))
        .filter(|(likeness, _)| *likeness > ALIKE)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

fn one_of(names: &[&str]) -> String {
    match names {
        [name] => format!("`{name}`"),
        names => format!("one of {}", names.join(", ")),
    }
}

fn describe(found: Unexpected<'_>) -> String {
    match found {
        Unexpected::Bool(value) => value.to_string(),
        Unexpected::Signed(value) => value.to_string(),
        Unexpected::Unsigned(value) => value.to_string(),
        Unexpected::Float(value) => value.to_string(),
        Unexpected::Str(text) => format!("{text:?}"),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a table".to_owned(),
        other => other.to_string(),
    }
}

/// `serde`'s name of a type as a user says it.
fn in_words(expected: &str) -> String {
    match expected {
        "usize" | "u64" | "u32" => "a whole number of at least 0",
        "f64" | "f32" => "a number",
        "a boolean" => "true or false",
        "a string" | "path string" => "a string",
        "a sequence" => "a list",
        structure if structure.starts_with("struct ") => "a table",
        other => other,
    }
    .to_owned()
}

impl Node {
    fn unexpected(&self) -> Unexpected<'_> {
        match &self.value {
            Value::String(text) => Unexpected::Str(text),
            Value::Integer(value) => Unexpected::Signed(*value),
            Value::Float(value) => Unexpected::Float(*value),
            Value::Boolean(value) => Unexpected::Bool(*value),
            Value::Date(text) => Unexpected::Other(text),
            Value::List(_) => Unexpected::Seq,
            Value::Table(_) => Unexpected::Map,
        }
    }
}

impl<'de> Deserializer<'de> for Node {
    type Error = ReadError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.value {
            Value::String(text) => visitor.visit_string(text),
            Value::Integer(value) => visitor.visit_i64(value),
            Value::Float(value) => visitor.visit_f64(value),
            Value::Boolean(value) => visitor.visit_bool(value),
            Value::Date(_) => Err(ReadError::invalid_type(self.unexpected(), &visitor)),
            Value::List(items) => visitor.visit_seq(Items { items: items.into_iter().enumerate() }),
            Value::Table(table) => visitor.visit_map(Entries { entries: table.into_iter(), value: None }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        visitor.visit_newtype_struct(self)
    }

    // Derived visitors would take a list of the fields' values, too.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        match self.value {
            Value::Table(_) => self.deserialize_any(visitor),
            _ => Err(ReadError::invalid_type(self.unexpected(), &visitor)),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        match self.value {
            Value::String(name) => visitor.visit_enum(IntoDeserializer::<ReadError>::into_deserializer(name)),
            _ => Err(ReadError::new(Fault::Unexpected {
                found: describe(self.unexpected()),
                expected: one_of(variants),
            })),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

struct Items {
    items: std::iter::Enumerate<std::vec::IntoIter<Node>>,
}

impl<'de> SeqAccess<'de> for Items {
    type Error = ReadError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, ReadError> {
        let Some((index, node)) = self.items.next() else { return Ok(None) };
        let origin = node.origin.clone();
        seed.deserialize(node).map(Some).map_err(|error| error.within(format!("[{index}]"), &origin))
    }
}

struct Entries {
    entries: btree_map::IntoIter<String, Node>,
    value: Option<(String, Node)>,
}

impl<'de> MapAccess<'de> for Entries {
    type Error = ReadError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, ReadError> {
        let Some((key, node)) = self.entries.next() else { return Ok(None) };
        let name: StringDeserializer<ReadError> = key.clone().into_deserializer();
        let field = seed.deserialize(name).map_err(|error| error.at(&node.origin))?;
        self.value = Some((key, node));
        Ok(Some(field))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, ReadError> {
        let (key, node) = self.value.take().ok_or_else(|| ReadError::custom("a value was asked for before its key"))?;
        let origin = node.origin.clone();
        seed.deserialize(node).map_err(|error| error.within(key, &origin))
    }
}
