//! A disk that is full while a checkpoint is written: one sentence, and the checkpoints before it stay whole.

use std::path::Path;
use std::process::{Command, Output};

use crate::common::{folder, json, losses, names};

/// What a run of 6 steps with a checkpoint after each says, if only the first checkpoint found room; and that it can
/// go on from there.
#[track_caller]
fn check(folder: &Path, output: &Output, run: &str, reason: &str) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{:?}: {message}", output.status);
    assert!(message.starts_with(&format!("error: {run}/checkpoint-2/")), "{message}");
    assert!(
        message.ends_with(&format!(": cannot be written: {reason}\n")) && message.lines().count() == 1,
        "{message}"
    );
    assert_eq!(names(&folder.join(run)), ["checkpoint-1", "config.toml", "metrics.jsonl"]);
}

/// Goes on with a run from its last checkpoint, and compares it with one that nothing interrupted.
#[track_caller]
fn check_going_on(folder: &Path, run: &str) {
    let options = ["--steps", "6", "--json", "--quiet"];
    json(folder, &[&["train", "run.toml", "--resume", run, "--out", "rest"], options.as_slice()].concat());
    json(folder, &[&["train", "run.toml", "--out", "whole"], options.as_slice()].concat());
    assert_eq!(losses(&folder.join("rest")), losses(&folder.join("whole"))[1..]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk() {
    let folder = folder();
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    // Room for one checkpoint of 218 kB, not for two.
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=240k", "none"]).arg(&disk).output();
    match mounted {
        Ok(output) if output.status.success() => {}
        refused => {
            eprintln!("skipped: a small file system cannot be mounted here: {refused:?}");
            return;
        }
    }
    let train =
        ["train", "run.toml", "--out", "disk/run", "--quiet", "--steps", "6", "--set", "train.checkpoint_every=1"];
    let result = std::panic::catch_unwind(|| {
        let output = crate::common::lina(folder.path(), &train);
        check(folder.path(), &output, "disk/run", "No space left on device (os error 28)");
        check_going_on(folder.path(), "disk/run");
    });
    let unmounted = Command::new("umount").arg(&disk).status();
    if let Err(failure) = result {
        std::panic::resume_unwind(failure);
    }
    assert!(unmounted.unwrap().success());
}

/// The limit's signal would kill the process if it were not for its handler.
#[test]
#[cfg(unix)]
fn a_file_size_limit() {
    let folder = folder();
    let train = |limit: &str, rest: &str| {
        let script =
            format!("{limit} exec \"$0\" train run.toml --quiet --steps 6 --set train.checkpoint_every=1 {rest}");
        let mut shell = Command::new("sh");
        shell.args(["-c", &script, env!("CARGO_BIN_EXE_lina")]).current_dir(folder.path()).output().unwrap()
    };
    // In units of 512 bytes: the configuration fits, a file of weights does not.
    let output = train("ulimit -f 20;", "--out run");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        message, "error: run/checkpoint-1/model.safetensors: cannot be written: File too large (os error 27)\n",
        "{:?}",
        output.status
    );
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(names(&folder.path().join("run")), ["config.toml", "metrics.jsonl"]);

    // The same with an earlier checkpoint, which stays whole.
    json(folder.path(), &["train", "run.toml", "--out", "other", "--json", "--set", "train.steps=6"]);
    let kept = crate::common::files(&folder.path().join("other/checkpoint-6"));
    let output = train("ulimit -f 20;", "--resume other --out other --set train.steps=8 --steps 8");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(crate::common::files(&folder.path().join("other/checkpoint-6")), kept);
}
