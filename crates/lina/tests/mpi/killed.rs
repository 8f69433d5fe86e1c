//! A rank is killed: every other rank says which, nobody stays, and the run goes on from its last checkpoint.

use std::time::{Duration, Instant};

use crate::job::{Place, killed, lina, said, wait_until};

/// Less than the time for which a rank may be silent: a killed one is noticed at once.
const LIMIT: Duration = Duration::from_secs(15);

/// When a rank is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// After this part of a step, of which the first third is forward.
    Step(f64),
    Checkpoint,
}

/// Kills `victim` of four ranks, and goes on with `resume` arguments to step 6, which the lost job has done, too.
#[track_caller]
fn check(moment: Moment, victim: usize, resume: &[&str]) {
    let place = Place::new();
    let train = ["--oversubscribe", "-np", "4", lina(), "train", "run.toml", "--quiet", "--out", "run"];
    let Some(mut job) = place.mpirun(&train) else { return };
    wait_until("six steps", || place.steps("run").len() >= 6 || job.try_wait().unwrap().is_some());
    match moment {
        Moment::Step(part) => {
            let steps = place.steps("run");
            let step_ms = steps[steps.len() - 1]["step_ms"].as_f64().unwrap();
            std::thread::sleep(Duration::from_secs_f64(part * step_ms / 1e3));
        }
        Moment::Checkpoint => stop_in_checkpoint(&place, victim),
    }
    place.signal("-KILL", victim);
    let lost = Instant::now();
    let output = job.wait_with_output().unwrap();
    assert!(lost.elapsed() < LIMIT, "{moment:?}: {:?}", lost.elapsed());
    assert_eq!(said(&output).matches(&killed(victim)).count(), 3, "{moment:?}: {output:?}");
    assert!(!output.status.success());
    wait_until("the ranks to end", || place.ranks().is_empty());

    let before = place.steps("run");
    assert!(place.has("run/checkpoint-4/trainer_state.json"));
    let options = ["train", "run.toml", "--quiet", "--resume", "run/checkpoint-4", "--out", "rest", "--steps", "6"];
    let output = match resume {
        ["mpi", ranks] => place
            .mpirun(&[&["--oversubscribe", "-np", ranks, lina()], options.as_slice()].concat())
            .unwrap()
            .wait_with_output()
            .unwrap(),
        more => place.alone(&[&options, more].concat()),
    };
    assert!(output.status.success(), "{moment:?}: {output:?}");
    let after = place.steps("rest");
    assert_eq!(after.len(), 2);
    for (before, after) in before[4..6].iter().zip(&after) {
        assert_eq!(before["step"], after["step"]);
        let losses = [before, after].map(|step| step["loss"].as_f64().unwrap());
        assert!((losses[0] - losses[1]).abs() < 1e-4, "{moment:?}: {losses:?}");
    }
}

/// Stops `victim` while a checkpoint is half written, which needs every rank: it stays so.
fn stop_in_checkpoint(place: &Place, victim: usize) {
    for number in (8..).step_by(4) {
        let partial = format!("run/.checkpoint-{number}.partial");
        let whole = format!("run/checkpoint-{number}");
        wait_until("a checkpoint", || place.has(&partial) || place.has(&whole));
        place.signal("-STOP", victim);
        // What was under way without the victim has come to its end by then.
        std::thread::sleep(Duration::from_millis(100));
        if place.has(&partial) {
            return;
        }
        place.signal("-CONT", victim);
    }
}

const ON_THREADS: [&str; 6] = ["--engine", "local", "--ranks", "2", "--set", "cluster.device="];

#[test]
fn in_forward() {
    check(Moment::Step(0.15), 2, &ON_THREADS);
}

#[test]
fn in_backward() {
    check(Moment::Step(0.65), 1, &["mpi", "3"]);
}

#[test]
fn in_a_checkpoint() {
    check(Moment::Checkpoint, 3, &ON_THREADS);
}

#[test]
fn the_rank_that_writes_a_checkpoint() {
    check(Moment::Checkpoint, 0, &["mpi", "2"]);
}
