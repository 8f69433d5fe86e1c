//! What `lina bench infer --out` leaves in a folder: the pictures, and the figures as JSON.

use std::fs;
use std::path::Path;

use lina_model::ModelConfig;
use lina_report::{ExpertLoad, InferenceComparison, LayerLoad, Report, RunFacts};
use lina_train::write_whole;

use super::config::BatchKind;
use super::summary::InferBenchSummary;
use crate::InferError;

/// Makes the folder and tries it, before the measurement has taken its time.
pub(super) fn prepare(out: &Path) -> Result<(), InferError> {
    let probe = out.join(".probe.partial");
    fs::create_dir_all(out)
        .and_then(|()| fs::write(&probe, []))
        .and_then(|()| fs::remove_file(&probe))
        .map_err(|e| InferError::Input(format!("--out {}: {e}, expected a folder to write into", out.display())))
}

/// Writes `report.html` and `bench.json`.
pub(super) fn write(out: &Path, model: &ModelConfig, summary: &InferBenchSummary) -> Result<(), InferError> {
    report(model, summary).write(out.join("report.html")).map_err(InferError::input)?;
    let place = out.join("bench.json");
    let unwritable = |e: std::io::Error| InferError::Input(format!("{}: cannot be written: {e}", place.display()));
    let json = serde_json::to_string_pretty(summary).map_err(|e| unwritable(e.into()))?;
    write_whole(&place, json.as_bytes()).map_err(unwritable)
}

fn report(model: &ModelConfig, summary: &InferBenchSummary) -> Report {
    let clock = if summary.emulated { " emulated" } else { "" };
    let batches = match summary.batch {
        BatchKind::Prefill => "prefill",
        BatchKind::Decode => "decode",
    };
    let routing = match summary.synthetic_skew {
        Some(skew) => format!("synthetic, hottest over coldest expert {skew}"),
        None => "the model's own".to_owned(),
    };
    let facts = [
        ("experts", format!("{}, top-{}", model.experts, model.top_k)),
        ("slots", format!("{} experts of {} KiB a layer", summary.slots, summary.expert_bytes >> 10)),
        ("measured", format!("{} {batches} batches of {} tokens", summary.batches, summary.batch_tokens)),
        ("routing", routing),
        ("hottest over coldest expert", format!("{:.2}", summary.skew)),
        ("MoE layers of an ideal batch, w", format!("{:.1} %", 100.0 * summary.w)),
        ("all-to-all waits of it", format!("{:.1} %", 100.0 * summary.a2a_share)),
        (
            "largest device over the mean under static, r",
            format!("{:.2} at the 95th percentile, median {:.2}", summary.r_static, summary.r_static_median),
        ),
        ("w(r - 1)", format!("{:.2}", summary.w_r_minus_1)),
        (
            "costs",
            format!(
                "an expert's row {:.2} us, a row on the wire {:.2} us, a copy of an expert {:.1} us{clock}",
                summary.row_ns / 1e3,
                summary.wire_row_ns / 1e3,
                summary.copy_us
            ),
        ),
    ];
    Report {
        title: format!("{} inference benchmark", model.kind),
        facts: RunFacts {
            model: Some(format!("{}, {} layers of {}", model.kind, model.layers, model.hidden)),
            ranks: Some(summary.ranks as u32),
            emulated: summary.emulated,
            more: facts.map(|(name, value)| (name.to_owned(), value)).to_vec(),
            ..RunFacts::default()
        },
        inference: Some(InferenceComparison {
            schedulers: summary.schedulers.clone(),
            path_length: summary.path_length,
            emulated: summary.emulated,
        }),
        expert_load: Some(expert_load(model, summary)),
        ..Report::default()
    }
}

/// Shares as tokens: every token of a batch has as many experts in each layer as the gate picks.
fn expert_load(model: &ModelConfig, summary: &InferBenchSummary) -> ExpertLoad {
    let rows = (summary.batches * summary.batch_tokens * model.top_k) as f64;
    let layer = |(number, shares): (usize, &Vec<f64>)| LayerLoad {
        layer: model.moe_layer(number) as u32,
        tokens: shares.iter().map(|share| (share * rows).round() as u64).collect(),
    };
    ExpertLoad {
        steps: "the measured batches under static placement".into(),
        layers: summary.expert_load.iter().enumerate().map(layer).collect(),
    }
}

#[cfg(test)]
mod tests {
    use lina_model::{ModelKind, Sizes};
    use lina_report::SchedulerResult;

    use super::*;

    #[test]
    fn the_folder_gets_the_page_and_the_figures() {
        let sizes = Sizes { vocab: 9, hidden: 8, layers: 2, heads: 2, experts: 3, top_k: 2, expert_hidden: 6 };
        let row = |name: &str, p95_ms| SchedulerResult { scheduler: name.into(), p95_ms, ..SchedulerResult::default() };
        let summary = InferBenchSummary {
            ranks: 3,
            emulated: true,
            batches: 5,
            batch_tokens: 100,
            schedulers: vec![row("static", 22.5), row("lina", 12.5)],
            expert_load: vec![vec![0.5, 0.375, 0.125], vec![0.0, 1.0, 0.0]],
            ..InferBenchSummary::default()
        };
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &ModelConfig::family(ModelKind::Mixtral, sizes), &summary).unwrap();
        let page = fs::read_to_string(folder.path().join("report.html")).unwrap();
        for text in [
            "mixtral inference benchmark",
            "5 prefill batches of 100 tokens",
            "<td>static</td><td>0.00</td><td>22.5</td>",
            "layer 0, expert 1: 375 tokens, 1.12x the even share",
            "EMULATED",
        ] {
            assert!(page.contains(text), "{text}");
        }
        let json = fs::read(folder.path().join("bench.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json, serde_json::to_value(&summary).unwrap());
        assert_eq!(json["expert_load"][0], serde_json::json!([0.5, 0.375, 0.125]));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing unfinished stays");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a/b");
        prepare(&out).unwrap();
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0, "trying leaves nothing");
        let file = folder.path().join("file");
        fs::write(&file, "text").unwrap();
        let error = prepare(&file.join("out")).unwrap_err();
        assert!(error.to_string().starts_with(&format!("--out {}", file.display())), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
