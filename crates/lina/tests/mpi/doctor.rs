//! `lina doctor --engine mpi`: what it measures, and whom it blames.

use serde_json::Value;

use crate::job::{Place, lina, said};

#[test]
fn every_two_ranks_are_measured_and_one_speaks() {
    let job = ["--oversubscribe", "-np", "3", lina(), "doctor", "--engine", "mpi", "--json"];
    let place = Place::new();
    let Some(job) = place.mpirun(&job) else { return };
    let output = job.wait_with_output().unwrap();
    assert!(output.status.success() && said(&output).is_empty(), "{output:?}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let pairs: Vec<&Value> = found["pairs"].as_array().unwrap().iter().map(|pair| &pair["ranks"]).collect();
    assert_eq!(pairs, [&Value::from([0, 1]), &Value::from([0, 2]), &Value::from([1, 2])]);
    assert_eq!(found["ranks"].as_array().unwrap().len(), 3);
    assert_eq!(found["hosts"].as_array().unwrap().len(), 1);
}

#[test]
fn a_slow_host_is_named() {
    let doctor = ["doctor", "--engine", "mpi", "--json"];
    let Some(output) = Place::new().testbed("4", ("TESTBED_SLOW", "3 50mbit"), &doctor) else { return };
    let (network, sentence) = blamed(&output.stdout);
    assert_eq!(network, "host 2: rate", "{output:?}");
    assert!(sentence.contains("ost h3 (rank 2) sends and receives "), "{output:?}");
}

#[test]
fn a_slow_link_is_named() {
    let doctor = ["doctor", "--engine", "mpi", "--json"];
    let Some(output) = Place::new().testbed("4", ("TESTBED_SLOW_LINK", "1 3 20mbit"), &doctor) else { return };
    let (network, sentence) = blamed(&output.stdout);
    assert_eq!(network, "host 0 to host 2: sending", "{output:?}");
    assert!(sentence.contains("ost h1 (rank 0) to host h3 (rank 2): their link is "), "{output:?}");
}

/// What is said of the network, in short and as a sentence.
fn blamed(stdout: &[u8]) -> (String, String) {
    let found: Value = serde_json::from_slice(stdout).unwrap();
    // Computation and short times are at the mercy of whatever else this machine does.
    let steady = |finding: &&Value| finding["what"] != "computes" && finding["aspect"] != "round_trip";
    let network = found["findings"].as_array().unwrap().iter().filter(steady);
    let findings = network.map(|finding| {
        let aspect = finding["aspect"].as_str().unwrap();
        match finding["what"].as_str().unwrap() {
            "link" => format!("host {} to host {}: {aspect}", finding["from"]["host"], finding["to"]["host"]),
            _ => format!("host {}: {aspect}", finding["place"]["host"]),
        }
    });
    (findings.collect::<Vec<_>>().join("; "), found["sentence"].as_str().unwrap().to_owned())
}
