//! Where a run's files go, and what of an earlier run is safe.

use std::fs;

use crate::common::{check_in, folder, json, lina, losses};

#[test]
fn a_run_without_a_folder_gets_the_next_free_one() {
    let folder = folder();
    for expected in ["runs/run", "runs/run-2", "runs/run-3"] {
        let summary = json(folder.path(), &["train", "run.toml", "--json"]);
        assert_eq!(summary["out"], expected);
        assert_eq!(summary["checkpoint"], format!("{expected}/checkpoint-3"));
    }
    let text = lina(folder.path(), &["train", "run.toml"]);
    let (out, err) = (String::from_utf8(text.stdout).unwrap(), String::from_utf8(text.stderr).unwrap());
    for line in ["report         runs/run-4/report.html", "trace          runs/run-4/trace.json"] {
        assert!(out.contains(line), "{out}");
    }
    assert!(err.starts_with("memory: ") && err.lines().next().unwrap().contains(" predicted ("), "{err}");
    assert!(out.contains("peak memory ") && out.contains(" MiB, predicted "), "{out}");
}

#[test]
fn checkpoints_are_not_overwritten() {
    let folder = folder();
    let path = folder.path();
    json(path, &["train", "run.toml", "--out", "run", "--json"]);
    check_in(
        path,
        &["train", "run.toml", "--out", "run"],
        2,
        "--out run: holds checkpoint-3 already, expected a folder without any; go on from it with --resume or give \
         another --out",
    );
    // A run that goes on stays in its folder, from its latest checkpoint.
    let more = json(path, &["train", "run.toml", "--resume", "run", "--steps", "5", "--json"]);
    assert_eq!((&more["out"], &more["checkpoint"]), (&"run".into(), &"run/checkpoint-5".into()));
    assert_eq!(losses(&path.join("run")).len(), 5);
    check_in(
        path,
        &["train", "run.toml", "--resume", "run/checkpoint-3", "--steps", "7"],
        2,
        "--out run: holds checkpoint-5 already, which is later than step 3 to go on from; resume from it or give \
         another --out",
    );
}

#[test]
fn a_folder_that_cannot_be() {
    let folder = folder();
    fs::write(folder.path().join("file"), "").unwrap();
    let train = |out| ["train", "run.toml", "--out", out];
    check_in(folder.path(), &train("file"), 2, "file: cannot be written: File exists (os error 17)");
    check_in(folder.path(), &train("file/run"), 2, "file/run: cannot be written: Not a directory (os error 20)");
}
