//! A run that takes a second, and what every command promises to scripts.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

/// Trains within a second.
pub(crate) const RUN: &str = r#"
[model]
kind = "mixtral"
hidden = 16
layers = 2
heads = 2
experts = 4
expert_hidden = 16

[data]
files = ["text.txt"]

[train]
steps = 3
sequence_tokens = 16
batch_sequences = 4
warmup_steps = 1
eval_sequences = 2

[cluster]
ranks = 2
link = { gbps = 1, latency_us = 5, launch_us = 2 }
device = { gflops = 10 }
"#;

/// A folder with the configuration `run.toml` and its data.
pub(crate) fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("run.toml"), RUN).unwrap();
    let text: String = (0..400).map(|line| format!("line {line} of a text that is long enough\n")).collect();
    fs::write(folder.path().join("text.txt"), text).unwrap();
    folder
}

pub(crate) fn lina(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lina")).args(arguments).current_dir(folder).output().unwrap()
}

/// Runs `lina` in a fresh folder with arguments that it refuses.
#[track_caller]
pub(crate) fn check(arguments: &[&str], exit_code: i32, sentence: &str) {
    check_in(folder().path(), arguments, exit_code, sentence);
}

/// Runs `lina` with arguments that it refuses: nothing on stdout, one sentence on stderr, and no file that is new, gone
/// or of another size.
#[track_caller]
pub(crate) fn check_in(folder: &Path, arguments: &[&str], exit_code: i32, sentence: &str) {
    let before = files(folder);
    let output = lina(folder, arguments);
    assert_eq!(String::from_utf8_lossy(&output.stderr), format!("error: {sentence}\n"), "{arguments:?}");
    assert_eq!(output.status.code(), Some(exit_code), "{arguments:?}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    assert_eq!(files(folder), before, "{arguments:?}");
}

/// All files and folders below `folder`, with the sizes of files.
pub(crate) fn files(folder: &Path) -> BTreeMap<PathBuf, Option<u64>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let (path, metadata) = entry.map(|entry| (entry.path(), entry.metadata().unwrap())).unwrap();
        if metadata.is_dir() {
            found.extend(files(&path));
        }
        found.insert(path, metadata.is_file().then_some(metadata.len()));
    }
    found
}

/// Names in `folder`, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The losses of a run, step by step.
pub(crate) fn losses(run: &Path) -> Vec<f64> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap()).collect()
}

/// Runs `lina` and returns the one object on its stdout.
#[track_caller]
pub(crate) fn json(folder: &Path, arguments: &[&str]) -> Value {
    let output = lina(folder, arguments);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(value.is_object());
    value
}

/// Looks for the fields that the JSON promises.
#[track_caller]
pub(crate) fn check_fields(value: &Value, fields: &[&str]) {
    for field in fields {
        assert!(value.get(field).is_some(), "no `{field}` in {value}");
    }
}
