//! What is wrong with a job is said once, whether all ranks have it or one alone.

use std::process::Command;

use crate::job::{Place, lina, said};

/// Runs a job of programs with a colon between them and returns its exit code, and what its ranks said.
fn ranks_say(arguments: &[&str]) -> Option<(Option<i32>, Vec<String>)> {
    let place = Place::new();
    let output = place.mpirun(&[&["--oversubscribe"], arguments].concat())?.wait_with_output().unwrap();
    let lines = said(&output).lines().filter(|line| line.starts_with("error: ")).map(str::to_owned).collect();
    assert!(!place.has("run"), "{output:?}");
    Some((output.status.code(), lines))
}

fn train<'a>(ranks: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["-np", ranks, lina(), "train", "run.toml", "--quiet", "--out", "run"], more].concat()
}

#[track_caller]
fn check(arguments: &[&str], sentence: &str) {
    let Some(found) = ranks_say(arguments) else { return };
    assert_eq!(found, (Some(2), vec![sentence.to_owned()]), "{arguments:?}");
}

#[test]
fn of_all_ranks_is_said_once() {
    check(
        &train("4", &["--steps", "0"]),
        "error: --steps 0: `train.steps` is 0, expected a number from 1 to 1099511627776",
    );
    check(
        &train("3", &["--ranks", "5"]),
        "error: --ranks 5: `cluster.ranks` is 5, expected 3, the number that the launcher started; it need not be written",
    );
}

#[test]
fn of_one_rank_is_said_by_it() {
    let separate = |first: &[&'static str], second: &[&'static str]| -> Vec<&'static str> {
        [train("2", first), vec![":"], train("1", second)].concat()
    };
    check(
        &separate(&[], &["--steps", "0"]),
        "error: rank 2: --steps 0: `train.steps` is 0, expected a number from 1 to 1099511627776",
    );
    check(
        &separate(&["--steps", "8"], &["--steps", "9"]),
        "error: rank 2 differs from rank 0: it has `steps = 9` where rank 0 has `steps = 8`",
    );
}

/// The launcher itself refuses; `lina` is not even started.
#[test]
fn more_ranks_than_slots() {
    let place = Place::new();
    let arguments = [&["--host", "localhost:2"], train("3", &[]).as_slice()].concat();
    let Some(job) = place.mpirun(&arguments) else { return };
    let output = job.wait_with_output().unwrap();
    assert!(said(&output).contains("not enough slots available"), "{output:?}");
    assert!(!output.status.success() && !place.has("run"));
}

#[test]
fn no_launcher() {
    let output = Place::new().alone(&["train", "run.toml", "--quiet", "--ranks", "4", "--out", "run"]);
    let sentence = "MPI started 1 rank(s), expected 4, the number that the job is laid out for, as `mpirun -np 4` does";
    assert_eq!(said(&output), format!("error: {sentence}\n"));
    assert_eq!(output.status.code(), Some(2));
}

/// A machine without an MPI cannot start this program, and what to install is said by one without the feature. Here
/// at least the launcher can be hidden.
#[test]
fn no_mpi_on_the_machine() {
    let output = Command::new(lina()).arg("doctor").env("PATH", "/nowhere").output().unwrap();
    let found = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(found.contains("a launcher on PATH: mpirun, mpiexec or srun"), "{found}");
    assert!(found.contains("mpi: install an MPI, such as Open MPI (Debian and Ubuntu: openmpi-bin"), "{found}");
}
