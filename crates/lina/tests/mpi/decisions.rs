//! What a run decides as it goes on, on ranks that are processes: packing, sizes, the way of all-to-alls, experts that
//! wait in host memory. When it changes what depends on measured times; the numbers do not, but for rounding where
//! experts move.

use crate::job::{Place, lina, said};

/// The losses of all steps.
fn losses(place: &Place, run: &str) -> Vec<f64> {
    place.steps(run).iter().map(|step| step["loss"].as_f64().unwrap()).collect()
}

#[test]
fn decisions_change_rounding_at_most() {
    let place = Place::new();
    let common = ["--quiet", "--steps", "56", "--set", "train.checkpoint_every=0"];
    let local =
        ["train", "run.toml", "--engine", "local", "--ranks", "4", "--out", "local", "--set", "cluster.device="];
    let output = place.alone(&[&local[..], &common].concat());
    assert!(output.status.success(), "{}", said(&output));
    let reference = losses(&place, "local");

    let decides = ["policy.name=lina-auto", "policy.packing=true", "policy.partition_bytes=5000", "cluster.nodes=2"];
    let hierarchical = ["policy.name=lina", "policy.hierarchical_all_to_all=true", "cluster.nodes=2"];
    let waits = ["cluster.device={ gflops = 20.0, memory_gib = 0.0018, copy_gbps = 0.1 }"];
    for (run, settings, device) in
        [("decides", &decides[..], false), ("hierarchical", &hierarchical, false), ("waits", &waits, true)]
    {
        let start = ["--oversubscribe", "-np", "4", lina(), "train", "run.toml", "--out", run];
        let fast: &[&str] = if device { &[] } else { &["--set", "cluster.device="] };
        let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        let Some(job) = place.mpirun(&[&start[..], &common, fast, &settings].concat()) else { return };
        let output = job.wait_with_output().unwrap();
        assert!(output.status.success(), "{run}: {}", said(&output));
        // Other places of experts sum in another order.
        let tolerance = if run == "decides" { 1e-4 } else { 0.0 };
        let found = losses(&place, run);
        assert_eq!(found.len(), reference.len(), "{run}");
        let near = found.iter().zip(&reference).all(|(found, expected)| (found - expected).abs() <= tolerance);
        assert!(near, "{run}: {found:?}, expected {reference:?}");
        let copied = place.steps(run).iter().all(|step| step["copy_bytes"].as_u64().unwrap() > 0);
        assert_eq!(copied, device, "{run}");
    }
    let sizes = |key: &str| place.steps("decides").iter().map(|step| step[key].as_u64().unwrap()).collect::<Vec<_>>();
    assert!(sizes("partition_bytes").iter().any(|&bytes| bytes != 5000), "it has tried other sizes");
}
