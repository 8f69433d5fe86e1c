//! What `lina bench train --out` leaves in a folder: the pictures, and the figures as JSON.

use std::fs;
use std::path::Path;

use lina_report::{Report, RunFacts};

use super::BenchSummary;
use crate::TrainError;
use crate::config::RunConfig;
use crate::outputs::parameter_counts;
use crate::run_folder::write_whole;

/// Makes the folder, before the measurement has taken its time.
pub(super) fn prepare(out: &Path) -> Result<(), TrainError> {
    fs::create_dir_all(out)
        .map_err(|e| TrainError::Input(format!("--out {}: cannot be made: {e}, expected a folder", out.display())))
}

/// Writes `report.html` and `bench.json`.
pub(super) fn write(out: &Path, config: &RunConfig, summary: &BenchSummary) -> Result<(), TrainError> {
    let model = &config.model;
    let (parameters, active) = parameter_counts(config);
    let count = |number: usize, name: &str| format!("{number} {name}{}", if number == 1 { "" } else { "s" });
    Report {
        title: format!("{} benchmark", model.kind),
        facts: RunFacts {
            model: Some(format!("{}, {} layers of {}", model.kind, model.layers, model.hidden)),
            parameters: Some(parameters),
            active_parameters: Some(active),
            ranks: Some(summary.ranks as u32),
            engine: Some(summary.engine.clone()),
            emulated: summary.emulated,
            more: [
                Some(("experts".to_owned(), format!("{}, top-{}", model.experts, model.top_k))),
                Some(("measured".to_owned(), {
                    format!("{} of {} each", count(summary.rounds, "round"), count(summary.steps as usize, "step"))
                })),
                summary.emulated_device.clone().map(|sentence| ("devices".to_owned(), sentence)),
                summary.deciding_sentence().map(|sentence| ("decisions".to_owned(), sentence)),
                summary.network.clone().map(|sentence| ("network".to_owned(), sentence)),
            ]
            .into_iter()
            .flatten()
            .collect(),
            ..RunFacts::default()
        },
        policies: Some(summary.comparison()),
        tables: summary.tables(),
        ..Report::default()
    }
    .write(out.join("report.html"))?;
    let place = out.join("bench.json");
    let unwritable = |e: std::io::Error| TrainError::Input(format!("{}: cannot be written: {e}", place.display()));
    let json = serde_json::to_string_pretty(summary).map_err(|e| unwritable(e.into()))?;
    write_whole(&place, json.as_bytes()).map_err(unwritable)
}
