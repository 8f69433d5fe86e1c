//! Ctrl-C and its relatives, with the real process.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{folder, json, losses, names};

/// Patience with a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

fn start(folder: &Path, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_lina"))
        .args(arguments)
        .current_dir(folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn send(signal: &str, child: &Child) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

#[track_caller]
fn wait_until(mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIMIT, "waited for {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Steps that take long enough for a signal to find the run under way.
const LONG: [&str; 4] = ["--steps", "120", "--set", "train.batch_sequences=64"];

#[test]
fn a_signal_ends_the_run_with_a_checkpoint_that_goes_on_exactly() {
    let folder = folder();
    let path = folder.path();
    let train = |run, more: &[&'static str]| [&["train", "run.toml", "--quiet", "--out", run], more, &LONG].concat();
    json(path, &train("whole", &["--json"]));
    for (signal, run) in [("-INT", "interrupted"), ("-TERM", "terminated")] {
        let child = start(path, &train(run, &[]));
        let metrics = path.join(run).join("metrics.jsonl");
        wait_until(|| std::fs::read_to_string(&metrics).is_ok_and(|text| text.lines().count() >= 3));
        send(signal, &child);
        let output = child.wait_with_output().unwrap();
        let step = losses(&path.join(run)).len();
        assert_eq!(
            String::from_utf8_lossy(&output.stderr),
            format!("error: interrupted after step {step}; the checkpoint is in {run}/checkpoint-{step}\n")
        );
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(130), &b""[..]), "{signal}");
        assert!(step < 120);
        let expected = [&format!("checkpoint-{step}"), "config.toml", "metrics.jsonl", "report.html", "trace.json"];
        assert_eq!(names(&path.join(run)), expected);
        json(path, &train(run, &["--json", "--resume", run]));
        assert_eq!(losses(&path.join(run)), losses(&path.join("whole")), "{signal} after step {step}");
    }
}

#[test]
fn a_second_signal_ends_the_process_at_once() {
    let folder = folder();
    // One step takes many times longer than a second signal.
    let train = ["train", "run.toml", "--out", "run", "--set", "train.batch_sequences=20000"];
    let mut child = start(folder.path(), &train);
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    let mut wait_for = |text: &str| {
        while !line.contains(text) {
            line.clear();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "the process ended before it said `{text}`");
        }
    };
    wait_for("held-out loss");
    send("-INT", &child);
    wait_for("stopping after this step");
    send("-INT", &child);
    let start = Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "");
    assert_eq!(names(&folder.path().join("run")), ["config.toml", "metrics.jsonl"]);
}
