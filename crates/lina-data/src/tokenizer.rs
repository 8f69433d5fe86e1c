//! Text to token ids and back: bytes, or a Hugging Face `tokenizer.json`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::DataError;

/// Number of token ids of the byte tokenizer.
const BYTE_VOCABULARY: usize = 256;

/// Names under which published tokenizers carry their end-of-text token, the more specific first.
const END_OF_TEXT_NAMES: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>"];

/// Turns text into token ids and ids into text. Cheap to clone; clones share the vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    kind: Kind,
    end_of_text: Option<u32>,
}

#[derive(Clone)]
enum Kind {
    Bytes,
    HuggingFace { file: PathBuf, inner: Arc<tokenizers::Tokenizer>, vocab_size: usize },
}

impl Tokenizer {
    /// The byte tokenizer: a token id is a byte of the text's UTF-8, the vocabulary has 256 ids, and there is no
    /// end-of-text token.
    pub fn bytes() -> Self {
        Self { kind: Kind::Bytes, end_of_text: None }
    }

    /// Loads a Hugging Face `tokenizer.json`. Truncation and padding that the file asks for are switched off, since
    /// both would change the training text. The end-of-text token is the added token with one of the usual names, if
    /// there is one.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the file is missing or is not a tokenizer.
    pub fn from_file(file: impl AsRef<Path>) -> Result<Self, DataError> {
        let file = file.as_ref().to_path_buf();
        let fail = |reason: String| DataError::Tokenizer { file: file.clone(), reason };
        let json = std::fs::read(&file).map_err(|error| fail(error.to_string()))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|error| fail(error.to_string()))?;
        inner.with_truncation(None).map_err(|error| fail(error.to_string()))?;
        inner.with_padding(None);
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        if vocab_size == 0 {
            return Err(fail("its vocabulary is empty".into()));
        }
        let end_of_text = END_OF_TEXT_NAMES.iter().find_map(|name| inner.token_to_id(name));
        Ok(Self { kind: Kind::HuggingFace { file, inner: Arc::new(inner), vocab_size }, end_of_text })
    }

    /// The tokenizer of a model folder: its `tokenizer.json`, or bytes if it has none.
    ///
    /// # Errors
    /// As [`Tokenizer::from_file`].
    pub fn for_model_folder(folder: impl AsRef<Path>) -> Result<Self, DataError> {
        let file = folder.as_ref().join("tokenizer.json");
        if file.exists() { Self::from_file(file) } else { Ok(Self::bytes()) }
    }

    /// The same tokenizer with another end-of-text token, or with none.
    ///
    /// # Errors
    /// [`DataError::Decode`] if the tokenizer has no such id.
    pub fn with_end_of_text(mut self, token: Option<u32>) -> Result<Self, DataError> {
        if let Some(token) = token {
            self.check(token)?;
        }
        self.end_of_text = token;
        Ok(self)
    }

    /// The token that ends a document, if there is one.
    pub fn end_of_text(&self) -> Option<u32> {
        self.end_of_text
    }

    /// One more than the largest token id: the smallest `vocab_size` that a model may have.
    pub fn vocab_size(&self) -> usize {
        match &self.kind {
            Kind::Bytes => BYTE_VOCABULARY,
            Kind::HuggingFace { vocab_size, .. } => *vocab_size,
        }
    }

    /// The file that the tokenizer came from; `None` for bytes. A checkpoint takes a copy along.
    pub fn file(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Bytes => None,
            Kind::HuggingFace { file, .. } => Some(file),
        }
    }

    /// Token ids of a piece of text, with nothing added at its ends.
    ///
    /// # Errors
    /// [`DataError::Encode`] if the vocabulary cannot express the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        self.encode_with(text, false)
    }

    /// Token ids of a prompt: like [`Tokenizer::encode`], and with the beginning-of-text tokens that the
    /// `tokenizer.json` asks for, as `transformers` does.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, DataError> {
        self.encode_with(text, true)
    }

    fn encode_with(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, DataError> {
        match &self.kind {
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Kind::HuggingFace { inner, .. } => {
                let encoding = inner.encode_fast(text, add_special_tokens).map_err(|error| DataError::Encode {
                    tokenizer: self.to_string(),
                    what: excerpt(text),
                    reason: error.to_string(),
                })?;
                Ok(encoding.get_ids().to_vec())
            }
        }
    }

    /// Text of token ids, special tokens left out. Bytes that form no character, as at a cut in the middle of one,
    /// become U+FFFD.
    ///
    /// # Errors
    /// [`DataError::Decode`] at an id that the tokenizer does not have.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        for &token in tokens {
            self.check(token)?;
        }
        match &self.kind {
            Kind::Bytes => {
                let bytes: Vec<u8> = tokens.iter().map(|&token| token as u8).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Kind::HuggingFace { inner, .. } => inner.decode(tokens, true).map_err(|error| DataError::Encode {
                tokenizer: self.to_string(),
                what: format!("{} token ids back into text", tokens.len()),
                reason: error.to_string(),
            }),
        }
    }

    fn check(&self, token: u32) -> Result<(), DataError> {
        let vocab_size = self.vocab_size();
        if (token as usize) < vocab_size {
            Ok(())
        } else {
            Err(DataError::Decode { tokenizer: self.to_string(), token, vocab_size })
        }
    }
}

impl fmt::Display for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Bytes => f.write_str("`bytes`"),
            Kind::HuggingFace { file, .. } => write!(f, "`{}`", file.display()),
        }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({self}, {} ids)", self.vocab_size())
    }
}

/// The first characters of a text, for a message.
fn excerpt(text: &str) -> String {
    const SHOWN_CHARS: usize = 40;
    let mut shown: String = text.chars().take(SHOWN_CHARS).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("the text {shown:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A word-level tokenizer whose file asks for truncation, padding and a beginning token.
    const WORDS: &str = r#"{
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
        "added_tokens": [
            {"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 5, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "the": 1, "quick": 2, "fox": 3, "[UNK]": 4}, "unk_token": "[UNK]"}
    }"#;

    fn words() -> (tempfile::TempDir, Tokenizer) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), WORDS).unwrap();
        let tokenizer = Tokenizer::for_model_folder(folder.path()).unwrap();
        (folder, tokenizer)
    }

    #[test]
    fn bytes_round_trip_any_text() {
        let tokenizer = Tokenizer::bytes();
        let text = "naïve — 漢字 🦀\n";
        let tokens = tokenizer.encode(text).unwrap();
        assert_eq!(tokens.len(), text.len());
        assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
        assert_eq!(tokenizer.vocab_size(), 256);
        assert_eq!(tokenizer.end_of_text(), None);
        assert_eq!(tokenizer.decode(&tokens[..3]).unwrap(), "na\u{fffd}");
    }

    #[test]
    fn bytes_refuse_ids_that_are_no_byte() {
        let message = Tokenizer::bytes().decode(&[65, 256]).unwrap_err().to_string();
        assert_eq!(message, "the tokenizer `bytes` cannot decode token id 256; it knows ids 0 to 255");
        assert!(Tokenizer::bytes().with_end_of_text(Some(256)).is_err());
    }

    #[test]
    fn a_file_is_used_without_its_truncation_and_padding() {
        let (_folder, tokenizer) = words();
        assert_eq!(tokenizer.encode("the quick fox the").unwrap(), [1, 2, 3, 1]);
        assert_eq!(tokenizer.encode_prompt("the fox").unwrap(), [0, 1, 3]);
        assert_eq!(tokenizer.decode(&[0, 1, 3, 5]).unwrap(), "the fox");
        assert_eq!(tokenizer.vocab_size(), 6);
        assert_eq!(tokenizer.end_of_text(), Some(5));
        assert_eq!(tokenizer.with_end_of_text(None).unwrap().end_of_text(), None);
    }

    #[test]
    fn a_byte_level_file_splits_words_as_gpt2_does() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokenizer.json");
        let json = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "vocab": {"a": 0, "b": 1, "Ġ": 2, "Ã": 3, "©": 4, "ab": 5, "Ġab": 6}, "merges": ["a b", "Ġ ab"]}}"#;
        std::fs::write(&file, json).unwrap();
        let tokenizer = Tokenizer::from_file(&file).unwrap();
        let tokens = tokenizer.encode("ab ab é").unwrap();
        assert_eq!(tokens, [5, 6, 2, 3, 4]);
        assert_eq!(tokenizer.decode(&tokens).unwrap(), "ab ab é");
    }

    #[test]
    fn a_folder_without_a_file_is_bytes() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Tokenizer::for_model_folder(folder.path()).unwrap().file(), None);
    }

    #[test]
    fn errors_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing.json");
        let message = Tokenizer::from_file(&missing).unwrap_err().to_string();
        assert!(message.contains("missing.json") && message.contains("No such file"), "{message}");

        let broken = folder.path().join("broken.json");
        std::fs::write(&broken, "{\"version\": 3}").unwrap();
        let message = Tokenizer::from_file(&broken).unwrap_err().to_string();
        assert!(
            message.contains("broken.json") && message.contains("expected a Hugging Face tokenizer.json"),
            "{message}"
        );

        let strict = folder.path().join("strict.json");
        std::fs::write(&strict, WORDS.replace(r#""[UNK]": 4"#, r#""end": 4"#)).unwrap();
        let message = Tokenizer::from_file(&strict).unwrap().encode("the zebra").unwrap_err().to_string();
        assert!(message.contains("strict.json") && message.contains("the zebra"), "{message}");
    }
}
