//! The folder of a run: where it is, what in it must not be lost, and what it holds from the start.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use lina_report::MetricsWriter;

use crate::TrainError;
use crate::config::RunConfig;

/// Where runs go that are not told where.
const RUNS: &str = "runs";
/// Name of a checkpoint's folder, before its step.
const CHECKPOINT: &str = "checkpoint-";

/// The folder of a run that was not told one: that of the run that it resumes, else `runs/STEM` after the
/// configuration file, or the first of `runs/STEM-2`, `runs/STEM-3`, ... that is free.
pub fn default_run_folder(config_file: &Path, resume: Option<&Path>) -> PathBuf {
    if let Some(resume) = resume {
        if latest_checkpoint(resume).is_some() {
            return resume.to_path_buf();
        }
        if let (Some(_), Some(run)) = (checkpoint_step(resume), resume.parent()) {
            return if run.as_os_str().is_empty() { PathBuf::from(".") } else { run.to_path_buf() };
        }
    }
    let stem = config_file.file_stem().map_or("run".into(), |stem| stem.to_string_lossy());
    let numbered = (2u64..).map(|number| format!("{stem}-{number}"));
    let mut names = std::iter::once(stem.to_string()).chain(numbered).map(|name| Path::new(RUNS).join(name));
    names.find(|folder| !folder.exists()).unwrap_or_else(|| RUNS.into())
}

/// The checkpoint that `--resume` means: the folder itself, or the latest checkpoint of a run's folder.
pub(crate) fn checkpoint_of(resume: &Path) -> Result<PathBuf, TrainError> {
    if resume.join("trainer_state.json").exists() {
        return Ok(resume.to_path_buf());
    }
    latest_checkpoint(resume).map(|(_, checkpoint)| checkpoint).ok_or_else(|| {
        let found = if resume.is_dir() { "has neither" } else { "is no folder" };
        TrainError::Input(format!(
            "--resume {}: {found}, expected a checkpoint with its trainer_state.json or the folder of a run with \
             checkpoints",
            resume.display()
        ))
    })
}

/// Refuses to mix a run with an earlier one's checkpoints. `done` steps come from the checkpoint that it goes on from.
pub(crate) fn check_free(out: &Path, done: Option<u64>) -> Result<(), TrainError> {
    let Some((step, checkpoint)) = latest_checkpoint(out) else { return Ok(()) };
    let advice = match done {
        None => "expected a folder without any; go on from it with --resume or give another --out".to_owned(),
        Some(done) if step > done => {
            format!("which is later than step {done} to go on from; resume from it or give another --out")
        }
        Some(_) => return Ok(()),
    };
    Err(TrainError::Input(format!("--out {}: holds {} already, {advice}", out.display(), name(&checkpoint))))
}

/// Makes the folder, with the resolved configuration and the metrics file.
pub(crate) fn prepare(out: &Path, config: &RunConfig, done: u64) -> Result<MetricsWriter, TrainError> {
    let error =
        |path: &Path, e: std::io::Error| TrainError::Input(format!("{}: cannot be written: {e}", path.display()));
    fs::create_dir_all(out).map_err(|e| error(out, e))?;
    remove_unfinished(out);
    let path = out.join("config.toml");
    write_whole(&path, config.to_toml().map_err(TrainError::input)?.as_bytes()).map_err(|e| error(&path, e))?;
    let metrics = out.join("metrics.jsonl");
    Ok(if done > 0 { MetricsWriter::resume(&metrics, done)? } else { MetricsWriter::create(&metrics)? })
}

/// Replaces `path` by a file with `content`, or leaves it as it was.
///
/// # Errors
/// Whatever keeps the file from being written.
pub fn write_whole(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_file_name(format!(".{}.partial", name(path)));
    let written = fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The error that led here is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Removes what a killed run was writing: it takes room and nobody can use it.
fn remove_unfinished(out: &Path) {
    for path in entries(out) {
        let name = name(&path);
        if name.starts_with(&format!(".{CHECKPOINT}")) && name.ends_with(".partial") {
            // Whatever stays does no harm but for its size.
            let _ = fs::remove_dir_all(path);
        }
    }
}

/// The checkpoint in a run's folder after the most steps.
fn latest_checkpoint(out: &Path) -> Option<(u64, PathBuf)> {
    entries(out).filter_map(|path| checkpoint_step(&path).map(|step| (step, path))).max()
}

fn checkpoint_step(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(CHECKPOINT)?.parse().ok()
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_stays_in_its_folder() {
        let run = tempfile::tempdir().unwrap();
        let checkpoint = run.path().join("checkpoint-20");
        for step in [3, 20, 100] {
            fs::create_dir(run.path().join(format!("checkpoint-{step}"))).unwrap();
        }
        let config = Path::new("examples/some.toml");
        assert_eq!(default_run_folder(config, Some(&checkpoint)), run.path());
        assert_eq!(default_run_folder(config, Some(run.path())), run.path());
        assert_eq!(default_run_folder(config, Some(Path::new("checkpoint-3"))), Path::new("."));
        assert_eq!(default_run_folder(config, None), Path::new("runs/some"));
        assert_eq!(checkpoint_of(run.path()).unwrap(), run.path().join("checkpoint-100"));
        assert!(check_free(run.path(), Some(100)).is_ok());
        let message = check_free(run.path(), Some(20)).unwrap_err().to_string();
        assert!(message.ends_with(
            "holds checkpoint-100 already, which is later than step 20 to go on from; resume from it or give another \
             --out"
        ), "{message}");
    }

    #[test]
    fn what_a_killed_run_left_is_removed() {
        let run = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let folder = run.path().join(name);
            fs::create_dir(&folder).unwrap();
            folder
        };
        let (unfinished, other) = (folder(".checkpoint-3.partial"), folder("checkpoint-2.partial"));
        remove_unfinished(run.path());
        assert!(!unfinished.exists() && other.exists());
        assert!(write_whole(&run.path().join("none/a.txt"), b"text").is_err());
        write_whole(&run.path().join("a.txt"), b"text").unwrap();
        assert_eq!(fs::read(run.path().join("a.txt")).unwrap(), b"text");
    }
}
