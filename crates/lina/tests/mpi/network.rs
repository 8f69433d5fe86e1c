//! The network of one host goes down in the middle of a step.

use std::time::{Duration, Instant};

use crate::job::{Place, said, wait_until};

#[test]
fn a_host_whose_interface_goes_down_is_named() {
    let place = Place::new();
    let started = Instant::now();
    let train = ["train", "run.toml", "--quiet", "--out", "run", "--set", "cluster.timeout_s=2"];
    let Some(output) = place.testbed("3", ("TESTBED_DOWN", "2 run/checkpoint-4"), &train) else { return };
    // Rank 1 says that its own network is down, which nobody can hear.
    let sentence = "error: rank 1 has been silent for 2 s while the others waited for its heartbeat\n";
    assert_eq!(said(&output).matches(sentence).count(), 2, "{output:?}");
    assert!(!output.status.success() && started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    assert!(place.has("run/checkpoint-4/trainer_state.json"));
    wait_until("the ranks to end", || place.ranks().is_empty());
}
