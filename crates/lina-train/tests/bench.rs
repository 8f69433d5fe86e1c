//! Comparisons of policies on real threads, and the paper's studies with what they leave in a folder.

mod common;

use std::path::Path;

use lina_plan::{Policy, Schedule};
use lina_train::{BenchOptions, BenchSummary, RunConfig, Studies, bench_train};

const RUN: &str = r#"
[model]
kind = "mixtral"
layers = 2
hidden = 32
heads = 4
experts = 4
expert_hidden = 48

[train]
sequence_tokens = 16
batch_sequences = 8

[cluster]
ranks = 4
threads = 1
device = { gflops = 2.0 }
link = { gbps = 0.2, latency_us = 50, launch_us = 10 }

[policy]
bucket_bytes = 8192
partition_bytes = 4096

[bench]
policies = ["fair", "lina"]
steps = 3
warmup_steps = 2
rounds = 2
"#;

fn config(overrides: &[&str]) -> RunConfig {
    common::config(RUN, overrides)
}

#[test]
fn real_ranks_measure_their_collectives_alone() {
    let summary = bench_train(BenchOptions::new(config(&["cluster.link=", "cluster.device="]))).unwrap();
    assert!(!summary.emulated);
    for row in &summary.policies {
        let alone_ms = row.a2a_backward_alone_ms.unwrap();
        assert!(alone_ms > 0.0 && alone_ms.is_finite(), "{row:?}");
        assert_eq!(row.a2a_slowdown, Some(row.a2a_backward_ms_median / alone_ms));
        assert!(row.allreduce_share > 0.0 && row.bound_ms.is_none(), "{row:?}");
        assert!((0.0..=1.0).contains(&row.pipelining_efficiency.unwrap()), "{row:?}");
    }
}

#[test]
fn one_rank_exchanges_nothing() {
    let overrides = ["cluster.link=", "cluster.device=", "cluster.ranks=1", "bench.rounds=1"];
    for row in bench_train(BenchOptions::new(config(&overrides))).unwrap().policies {
        assert_eq!((row.a2a_backward_alone_ms, row.a2a_slowdown, row.pipelining_efficiency), (None, None, None));
        assert_eq!(row.allreduce_share, 0.0);
    }
}

fn studies(out: &Path) -> BenchSummary {
    let studies = Studies { paper: true, partition_sweep: Some(vec![1024, 4096]), pipelining: true };
    let options = BenchOptions::new(config(&["bench.rounds=1"]));
    let policies = Studies::ABLATION.to_vec();
    bench_train(BenchOptions { policies, studies, out: Some(out.to_path_buf()), ..options }).unwrap()
}

#[test]
fn studies_have_tables_and_leave_figures_and_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a/b");
    let summary = studies(&out);
    assert_eq!(summary.policies.len(), 8);
    assert_eq!((summary.paper[5].policy.as_str(), summary.paper[5].paper_step_speedup), ("lina+packing", Some(1.37)));
    let sizes: Vec<_> = summary.partition_sweep.iter().map(|row| (row.policy.as_str(), row.partition_bytes)).collect();
    assert_eq!(sizes[..2], [("lina", Some(1024)), ("lina", Some(4096))]);
    assert_eq!(sizes[2].0, "lina-auto");
    // The configured size was measured once, for both tables.
    let lina = summary.policies.iter().find(|row| row.policy == Schedule::from(Policy::Lina).to_string()).unwrap();
    assert_eq!(summary.partition_sweep[1], *lina);
    let chunks: Vec<_> = summary.pipelining.iter().map(|row| row.pipeline_chunks).collect();
    assert_eq!(chunks, [1, 2, 4, 1, 2, 4]);
    let efficiency = |row: usize| summary.pipelining[row].pipelining_efficiency.unwrap();
    assert!(efficiency(1) > efficiency(0), "chunks let ranks compute while others travel: {:?}", summary.pipelining);
    for title in ["Gains beside the paper's", "Partition sizes", "Pipelining efficiency"] {
        assert!(summary.table().contains(title), "{title}");
    }
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    for section in ["policies", "paper", "partition-sweep", "pipelining"] {
        assert!(page.contains(&format!("<section id=\"{section}\">")), "{section}");
    }
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("bench.json")).unwrap()).unwrap();
    assert_eq!(json["pipelining"].as_array().unwrap().len(), 6);
    assert_eq!(json["emulated"], true);
}

#[test]
fn a_folder_that_cannot_be_is_refused_before_anything_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "text").unwrap();
    let options = BenchOptions { out: Some(file.clone()), ..BenchOptions::new(config(&[])) };
    let error = bench_train(options).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().starts_with(&format!("--out {}: cannot be made: ", file.display())), "{error}");
}
