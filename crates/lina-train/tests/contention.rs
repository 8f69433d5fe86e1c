//! The figures of `examples/contention.toml`. Virtual time is the same on every machine, so they are exact.

use std::path::Path;

use lina_train::{BenchOptions, BenchSummary, RunConfig, bench_train};

fn summary() -> BenchSummary {
    std::env::set_current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).unwrap();
    let config = RunConfig::load(Path::new("examples/contention.toml"), &[]).unwrap();
    let bench = config.bench_or_default();
    let options = BenchOptions { config, policies: bench.policies, rounds: bench.rounds, quiet: true };
    bench_train(options).unwrap()
}

#[test]
fn lina_wins_where_gradients_fight_all_to_alls() {
    let summary = summary();
    println!("{}\nexpert share {:.3}", summary.table(), summary.expert_share);
}
