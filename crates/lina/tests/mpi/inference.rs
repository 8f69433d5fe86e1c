//! Inference on ranks that are processes: the answer is the one of a single rank, wherever experts are.

use serde_json::Value;

use crate::job::{Place, lina, said};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lina-model/tests/fixtures/hf/qwen3_moe");

#[test]
fn answers_are_those_of_one_rank() {
    let place = Place::new();
    let generate =
        ["generate", MODEL, "--prompt", "the same prompt everywhere", "--max-new-tokens", "30", "--greedy", "--json"];
    let output = place.alone(&generate);
    assert!(output.status.success(), "{}", said(&output));
    let token_ids = |stdout: &[u8]| serde_json::from_slice::<Value>(stdout).unwrap()["token_ids"].clone();
    let expected = token_ids(&output.stdout);
    assert_eq!(expected.as_array().unwrap().len(), 30);
    for ranks in ["2", "3"] {
        let start = ["--oversubscribe", "-np", ranks, lina()];
        let Some(job) = place.mpirun(&[&start[..], &generate, &["--engine", "mpi"]].concat()) else { return };
        let output = job.wait_with_output().unwrap();
        assert!(output.status.success(), "{ranks} ranks: {}", said(&output));
        assert_eq!(token_ids(&output.stdout), expected, "{ranks} ranks");
    }
}
