//! Messages of a chat to the text that a model has been trained on.
//!
//! Model folders carry a Jinja template for this, in `chat_template.jinja` or in `tokenizer_config.json`. It is rendered
//! in the environment that Hugging Face transformers gives it: the same whitespace rules, Python's string methods, the
//! functions `raise_exception` and `strftime_now`, and the special tokens as variables. Templates are other people's
//! programs: they get no files, and end after a number of instructions.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};

use crate::InferError;
use crate::generation::Fields;

/// Instructions of the template engine after which a template is taken to be without end: about a second. A message of a
/// chat takes some tens of them.
const MAX_INSTRUCTIONS: u64 = 2_000_000;
/// The template's name in its environment.
const NAME: &str = "chat";

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks: mostly `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// The chat template of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Such as `bos_token`; by name.
    special_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The template of a model folder, if it has one: `chat_template.jinja`, else `chat_template` of
    /// `tokenizer_config.json`, of several named ones that named `default`.
    ///
    /// # Errors
    /// If a file cannot be read, holds something else, or the template does not parse.
    pub fn for_model_folder(folder: impl AsRef<Path>) -> Result<Option<Self>, InferError> {
        let folder = folder.as_ref();
        let config = Fields::read(folder, "tokenizer_config.json")?;
        let file = folder.join("chat_template.jinja");
        let source = if file.exists() {
            let read = std::fs::read_to_string(&file);
            Some(read.map_err(|error| InferError::Input(format!("cannot read `{}`: {error}", file.display())))?)
        } else {
            config.get("chat_template").map(|value| template_in(&config, value)).transpose()?
        };
        let Some(source) = source else { return Ok(None) };
        // Older folders have their special tokens in a file of their own.
        let mut special_tokens = special_tokens(&Fields::read(folder, "special_tokens_map.json")?);
        special_tokens.append(&mut self::special_tokens(&config));
        let template = Self::new(&source, special_tokens);
        template.map(Some).map_err(|reason| InferError::Input(format!("`{}`: {reason}", folder.display())))
    }

    /// A template with the special tokens that it may use, by names such as `bos_token`.
    ///
    /// # Errors
    /// If it does not parse.
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self, InferError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(InferError::input)?);
        environment.set_fuel(Some(MAX_INSTRUCTIONS));
        // Errors name what is undefined, in builds for use too.
        environment.set_debug(true);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_formatter(format_as_python);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned(NAME, without_generation_marks(source))
            .map_err(|error| InferError::Input(format!("the chat template does not parse: {}", sentence(&error))))?;
        Ok(ChatTemplate { environment, special_tokens })
    }

    /// The text of a chat; with `add_generation_prompt`, it ends where the model is to answer. Special tokens are in the
    /// text, so that it is to be encoded without adding any.
    ///
    /// # Errors
    /// If the template refuses the messages, for instance their order of roles, or fails.
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String, InferError> {
        let special_tokens = Value::from_pairs(self.special_tokens.clone());
        let message =
            |it: &ChatMessage| Value::from_pairs([("role", it.role.as_str()), ("content", it.content.as_str())]);
        let template = self.environment.get_template(NAME).map_err(InferError::input)?;
        let variables = context! {
            messages => messages.iter().map(message).collect::<Vec<_>>(), add_generation_prompt => add_generation_prompt,
            tools => Value::from(()), documents => Value::from(()), ..special_tokens
        };
        template.render(variables).map_err(|error| {
            InferError::Input(match refusal(&error) {
                Some(refusal) => format!("the model's chat template refuses the messages: {refusal}"),
                None => format!("the model's chat template fails: {}", sentence(&error)),
            })
        })
    }
}

/// The template in `tokenizer_config.json`: a string, or one of several with names.
fn template_in(config: &Fields, value: &serde_json::Value) -> Result<String, InferError> {
    let named = |it: &serde_json::Value| it["name"] == "default";
    let template = match value {
        serde_json::Value::Array(templates) => templates.iter().find(|it| named(it)).map(|it| &it["template"]),
        value => Some(value),
    };
    let expected = "expected a string, or a list in which one has the name \"default\" and a template";
    let template = template.and_then(serde_json::Value::as_str);
    template.map(str::to_owned).ok_or_else(|| config.error(&format_args!("`chat_template` is no template; {expected}")))
}

/// The special tokens that a file names: strings, or objects with the string in `content`.
fn special_tokens(fields: &Fields) -> BTreeMap<String, String> {
    let named = fields.iter().filter(|(name, _)| name.ends_with("_token"));
    let tokens = named.filter_map(|(name, value)| {
        let token = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some((name.clone(), token.to_owned()))
    });
    tokens.collect()
}

/// Replaces the marks around what the assistant says, `{% generation %}` and `{% endgeneration %}`, which only training
/// looks at, by a condition that always holds.
fn without_generation_marks(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(begin) = rest.find("{%") {
        let Some(length) = rest[begin..].find("%}") else { break };
        let (before, tag) = (&rest[..begin], &rest[begin + 2..begin + length]);
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let tag = match word {
            "generation" => tag.replace(word, "if true"),
            "endgeneration" => tag.replace(word, "endif"),
            _ => tag.to_owned(),
        };
        text.extend([before, "{%", &tag, "%}"]);
        rest = &rest[begin + length + 2..];
    }
    text + rest
}

/// What a template has refused by calling `raise_exception`.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Refusal(message)))
}

/// The words of `raise_exception`, if it led to this error.
fn refusal(error: &Error) -> Option<&str> {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(Refusal(message)) = error.downcast_ref() {
            return Some(message);
        }
        source = error.source();
    }
    None
}

/// An error of the template engine in one line, with its place.
fn sentence(error: &Error) -> String {
    let reason =
        error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    match error.line() {
        Some(line) => format!("{reason} in line {line}"),
        None => reason,
    }
}

/// The date or time now, as Python's `strftime` writes it.
fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now())
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}")))
}

/// Values where a template prints them: as Python does where that is another word.
fn format_as_python(output: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    let word = match value.kind() {
        ValueKind::None => Some("None"),
        ValueKind::Bool => Some(if value.is_true() { "True" } else { "False" }),
        _ => None,
    };
    match word {
        Some(word) => output.write_str(word).map_err(Error::from),
        None => minijinja::escape_formatter(output, state, value),
    }
}

/// JSON as Python's `json.dumps` writes it, which separates with spaces and escapes no HTML.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Characters are never escaped here, and keys keep their order; both are also what templates ask for.
    let _: (Option<bool>, Option<bool>) = (options.get("ensure_ascii")?, options.get("sort_keys")?);
    options.assert_all_used()?;
    let fail = |error: &dyn fmt::Display| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut json = Vec::new();
    match indent {
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, Spaced)),
    }
    .map_err(|error| fail(&error))?;
    String::from_utf8(json).map(Value::from_safe_string).map_err(|error| fail(&error))
}

/// One line of JSON, with a space after each comma and colon.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage { role: role.into(), content: content.into() }
    }

    fn render(source: &str) -> Result<String, String> {
        let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        let template = ChatTemplate::new(source, tokens).map_err(|error| error.to_string())?;
        template.render(&[message("user", "Is 1 < 2 & \"so\"?")], true).map_err(|error| error.to_string())
    }

    #[test]
    fn the_environment_is_the_one_that_templates_expect() {
        for (source, expected) in [
            ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Is 1 < 2 & \"so\"?"),
            ("{{ messages[0]['content'] | tojson }}", r#""Is 1 < 2 & \"so\"?""#),
            ("{{ {'a': [1, 2], 'b': none, 'é': true} | tojson }}", r#"{"a": [1, 2], "b": null, "é": true}"#),
            ("{{ [1, {}] | tojson(indent=2) }}", "[\n  1,\n  {}\n]"),
            (
                "{{ ' a b '.strip() }}|{{ 'a</think>b'.split('</think>')[-1] }}|{{ 'abc'.startswith('ab') }}",
                "a b|b|True",
            ),
            ("{{ tools }}{{ tools is none }}{{ missing is defined }}", "NoneTrueFalse"),
            ("  {% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb"),
            ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}.", "."),
            ("a {%- generation -%} b {%- endgeneration %} c", "ab c"),
            (
                "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
                "3",
            ),
            ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) ~ f(messages|length) }}", "[1][1]"),
        ] {
            assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
        }
        let year: i32 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
        assert!(year > 2000);
    }

    #[test]
    fn what_a_template_cannot_do_is_said() {
        for (source, expected) in [
            ("{{ raise_exception('Roles must alternate!') }}", "refuses the messages: Roles must alternate!"),
            ("{% macro f() %}{{ raise_exception('No') }}{% endmacro %}{{ f() }}", "refuses the messages: No"),
            (
                "a\n{{ messages[0].x.y }}",
                "chat template fails: undefined value: `messages[0].x` is undefined in line 2",
            ),
            ("{% for m in messages %}", "the chat template does not parse: syntax error: unexpected end of input"),
            ("{{ strftime_now('%!') }}", "strftime_now(\"%!\")"),
            ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "out of fuel"),
            ("{% include 'secret' %}", "fails"),
        ] {
            let message = render(source).unwrap_err();
            assert!(message.contains(expected) && !message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn a_folder_has_a_template_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let rendered = || {
            let template = ChatTemplate::for_model_folder(folder.path())?;
            template.map(|it| it.render(&[message("user", "hi")], false)).transpose()
        };
        assert_eq!(rendered().unwrap(), None);
        write("tokenizer_config.json", r#"{"eos_token": "</s>", "chat_template": null}"#);
        assert_eq!(rendered().unwrap(), None);
        write("special_tokens_map.json", r#"{"bos_token": "<s>", "eos_token": "old"}"#);
        write(
            "tokenizer_config.json",
            r#"{"eos_token": {"content": "</s>"}, "chat_template": "{{bos_token}}1{{eos_token}}"}"#,
        );
        assert_eq!(rendered().unwrap().unwrap(), "<s>1</s>");
        let named =
            r#"{"chat_template": [{"name": "tool_use", "template": "2"}, {"name": "default", "template": "3"}]}"#;
        write("tokenizer_config.json", named);
        assert_eq!(rendered().unwrap().unwrap(), "3");
        write("chat_template.jinja", "4{{ messages[0].content }}\n");
        assert_eq!(rendered().unwrap().unwrap(), "4hi");
        write("chat_template.jinja", "{% if %}");
        let message = rendered().unwrap_err().to_string();
        assert!(
            message.contains(&folder.path().display().to_string()) && message.contains("does not parse"),
            "{message}"
        );
        std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
        write("tokenizer_config.json", r#"{"chat_template": [{"name": "tool_use", "template": "2"}]}"#);
        let message = rendered().unwrap_err().to_string();
        assert!(message.contains("tokenizer_config.json`: `chat_template` is no template; expected"), "{message}");
    }
}
