//! Whole runs on this crate's own sources, and what they leave.
#![allow(dead_code)] // each test uses a part

use std::path::{Path, PathBuf};

use lina_train::{
    Engine, EvalOptions, Override, RunConfig, Scalar, StopFlag, TrainError, TrainOptions, TrainSummary, eval, train,
};
use serde_json::Value;
use tempfile::TempDir;

/// The configuration that `text` is, with this crate's sources as data and `overrides` of the form `key=value`.
pub fn config(text: &str, overrides: &[&str]) -> RunConfig {
    // Not the sources, which change: what a run learns must not change with them.
    let data = format!("data.files={}/../../examples/data/synthetic.txt", env!("CARGO_MANIFEST_DIR"));
    let overrides: Vec<Override> =
        std::iter::once(&data.as_str()).chain(overrides).map(|set| Override::set(set).unwrap()).collect();
    RunConfig::parse(Path::new("test.toml"), text, &overrides).unwrap()
}

/// A run with its directory.
pub struct Run {
    dir: TempDir,
    pub summary: Result<TrainSummary, TrainError>,
}

impl Run {
    /// Trains, going on from `resume` if it is given.
    pub fn new(config: RunConfig, resume: Option<PathBuf>) -> Run {
        let dir = TempDir::new().unwrap();
        let out = Some(dir.path().join("run"));
        let summary = train(TrainOptions { config, out, resume, quiet: true }, &StopFlag::new());
        Run { dir, summary }
    }

    pub fn summary(&self) -> &TrainSummary {
        self.summary.as_ref().unwrap()
    }

    pub fn out(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// The text of a file in the run's directory.
    pub fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.out().join(name)).unwrap()
    }

    pub fn metrics(&self) -> Vec<Value> {
        self.text("metrics.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// A number of each step.
    pub fn metric(&self, key: &str) -> Vec<f64> {
        self.metrics().iter().map(|line| line[key].as_f64().unwrap()).collect()
    }

    pub fn losses(&self) -> Vec<f64> {
        self.metric("loss")
    }

    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.out().join(format!("checkpoint-{step}"))
    }

    pub fn weights(&self, step: u64) -> Vec<u8> {
        std::fs::read(self.checkpoint(step).join("model.safetensors")).unwrap()
    }
}

/// The loss of a checkpoint over this crate's sources.
pub fn evaluated(model: PathBuf, ranks: usize, engine: Engine, gpu: Option<Scalar>) -> f64 {
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/src/config/*.rs").into();
    let sequence_tokens = Some(24);
    let options = EvalOptions { model, data, sequence_tokens, ranks, engine, gpu, threads: 1, quiet: true };
    eval(options).unwrap().loss
}

pub fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}
