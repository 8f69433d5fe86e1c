//! What `examples/contention.toml` shows. Its times are virtual, so they hold on every machine, however slow or busy.

use std::path::Path;

use lina_report::PolicyRow;
use lina_train::{BenchOptions, BenchSummary, RunConfig, bench_train};

fn bench() -> BenchSummary {
    // Paths in examples are relative to the repository.
    std::env::set_current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).unwrap();
    let config = RunConfig::load(Path::new("examples/contention.toml"), &[]).unwrap();
    bench_train(BenchOptions::new(config)).unwrap()
}

fn row<'a>(summary: &'a BenchSummary, policy: &str) -> &'a PolicyRow {
    summary.policies.iter().find(|row| row.policy == policy).unwrap()
}

#[test]
fn lina_wins_where_gradients_fight_all_to_alls() {
    let summary = bench();
    println!("{}\nexperts' feed-forward: {:.3} of fair's step", summary.table(), summary.expert_share);
    assert!(summary.emulated);
    let (fair, lina) = (row(&summary, "fair"), row(&summary, "lina"));

    // The setting: all-to-all, the experts' feed-forward and allreduce have the shares of the paper's measurements.
    assert!((0.35..=0.40).contains(&fair.a2a_share), "{fair:?}");
    assert!((0.18..=0.22).contains(&summary.expert_share), "{}", summary.expert_share);
    assert!((0.22..=0.30).contains(&fair.allreduce_share), "{fair:?}");
    assert!((1.6..=2.1).contains(&fair.a2a_slowdown.unwrap()), "{fair:?}");

    // What the schedule makes of it.
    assert!(lina.speedup_vs_fair.unwrap() >= 1.3, "{lina:?}");
    assert!(lina.a2a_slowdown.unwrap() <= 1.05, "{lina:?}");
    assert!(lina.ratio_to_bound.unwrap() <= 1.10, "{lina:?}");
    for row in &summary.policies {
        assert!(row.ratio_to_bound.unwrap() >= 1.0, "faster than its bound: {row:?}");
        assert!(row.step_ms_median >= summary.link_bound_ms.unwrap(), "faster than the link: {row:?}");
    }
    // Whole tensors that cannot be stopped, and buckets between pairs, are not enough.
    for policy in ["priority", "fixed"] {
        assert!(row(&summary, policy).step_ms_median > lina.step_ms_median);
    }
}
