//! All documents as one run of token ids.

use std::ops::Range;

use crate::{DataError, Sources, Tokenizer};

/// The tokens of all documents, one after another, and where each document begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenStream {
    tokens: Vec<u32>,
    document_starts: Vec<usize>,
    largest_token: u32,
}

impl TokenStream {
    /// Reads and tokenizes all documents of `sources`. After each one comes the tokenizer's end-of-text token, if it
    /// has one.
    ///
    /// # Errors
    /// What [`Sources::documents`] and [`Tokenizer::encode`] report, the latter with the document's place, and
    /// [`DataError::Empty`] if there is not a single token.
    pub fn read(sources: &Sources, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let mut stream = Self::empty();
        for document in sources.documents() {
            let document = document?;
            stream.push(&document.text, tokenizer).map_err(|error| match error {
                DataError::Encode { tokenizer, reason, .. } => {
                    let file = document.file.display();
                    let what = match document.line {
                        Some(line) => format!("`{file}` line {line}"),
                        None => format!("`{file}`"),
                    };
                    DataError::Encode { tokenizer, what, reason }
                }
                other => other,
            })?;
        }
        if stream.tokens.is_empty() {
            let first = sources.files().first().cloned().unwrap_or_default();
            return Err(DataError::Empty { files: sources.files().len(), first });
        }
        Ok(stream)
    }

    /// Tokenizes one document that is already in memory.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn from_text(text: &str, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let mut stream = Self::empty();
        stream.push(text, tokenizer)?;
        Ok(stream)
    }

    fn empty() -> Self {
        Self { tokens: Vec::new(), document_starts: Vec::new(), largest_token: 0 }
    }

    fn push(&mut self, text: &str, tokenizer: &Tokenizer) -> Result<(), DataError> {
        let start = self.tokens.len();
        self.tokens.extend(tokenizer.encode(text)?);
        if self.tokens.len() == start {
            return Ok(());
        }
        self.tokens.extend(tokenizer.end_of_text());
        self.document_starts.push(start);
        let largest = self.tokens[start..].iter().copied().max().unwrap_or(0);
        self.largest_token = self.largest_token.max(largest);
        Ok(())
    }

    /// The token ids, documents in order.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of tokens, end-of-text tokens included.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token; never so for a stream that was [read](TokenStream::read).
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Positions at which a document begins, ascending.
    pub fn document_starts(&self) -> &[usize] {
        &self.document_starts
    }

    /// The document starts that lie in a range of positions.
    pub fn document_starts_in(&self, range: Range<usize>) -> &[usize] {
        let from = self.document_starts.partition_point(|&start| start < range.start);
        let to = self.document_starts.partition_point(|&start| start < range.end);
        &self.document_starts[from..to]
    }

    /// Makes sure that a model with `vocab_size` embeddings can read every token.
    ///
    /// # Errors
    /// [`DataError::OutsideVocabulary`] with the largest id.
    pub fn check_vocabulary(&self, vocab_size: usize, tokenizer: &Tokenizer) -> Result<(), DataError> {
        if !self.is_empty() && self.largest_token as usize >= vocab_size {
            let tokenizer = tokenizer.to_string();
            return Err(DataError::OutsideVocabulary { token: self.largest_token, tokenizer, vocab_size });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(folder: &tempfile::TempDir, files: &[(&str, &str)]) -> Sources {
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        Sources::from_globs(&[folder.path().join("*").to_str().unwrap()]).unwrap()
    }

    #[test]
    fn documents_follow_each_other_with_their_end() {
        let folder = tempfile::tempdir().unwrap();
        let sources = sources(&folder, &[("a.txt", "ab"), ("b.jsonl", "{\"text\": \"é\"}\n{\"text\": \"c\"}")]);
        let plain = TokenStream::read(&sources, &Tokenizer::bytes()).unwrap();
        assert_eq!(plain.tokens(), [97, 98, 195, 169, 99]);
        assert_eq!(plain.document_starts(), [0, 2, 4]);

        let ending = Tokenizer::bytes().with_end_of_text(Some(0)).unwrap();
        let ended = TokenStream::read(&sources, &ending).unwrap();
        assert_eq!(ended.tokens(), [97, 98, 0, 195, 169, 0, 99, 0]);
        assert_eq!(ended.document_starts_in(1..6), [3]);
        assert_eq!(ended.document_starts_in(3..7), [3, 6]);
    }

    #[test]
    fn nothing_to_read_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let sources = sources(&folder, &[("a.txt", ""), ("b.jsonl", "\n")]);
        let message = TokenStream::read(&sources, &Tokenizer::bytes()).unwrap_err().to_string();
        assert!(
            message.starts_with("the data is empty: 2 file(s) were read") && message.contains("a.txt"),
            "{message}"
        );
    }

    #[test]
    fn ids_must_fit_the_model() {
        let stream = TokenStream::from_text("az", &Tokenizer::bytes()).unwrap();
        assert!(stream.check_vocabulary(123, &Tokenizer::bytes()).is_ok());
        assert_eq!(
            stream.check_vocabulary(122, &Tokenizer::bytes()).unwrap_err().to_string(),
            "the data holds token id 122 (tokenizer `bytes`), and the model's vocab_size is 122; every id must be below it"
        );
    }

    #[test]
    fn text_that_cannot_be_encoded_is_placed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokenizer.json");
        std::fs::write(
            &file,
            r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
                "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
                "model": {"type": "WordLevel", "vocab": {"yes": 0}, "unk_token": "[UNK]"}}"#,
        )
        .unwrap();
        let tokenizer = Tokenizer::from_file(&file).unwrap();
        let texts = tempfile::tempdir().unwrap();
        let sources = sources(&texts, &[("a.jsonl", "{\"text\": \"yes yes\"}\n{\"text\": \"no\"}")]);
        let message = TokenStream::read(&sources, &tokenizer).unwrap_err().to_string();
        assert!(
            message.contains("tokenizer.json` cannot encode `") && message.contains("a.jsonl` line 2"),
            "{message}"
        );
    }
}
