//! Which files the text comes from, and how each one falls into documents.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::DataError;

/// The key of a JSONL object that holds its text, unless configured otherwise.
pub(crate) const DEFAULT_TEXT_KEY: &str = "text";

/// A sorted list of text and JSONL files without duplicates.
///
/// A file whose name ends in `.jsonl` holds one JSON object a line, each a document; any other file is one document of
/// UTF-8 text.
#[derive(Clone, Debug)]
pub struct Sources {
    files: Vec<PathBuf>,
    text_key: String,
}

/// A piece of text that belongs together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The text, never empty.
    pub text: String,
    /// The file that it comes from.
    pub file: PathBuf,
    /// Its line in a JSONL file (the first is 1); `None` for a text file.
    pub line: Option<usize>,
}

impl Sources {
    /// Expands globs (`*`, `?`, `[…]`, and `**` for any depth of folders), relative to the current folder. The path of
    /// an existing file stands for itself, whatever characters it has. No folder is special: hidden ones match too.
    ///
    /// # Errors
    /// [`DataError::NoGlobs`], [`DataError::Glob`], [`DataError::NoMatch`] for a glob without a file, and
    /// [`DataError::Read`] for a folder that cannot be listed.
    pub fn from_globs<S: AsRef<str>>(globs: &[S]) -> Result<Self, DataError> {
        if globs.is_empty() {
            return Err(DataError::NoGlobs);
        }
        let mut files = Vec::new();
        for glob in globs {
            let found = expand(glob.as_ref())?;
            if found.is_empty() {
                return Err(DataError::NoMatch { glob: glob.as_ref().to_string() });
            }
            files.extend(found);
        }
        files.sort();
        let mut seen = HashSet::new();
        let mut unique = Vec::with_capacity(files.len());
        for file in files {
            if seen.insert(canonical(&file)?) {
                unique.push(file);
            }
        }
        Ok(Self { files: unique, text_key: DEFAULT_TEXT_KEY.into() })
    }

    /// The same files, with the text of a JSONL object under another key than `text`.
    pub fn with_text_key(mut self, key: impl Into<String>) -> Self {
        self.text_key = key.into();
        self
    }

    /// The files, in the order in which they are read.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Makes sure that no file is also in `other`: held-out text must not be trained on.
    ///
    /// # Errors
    /// [`DataError::InBothParts`] with the first such file.
    pub fn check_disjoint(&self, other: &Sources) -> Result<(), DataError> {
        let others = other.files.iter().map(|file| canonical(file)).collect::<Result<HashSet<_>, _>>()?;
        for file in &self.files {
            if others.contains(&canonical(file)?) {
                return Err(DataError::InBothParts { file: file.clone() });
            }
        }
        Ok(())
    }

    /// Reads all documents in order, one file in memory at a time. Documents without text are left out.
    ///
    /// # Errors
    /// The iterator yields [`DataError::Read`], [`DataError::NotUtf8`] and [`DataError::JsonLine`], and ends its file
    /// there.
    pub fn documents(&self) -> impl Iterator<Item = Result<Document, DataError>> + '_ {
        self.files.iter().flat_map(|file| match self.read_file(file) {
            Ok(documents) => documents.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        })
    }

    fn read_file(&self, file: &Path) -> Result<Vec<Document>, DataError> {
        let bytes = std::fs::read(file).map_err(|source| DataError::Read { file: file.to_path_buf(), source })?;
        let text = String::from_utf8(bytes).map_err(|error| DataError::NotUtf8 {
            file: file.to_path_buf(),
            offset_bytes: error.utf8_error().valid_up_to(),
        })?;
        let mut documents = if file.extension().is_some_and(|extension| extension == "jsonl") {
            self.json_lines(file, &text)?
        } else {
            vec![Document { text, file: file.to_path_buf(), line: None }]
        };
        documents.retain(|document| !document.text.is_empty());
        Ok(documents)
    }

    fn json_lines(&self, file: &Path, text: &str) -> Result<Vec<Document>, DataError> {
        let mut documents = Vec::new();
        for (index, json) in text.lines().enumerate().filter(|(_, json)| !json.trim().is_empty()) {
            let line = index + 1;
            let text = self.text_of(json).map_err(|found| DataError::JsonLine {
                file: file.to_path_buf(),
                line,
                found,
                key: self.text_key.clone(),
            })?;
            documents.push(Document { text, file: file.to_path_buf(), line: Some(line) });
        }
        Ok(documents)
    }

    /// The text of one JSON line, or what was found in its place.
    fn text_of(&self, json: &str) -> Result<String, String> {
        let value: serde_json::Value = serde_json::from_str(json).map_err(|error| {
            // serde_json counts lines within the string that it is given, which is always its first line here.
            let reason = error.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            format!("not JSON, {reason} at column {}", error.column())
        })?;
        let serde_json::Value::Object(mut object) = value else {
            return Err(format!("found {}", kind_of(&value)));
        };
        match object.remove(&self.text_key) {
            Some(serde_json::Value::String(text)) => Ok(text),
            Some(other) => Err(format!("its key `{}` holds {}", self.text_key, kind_of(&other))),
            None => {
                let keys: Vec<_> = object.keys().map(|key| format!("`{key}`")).collect();
                Err(format!("found an object with the keys [{}]", keys.join(", ")))
            }
        }
    }
}

fn expand(glob: &str) -> Result<Vec<PathBuf>, DataError> {
    if Path::new(glob).is_file() {
        return Ok(vec![PathBuf::from(glob)]);
    }
    let paths = glob::glob(glob).map_err(|error| DataError::Glob {
        glob: glob.to_string(),
        reason: format!("{} at position {}", error.msg, error.pos),
    })?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|error| DataError::Read { file: error.path().to_path_buf(), source: error.into() })?;
        if path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}

fn canonical(file: &Path) -> Result<PathBuf, DataError> {
    file.canonicalize().map_err(|source| DataError::Read { file: file.to_path_buf(), source })
}

fn kind_of(value: &serde_json::Value) -> &'static str {
    match value {
        serde_json::Value::Null => "null",
        serde_json::Value::Bool(_) => "a boolean",
        serde_json::Value::Number(_) => "a number",
        serde_json::Value::String(_) => "a string",
        serde_json::Value::Array(_) => "an array",
        serde_json::Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn with(files: &[(&str, &[u8])]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            for (name, content) in files {
                let path = folder.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, content).unwrap();
            }
            Self(folder)
        }

        fn glob(&self, pattern: &str) -> String {
            self.0.path().join(pattern).to_str().unwrap().to_string()
        }

        fn sources(&self, patterns: &[&str]) -> Result<Sources, DataError> {
            Sources::from_globs(&patterns.iter().map(|pattern| self.glob(pattern)).collect::<Vec<_>>())
        }

        fn names(&self, patterns: &[&str]) -> Vec<String> {
            let sources = self.sources(patterns).unwrap();
            let relative = |file: &PathBuf| file.strip_prefix(self.0.path()).unwrap().to_str().unwrap().to_string();
            sources.files().iter().map(relative).collect()
        }

        fn first_error(&self, patterns: &[&str]) -> String {
            self.sources(patterns).unwrap().documents().find_map(Result::err).unwrap().to_string()
        }
    }

    #[test]
    fn globs_give_sorted_files_once() {
        let folder = Folder::with(&[
            ("b.txt", b"b"),
            ("a.txt", b"a"),
            ("target/c.txt", b"c"),
            (".hidden/d.txt", b"d"),
            ("e[1].md", b"e"),
        ]);
        assert_eq!(folder.names(&["*.txt"]), ["a.txt", "b.txt"]);
        assert_eq!(folder.names(&["**/*.txt"]), [".hidden/d.txt", "a.txt", "b.txt", "target/c.txt"]);
        assert_eq!(folder.names(&["b.txt", "*.txt", "target/../b.txt"]), ["a.txt", "b.txt"]);
        assert_eq!(folder.names(&["e[1].md"]), ["e[1].md"]);
    }

    #[test]
    fn every_glob_must_match() {
        let folder = Folder::with(&[("a.txt", b"a"), ("sub/b.md", b"b")]);
        let message = folder.sources(&["*.txt", "*.jsonl"]).unwrap_err().to_string();
        assert!(message.contains("/*.jsonl` matches no file"), "{message}");
        assert!(folder.sources(&["su*"]).unwrap_err().to_string().contains("matches no file"), "a folder is no file");
        let message = folder.sources(&["***.txt"]).unwrap_err().to_string();
        assert!(message.contains("not a valid pattern") && message.contains("position"), "{message}");
        assert!(matches!(Sources::from_globs::<&str>(&[]), Err(DataError::NoGlobs)));
    }

    #[test]
    fn text_files_are_whole_documents_and_jsonl_files_one_a_line() {
        let folder = Folder::with(&[
            ("a.txt", "première\nligne".as_bytes()),
            (
                "b.jsonl",
                b"{\"text\": \"one\\ntwo\", \"id\": 1}\r\n\n{\"text\": \"\"}\n{\"id\": 4, \"text\": \"caf\\u00e9\"}",
            ),
            ("empty.txt", b""),
        ]);
        let documents: Vec<_> =
            folder.sources(&["*"]).unwrap().documents().map(|d| d.unwrap()).map(|d| (d.text, d.line)).collect();
        assert_eq!(
            documents,
            [("première\nligne".into(), None), ("one\ntwo".into(), Some(1)), ("café".into(), Some(4))]
        );
    }

    #[test]
    fn the_text_key_can_be_named() {
        let folder = Folder::with(&[("a.jsonl", b"{\"content\": \"x\"}\n{\"text\": \"y\"}")]);
        let sources = folder.sources(&["*"]).unwrap().with_text_key("content");
        let results: Vec<_> = sources.documents().collect();
        assert_eq!(results.len(), 1);
        let message = results[0].as_ref().unwrap_err().to_string();
        assert!(message.ends_with(
            "a.jsonl` line 2: found an object with the keys [`text`]; expected a JSON object whose key `content` is a string"
        ), "{message}");
    }

    #[test]
    fn bad_lines_are_named() {
        for (line, found) in [
            ("{\"text\": 3}", "its key `text` holds a number"),
            ("[1]", "found an array"),
            ("{\"text\": \"x", "not JSON, EOF while parsing a string at column 11"),
        ] {
            let folder = Folder::with(&[("a.jsonl", format!("{{\"text\": \"fine\"}}\n{line}\n").as_bytes())]);
            let message = folder.first_error(&["*"]);
            assert!(message.contains(&format!("a.jsonl` line 2: {found};")), "{message}");
        }
    }

    #[test]
    fn text_must_be_utf8() {
        let folder = Folder::with(&[("latin1.txt", b"caf\xe9 noir")]);
        let message = folder.first_error(&["*"]);
        assert!(
            message.ends_with("latin1.txt` is not UTF-8 text: the byte at offset 3 starts no valid character"),
            "{message}"
        );
    }

    #[test]
    fn parts_must_not_share_a_file() {
        let folder = Folder::with(&[("a.txt", b"a"), ("b.txt", b"b")]);
        let train = folder.sources(&["*.txt"]).unwrap();
        assert!(train.check_disjoint(&folder.sources(&["b.txt"]).unwrap()).unwrap_err().to_string().contains("b.txt"));
        assert!(folder.sources(&["a.txt"]).unwrap().check_disjoint(&folder.sources(&["b.txt"]).unwrap()).is_ok());
    }
}
