//! A configuration file and its overrides as one tree of values, each of which remembers where it was written.
//!
//! Errors are found late, when a value turns out to have the wrong type or to contradict another one, and shall name
//! the line or the command line's option all the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::ConfigError;

/// Lists that may be given as one string on the command line.
const LISTS_OF_ONE: [&str; 2] = ["data.files", "data.eval_files"];

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Line of the configuration file, the first is 1.
    Line(usize),
    /// An option of the command line, as given.
    Argument(String),
}

/// A value and its origin.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) origin: Origin,
}

/// TOML's values.
#[derive(Clone, Debug)]
pub(super) enum Value {
    String(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Date(String),
    List(Vec<Node>),
    Table(Table),
}

pub(super) type Table = BTreeMap<String, Node>;

/// A configuration file under its overrides.
#[derive(Debug)]
pub(super) struct Document {
    file: PathBuf,
    pub(super) table: Table,
}

impl Document {
    pub(super) fn read(file: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(file).map_err(|source| ConfigError::Read { file: file.to_path_buf(), source })?;
        Self::parse(file, &text)
    }

    pub(super) fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let mut document = Document { file: file.to_path_buf(), table: Table::new() };
        let line_of = |offset_bytes: usize| {
            Origin::Line(1 + text.bytes().take(offset_bytes).filter(|byte| *byte == b'\n').count())
        };
        let parsed = DeTable::parse(text).map_err(|error| {
            let origin = error.span().map(|span| line_of(span.start));
            ConfigError::invalid(document.place(origin.as_ref()), one_line(error.message()))
        })?;
        document.table = read_table(parsed.get_ref(), &line_of)
            .map_err(|(origin, message)| ConfigError::invalid(document.place(Some(&origin)), message))?;
        Ok(document)
    }

    /// Sets or removes what `change` says.
    pub(super) fn apply(&mut self, change: &Override) {
        let Some((last, parents)) = change.key.split_last() else { return };
        let mut table = &mut self.table;
        for key in parents {
            let origin = change.origin.clone();
            let node = table
                .entry(key.clone())
                .or_insert_with(|| Node { value: Value::Table(Table::new()), origin: origin.clone() });
            if !matches!(node.value, Value::Table(_)) {
                *node = Node { value: Value::Table(Table::new()), origin };
            }
            let Value::Table(inner) = &mut node.value else { return };
            table = inner;
        }
        match &change.value {
            Some(value) => {
                table.insert(last.clone(), value.clone());
            }
            None => {
                table.remove(last);
            }
        }
    }

    /// Where the value under a dotted key was written; `None` if nobody wrote it.
    pub(super) fn origin(&self, key: &str) -> Option<&Origin> {
        let mut table = &self.table;
        let mut origin = None;
        for part in key.split('.') {
            let node = table.get(part)?;
            origin = Some(&node.origin);
            if let Value::Table(inner) = &node.value {
                table = inner;
            }
        }
        origin
    }

    /// An origin as errors name it.
    pub(super) fn place(&self, origin: Option<&Origin>) -> String {
        match origin {
            Some(Origin::Line(line)) => format!("{} line {line}", self.file.display()),
            Some(Origin::Argument(argument)) => argument.clone(),
            None => self.file.display().to_string(),
        }
    }
}

/// One change to a configuration from the command line.
#[derive(Clone, Debug)]
pub struct Override {
    origin: Origin,
    key: Vec<String>,
    value: Option<Node>,
}

impl Override {
    /// An assignment as `--set` takes it: a dotted key, `=`, and a TOML value or a bare string. `data` is short for
    /// `data.files`, whose single glob needs no brackets. Nothing after the `=` removes the key, so that it has its
    /// default.
    ///
    /// # Errors
    /// If there is no `=`, a part of the key is empty, or a value in quotes or brackets does not parse.
    pub fn set(assignment: &str) -> Result<Self, ConfigError> {
        let place = format!("--set {assignment}");
        let Some((key, value)) = assignment.split_once('=') else {
            return Err(ConfigError::invalid(place, "expected a key and a value, such as train.steps=10"));
        };
        Self::new(place, key.trim(), value.trim())
    }

    /// What an option of its own, such as `--ranks 4`, sets.
    ///
    /// # Errors
    /// If a value in quotes or brackets does not parse.
    pub fn option(option: &str, key: &str, value: &str) -> Result<Self, ConfigError> {
        Self::new(format!("{option} {value}"), key, value)
    }

    /// What an option with a list of words, such as `--policies fair,lina`, sets.
    pub fn words(option: &str, key: &str, words: &[String]) -> Self {
        let origin = Origin::Argument(format!("{option} {}", words.join(",")));
        let node = |value| Node { value, origin: origin.clone() };
        let list = words.iter().map(|word| node(Value::String(word.trim().to_owned()))).collect();
        let value = Some(node(Value::List(list)));
        Override { key: key.split('.').map(str::to_owned).collect(), value, origin }
    }

    fn new(place: String, key: &str, value: &str) -> Result<Self, ConfigError> {
        let key = if key == "data" { "data.files" } else { key };
        let parts: Vec<String> = key.split('.').map(|part| part.trim().to_owned()).collect();
        if parts.iter().any(String::is_empty) {
            let message = format!("`{key}` is not a key, expected names with dots between, such as train.steps");
            return Err(ConfigError::invalid(place, message));
        }
        let origin = Origin::Argument(place.clone());
        let value = if value.is_empty() {
            None
        } else {
            let mut node = read_argument(value, &origin).map_err(|message| ConfigError::invalid(place, message))?;
            if LISTS_OF_ONE.contains(&key) && matches!(node.value, Value::String(_)) {
                node = Node { value: Value::List(vec![node]), origin: origin.clone() };
            }
            Some(node)
        };
        Ok(Override { origin, key: parts, value })
    }
}

/// A TOML value, or else the text itself, since shells take quotes away.
fn read_argument(text: &str, origin: &Origin) -> Result<Node, String> {
    match DeValue::parse(text) {
        Ok(value) => read_value(&value, &|_| origin.clone()).map_err(|(_, message)| message),
        Err(error) => {
            let meant_as_toml = [('[', ']'), ('{', '}'), ('"', '"'), ('\'', '\'')]
                .into_iter()
                .any(|(first, last)| text.starts_with(first) && text.ends_with(last));
            if meant_as_toml {
                return Err(format!(
                    "`{text}` is not a TOML value ({}), expected one such as 10, true, text, [\"a\", \"b\"] or {{ key = 1 }}",
                    one_line(error.message())
                ));
            }
            Ok(Node { value: Value::String(text.to_owned()), origin: origin.clone() })
        }
    }
}

type ReadResult<T> = Result<T, (Origin, String)>;

fn read_table(table: &DeTable<'_>, line_of: &impl Fn(usize) -> Origin) -> ReadResult<Table> {
    table
        .iter()
        .map(|(key, value)| {
            let mut node = read_value(value, line_of)?;
            // A table's own span starts after its name.
            node.origin = line_of(key.span().start);
            Ok((key.get_ref().to_string(), node))
        })
        .collect()
}

fn read_value(value: &Spanned<DeValue<'_>>, line_of: &impl Fn(usize) -> Origin) -> ReadResult<Node> {
    let origin = line_of(value.span().start);
    let value = match value.get_ref() {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(integer) => match i64::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(number) => Value::Integer(number),
            Err(_) => return Err((origin, format!("{integer} is too large, expected at most {}", i64::MAX))),
        },
        DeValue::Float(float) => match float.as_str().parse() {
            Ok(number) => Value::Float(number),
            Err(_) => return Err((origin, format!("{float} is not a number that fits 64 bits"))),
        },
        DeValue::Boolean(boolean) => Value::Boolean(*boolean),
        DeValue::Datetime(date) => Value::Date(date.to_string()),
        DeValue::Array(items) => {
            Value::List(items.iter().map(|item| read_value(item, line_of)).collect::<Result<_, _>>()?)
        }
        DeValue::Table(table) => Value::Table(read_table(table, line_of)?),
    };
    Ok(Node { value, origin })
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}
