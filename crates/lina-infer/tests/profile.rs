//! Profiles on disk: read back they predict the same, and files that are none, or another model's, are refused by name.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use lina_infer::{InferError, ProfileOptions, ProfileSummary, load_profile, profile};
use lina_model::{InferenceWeights, ModelConfig};
use lina_plan::PathTables;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../lina-model/tests/fixtures/hf/qwen3_moe")
}

fn weights() -> InferenceWeights {
    let config = ModelConfig::from_folder(&fixture()).unwrap();
    InferenceWeights::load(&fixture(), config).unwrap()
}

/// A profile of the fixture, of a text in its 128 ids.
fn profiled(folder: &Path) -> ProfileSummary {
    let text: String = (0..60).map(|line| format!("line {line} of a text, {} words\n", line * 7 % 13)).collect();
    fs::write(folder.join("text.txt"), text).unwrap();
    profile(&ProfileOptions {
        model: fixture(),
        data: folder.join("text.txt"),
        out: folder.join("paths"),
        length: 3,
        held_out: None,
        sequence_tokens: Some(32),
        batch_tokens: Some(128),
        threads: 1,
        quiet: true,
    })
    .unwrap()
}

/// The sentence with which `file` is refused, without the file's name, which it begins with.
#[track_caller]
fn refusal(file: &Path, weights: &InferenceWeights) -> String {
    let error = load_profile(file, weights).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let InferError::Input(message) = error else { panic!("{error}") };
    assert!(!message.contains('\n'), "{message}");
    let place = format!("{}: ", file.display());
    message.strip_prefix(&place).unwrap_or_else(|| panic!("{message}")).to_owned()
}

/// What tables say of the second layer with experts after each expert of the first.
fn predictions(tables: &PathTables) -> Vec<u32> {
    let mut all = Vec::new();
    for expert in 0..tables.experts() {
        let mut top = vec![0; tables.top_k()];
        tables.predict(1, &[expert as u32], &mut top);
        all.extend(top);
    }
    all
}

#[test]
fn what_is_read_back_predicts_the_same() {
    let folder = TempDir::new().unwrap();
    let summary = profiled(folder.path());
    let weights = weights();
    let tables = load_profile(&summary.file, &weights).unwrap();
    assert_eq!((tables.layers(), tables.experts(), tables.top_k(), tables.paths()), (2, 16, 4, summary.paths));
    let predicted = predictions(&tables);
    // It has learned something: not every expert is followed by the same.
    assert!(predicted.chunks_exact(4).any(|top| top != &predicted[..4]), "{predicted:?}");
    let second = profiled(folder.path());
    assert_eq!(predictions(&load_profile(&second.file, &weights).unwrap()), predicted);
    assert_eq!(second.tokens, summary.tokens);
    let Some(following) = tables.following(1) else { panic!("the second layer follows the first") };
    assert_eq!(Some((following.top_1, following.top_2)), summary.following.first().map(|f| (f.top_1, f.top_2)));
}

#[test]
fn the_profile_of_another_model_is_refused() {
    let folder = TempDir::new().unwrap();
    let summary = profiled(folder.path());
    let own = weights().fingerprint();
    let other = InferenceWeights::initial(ModelConfig::from_folder(&fixture()).unwrap(), 1);
    assert_eq!(
        refusal(&summary.file, &other),
        format!(
            "is the profile of another model ({own}), expected that of this one ({}): run `lina profile` again",
            other.fingerprint()
        )
    );
}

#[test]
fn files_that_are_no_profiles_are_refused() {
    let folder = TempDir::new().unwrap();
    let file = profiled(folder.path()).file;
    let weights = weights();
    let whole = fs::read(&file).unwrap();
    let expected = "is no profile, expected a safetensors file that `lina profile` has made: ";
    for bytes in [&whole[..whole.len() - 3], &whole[..20], &whole[..0], b"hello, no tables here"] {
        fs::write(&file, bytes).unwrap();
        let message = refusal(&file, &weights);
        assert!(message.starts_with(expected), "{message}");
    }
    let message = refusal(&fixture().join("model.safetensors"), &weights);
    assert_eq!(message, "is no profile, expected a file that `lina profile` has made");
    let message = refusal(&folder.path().join("none"), &weights);
    assert_eq!(message, "cannot be read: No such file or directory (os error 2)");
}

/// Writes a profile again, with its tensors changed: (name, type, bytes) as `change` gives them back, or not at all.
fn rewrite(from: &[u8], to: &Path, change: impl Fn(&str, Dtype, Vec<u8>) -> Option<(Dtype, Vec<u8>)>) {
    let (_, header) = SafeTensors::read_metadata(from).unwrap();
    let metadata: HashMap<String, String> = header.metadata().clone().unwrap();
    let tensors = SafeTensors::deserialize(from).unwrap();
    let changed: Vec<(String, Dtype, Vec<u8>)> = tensors
        .iter()
        .filter_map(|(name, view)| {
            let (dtype, bytes) = change(name, view.dtype(), view.data().to_vec())?;
            Some((name.to_owned(), dtype, bytes))
        })
        .collect();
    let views = changed.iter().map(|(name, dtype, bytes)| {
        (name.as_str(), TensorView::new(*dtype, vec![bytes.len() * 8 / dtype.bitsize()], bytes).unwrap())
    });
    fs::write(to, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

#[test]
fn damaged_tables_are_refused() {
    let folder = TempDir::new().unwrap();
    let file = profiled(folder.path()).file;
    let weights = weights();
    let whole = fs::read(&file).unwrap();
    rewrite(&whole, &file, |name, dtype, bytes| Some((if name == "keys" { Dtype::I64 } else { dtype }, bytes)));
    assert_eq!(refusal(&file, &weights), "has `keys` of type I64, expected U64");
    rewrite(&whole, &file, |name, dtype, bytes| (name != "counts").then_some((dtype, bytes)));
    assert_eq!(refusal(&file, &weights), "has no tensor `counts`");
    rewrite(&whole, &file, |name, dtype, bytes| {
        Some((dtype, if name == "shape" { bytes[..24].to_vec() } else { bytes }))
    });
    assert_eq!(refusal(&file, &weights), "has a `shape` of another length than 4");
    // Experts that the model does not have.
    rewrite(&whole, &file, |name, dtype, bytes| {
        Some((dtype, if name == "next" { vec![0xff; bytes.len()] } else { bytes }))
    });
    let message = refusal(&file, &weights);
    assert!(message.starts_with("is damaged: "), "{message}");
    // The same bytes are a profile when nothing is changed.
    rewrite(&whole, &file, |_, dtype, bytes| Some((dtype, bytes)));
    load_profile(&file, &weights).unwrap();
}
