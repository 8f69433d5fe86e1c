//! The ways in which data can be unusable, each as one sentence that says where, what was found and what is expected.

use std::path::PathBuf;

/// Why text could not become batches.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A glob that does not parse.
    #[error("the data glob `{glob}` is not a valid pattern: {reason}")]
    Glob {
        /// The pattern as given.
        glob: String,
        /// What the parser found, with its position.
        reason: String,
    },
    /// A glob under which there is no file.
    #[error(
        "the data glob `{glob}` matches no file; each glob must match at least one (`dir/**/*.txt` looks into folders below `dir`)"
    )]
    NoMatch {
        /// The pattern as given.
        glob: String,
    },
    /// No glob was given.
    #[error("the list of data files is empty; at least one path or glob is expected")]
    NoGlobs,
    /// A file that could not be read.
    #[error("cannot read `{}`: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file that is not text.
    #[error("`{}` is not UTF-8 text: the byte at offset {offset_bytes} starts no valid character", file.display())]
    NotUtf8 {
        /// The file.
        file: PathBuf,
        /// Offset of the first invalid byte from the file's start.
        offset_bytes: usize,
    },
    /// A line of a JSONL file that is no document.
    #[error("`{}` line {line}: {found}; expected a JSON object whose key `{key}` is a string", file.display())]
    JsonLine {
        /// The file.
        file: PathBuf,
        /// Line number, the first is 1.
        line: usize,
        /// What the line holds instead.
        found: String,
        /// The key that should hold the text.
        key: String,
    },
    /// The files hold no text at all.
    #[error("the data is empty: {files} file(s) were read, the first `{}`, and none holds any text", first.display())]
    Empty {
        /// How many files were read.
        files: usize,
        /// The first of them.
        first: PathBuf,
    },
    /// A file that is both trained on and held out.
    #[error("`{}` is in both the training and the held-out files; each file must be in one of them", file.display())]
    InBothParts {
        /// The file.
        file: PathBuf,
    },
    /// A tokenizer file that does not load.
    #[error("cannot load the tokenizer `{}`: {reason}; expected a Hugging Face tokenizer.json", file.display())]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// What the `tokenizers` crate says.
        reason: String,
    },
    /// Text that a tokenizer refuses, for instance an unknown word without an unknown token.
    #[error("the tokenizer {tokenizer} cannot encode {what}: {reason}")]
    Encode {
        /// The tokenizer, as [`Tokenizer`](crate::Tokenizer) displays itself.
        tokenizer: String,
        /// Which text.
        what: String,
        /// What the `tokenizers` crate says.
        reason: String,
    },
    /// A token id that the tokenizer does not have.
    #[error("the tokenizer {tokenizer} cannot decode token id {token}; it knows ids 0 to {}", vocab_size.saturating_sub(1))]
    Decode {
        /// The tokenizer, as [`Tokenizer`](crate::Tokenizer) displays itself.
        tokenizer: String,
        /// The id.
        token: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// A tokenizer made for another model.
    #[error(
        "the data holds token id {token} (tokenizer {tokenizer}), and the model's vocab_size is {vocab_size}; every id must be below it"
    )]
    OutsideVocabulary {
        /// The largest id in the data.
        token: u32,
        /// The tokenizer, as [`Tokenizer`](crate::Tokenizer) displays itself.
        tokenizer: String,
        /// The model's vocabulary size.
        vocab_size: usize,
    },
    /// Data shorter than one window, or than the two windows that a held-out part needs.
    #[error(
        "the {part} data has {found_tokens} tokens; sequences of {sequence_tokens} tokens need at least {needed_tokens} ({reason})"
    )]
    TooShort {
        /// Which data: "training", "held-out" or "evaluation".
        part: &'static str,
        /// Tokens found.
        found_tokens: usize,
        /// Configured sequence length.
        sequence_tokens: usize,
        /// Tokens needed.
        needed_tokens: usize,
        /// Where the needed number comes from.
        reason: &'static str,
    },
    /// More windows than a dataset numbers.
    #[error(
        "the data has {windows} sequences; at most {} are supported, so use longer sequences or fewer files",
        u32::MAX
    )]
    TooManyWindows {
        /// Windows found.
        windows: usize,
    },
    /// A setting outside its range.
    #[error("`{key}` is {found}; expected {expected}")]
    Setting {
        /// The setting's name.
        key: &'static str,
        /// Its value.
        found: String,
        /// Its range.
        expected: &'static str,
    },
}
