//! `metrics.jsonl`: a line a step, on disk before the next step begins.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::ReportError;

/// Appends one JSON object a line to a file.
///
/// Each line is one write, so a run that is killed leaves whole lines, or at worst a torn last one, which
/// [`MetricsWriter::resume`] removes.
#[derive(Debug)]
pub struct MetricsWriter {
    place: PathBuf,
    file: File,
    line: Vec<u8>,
}

impl MetricsWriter {
    /// Starts a new file, in place of one that may be there.
    ///
    /// # Errors
    /// [`ReportError::File`].
    pub fn create(place: impl AsRef<Path>) -> Result<Self, ReportError> {
        let place = place.as_ref().to_path_buf();
        let file = File::create(&place).map_err(ReportError::file("create", &place))?;
        Ok(Self { place, file, line: Vec::new() })
    }

    /// Continues a file with `step` as the next step: the first line whose `step` is at least that, and all after it,
    /// are cut off, since they come from steps that will be done again. A missing file is created.
    ///
    /// # Errors
    /// [`ReportError::File`], and [`ReportError::NotMetrics`] for a whole line without a `step`.
    pub fn resume(place: impl AsRef<Path>, step: u64) -> Result<Self, ReportError> {
        let place = place.as_ref();
        let content = match std::fs::read(place) {
            Ok(content) => content,
            Err(error) if error.kind() == ErrorKind::NotFound => return Self::create(place),
            Err(error) => return Err(ReportError::file("read", place)(error)),
        };
        let mut kept_bytes = 0;
        for (index, line) in content.split_inclusive(|&byte| byte == b'\n').enumerate() {
            if !line.ends_with(b"\n") {
                break;
            }
            let row: Option<serde_json::Value> = serde_json::from_slice(line).ok();
            let found = row
                .and_then(|row| row.get("step")?.as_u64())
                .ok_or_else(|| ReportError::NotMetrics { file: place.to_path_buf(), line: index + 1 })?;
            if found >= step {
                break;
            }
            kept_bytes += line.len();
        }
        let file = OpenOptions::new().append(true).open(place).map_err(ReportError::file("open", place))?;
        file.set_len(kept_bytes as u64).map_err(ReportError::file("truncate", place))?;
        Ok(Self { place: place.to_path_buf(), file, line: Vec::new() })
    }

    /// Appends a step's row, which must serialize to an object with a whole number `step`.
    ///
    /// # Errors
    /// [`ReportError::Row`] if it does not serialize, [`ReportError::File`] if it cannot be written.
    pub fn append(&mut self, row: &impl Serialize) -> Result<(), ReportError> {
        self.line.clear();
        serde_json::to_writer(&mut self.line, row)
            .map_err(|source| ReportError::Row { file: self.place.clone(), source })?;
        self.line.push(b'\n');
        self.file.write_all(&self.line).map_err(ReportError::file("write", &self.place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Row {
        step: u64,
        loss: f32,
    }

    fn steps(file: &Path) -> Vec<u64> {
        let text = std::fs::read_to_string(file).unwrap();
        let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap();
        text.lines().map(step).collect()
    }

    #[test]
    fn a_resumed_run_replaces_the_steps_that_it_does_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("metrics.jsonl");
        let mut metrics = MetricsWriter::create(&file).unwrap();
        for step in 0..5 {
            metrics.append(&Row { step, loss: 1.5 }).unwrap();
        }
        assert!(std::fs::read_to_string(&file).unwrap().starts_with("{\"step\":0,\"loss\":1.5}\n"));

        let mut resumed = MetricsWriter::resume(&file, 3).unwrap();
        resumed.append(&Row { step: 3, loss: f32::NAN }).unwrap();
        assert_eq!(steps(&file), [0, 1, 2, 3]);
        assert!(MetricsWriter::resume(&file, 100).is_ok());
        assert_eq!(steps(&file), [0, 1, 2, 3]);
    }

    #[test]
    fn a_torn_line_goes_and_a_strange_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("metrics.jsonl");
        std::fs::write(&file, "{\"step\": 0}\n{\"step\": 1, \"lo").unwrap();
        MetricsWriter::resume(&file, 9).unwrap().append(&Row { step: 1, loss: 2.0 }).unwrap();
        assert_eq!(steps(&file), [0, 1]);

        std::fs::write(&file, "{\"step\": 0}\nhello\n").unwrap();
        let message = MetricsWriter::resume(&file, 9).unwrap_err().to_string();
        assert!(message.contains("metrics.jsonl` line 2 is not a JSON object"), "{message}");
        assert!(MetricsWriter::resume(folder.path().join("new.jsonl"), 4).is_ok());
    }
}
