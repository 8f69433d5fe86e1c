//! Files that appear whole or not at all.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::ReportError;

/// A file under a temporary name beside its place, moved there by [`AtomicFile::commit`] and removed if that never
/// comes.
pub(crate) struct AtomicFile {
    place: PathBuf,
    temporary: PathBuf,
    /// Taken on commit, so that dropping knows whether there is something to clean up.
    writer: Option<BufWriter<File>>,
}

impl AtomicFile {
    pub(crate) fn create(place: &Path) -> Result<Self, ReportError> {
        let mut name = std::ffi::OsString::from(".");
        name.push(place.file_name().unwrap_or_default());
        name.push(".partial");
        let temporary = place.with_file_name(name);
        let file = File::create(&temporary).map_err(ReportError::file("create", place))?;
        Ok(Self { place: place.to_path_buf(), temporary, writer: Some(BufWriter::new(file)) })
    }

    /// Writes with `write`, naming the final file in an error.
    pub(crate) fn write(
        &mut self,
        write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
    ) -> Result<(), ReportError> {
        match &mut self.writer {
            Some(writer) => write(writer).map_err(ReportError::file("write", &self.place)),
            None => Ok(()),
        }
    }

    /// Makes the content durable and gives the file its name.
    pub(crate) fn commit(mut self) -> Result<(), ReportError> {
        self.write(|writer| {
            writer.flush()?;
            writer.get_ref().sync_all()
        })?;
        std::fs::rename(&self.temporary, &self.place).map_err(ReportError::file("write", &self.place))?;
        self.writer = None;
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.writer.take().is_some() {
            // There is nobody left to tell, and the error that led here is the one to report.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_on_commit_only() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("a.txt");
        let mut file = AtomicFile::create(&place).unwrap();
        file.write(|writer| writer.write_all(b"text")).unwrap();
        assert!(!place.exists());
        file.commit().unwrap();
        assert_eq!(std::fs::read_to_string(&place).unwrap(), "text");

        drop(AtomicFile::create(&folder.path().join("b.txt")).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = AtomicFile::create(Path::new("no-such-folder/a.txt")).err().unwrap();
        assert!(error.to_string().starts_with("cannot create `no-such-folder/a.txt`"), "{error}");
    }
}
