//! Writing a folder so that it appears whole or not at all.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::CheckpointError;
use crate::config::ModelConfig;
use crate::params::{Parameter, ParameterLayout};

/// Bytes written at a time.
const BLOCK_BYTES: usize = 1 << 20;

/// A folder under construction, under a temporary name beside its final one. Dropped without
/// [`commit`](Self::commit), it leaves nothing behind.
#[derive(Debug)]
pub struct FolderWriter {
    target: PathBuf,
    temporary: PathBuf,
    finished: bool,
}

impl FolderWriter {
    /// Begins the folder `target`; its parents are made if they are missing.
    ///
    /// # Errors
    /// If the temporary folder cannot be made.
    pub fn create(target: &Path) -> Result<Self, CheckpointError> {
        let temporary = beside(target, "partial")?;
        let made = target.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| {
            remove(&temporary)?;
            fs::create_dir(&temporary)
        });
        made.map_err(|e| CheckpointError::new(target, format!("cannot be created: {e}")))?;
        Ok(FolderWriter { target: target.to_path_buf(), temporary, finished: false })
    }

    /// Writes the file `name` and brings it to disk; `write` fills it.
    ///
    /// # Errors
    /// If writing fails, as when the disk is full.
    pub fn write_file<E: From<CheckpointError>>(
        &self,
        name: &str,
        write: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>) -> Result<(), E>,
    ) -> Result<(), E> {
        // Errors name the file as it would be called, not the temporary one.
        let path = self.target.join(name);
        let cannot = |e: std::io::Error| CheckpointError::new(&path, format!("cannot be written: {e}"));
        let file = File::create(self.temporary.join(name)).map_err(cannot)?;
        let mut writer = BufWriter::with_capacity(BLOCK_BYTES, file);
        write(&mut |bytes| writer.write_all(bytes).map_err(cannot))?;
        let file = writer.into_inner().map_err(|e| cannot(e.into_error()))?;
        file.sync_all().map_err(cannot)?;
        Ok(())
    }

    /// Writes `config.json` and `model.safetensors`. `tensor` is asked for each parameter's elements once, in the
    /// order of [`ParameterLayout::parameters`], so that no more than one tensor is held at a time.
    ///
    /// # Errors
    /// Those of `tensor`, and if writing fails.
    ///
    /// # Panics
    /// If `tensor` returns another number of elements than the parameter has.
    pub fn write_model<'a, E: From<CheckpointError>>(
        &self,
        config: &ModelConfig,
        layout: &ParameterLayout,
        tensor: impl FnMut(&Parameter) -> Result<Cow<'a, [f32]>, E>,
    ) -> Result<(), E> {
        self.write_file("config.json", |write| write(config.to_json().as_bytes()).map_err(E::from))?;
        self.write_tensors("model.safetensors", layout, tensor)
    }

    /// Writes a safetensors file with a tensor for each parameter, under the parameter's key: weights, or what an
    /// optimizer keeps beside them. `tensor` is as for [`write_model`](Self::write_model).
    ///
    /// # Errors
    /// Those of `tensor`, and if writing fails.
    ///
    /// # Panics
    /// If `tensor` returns another number of elements than the parameter has.
    pub fn write_tensors<'a, E: From<CheckpointError>>(
        &self,
        name: &str,
        layout: &ParameterLayout,
        mut tensor: impl FnMut(&Parameter) -> Result<Cow<'a, [f32]>, E>,
    ) -> Result<(), E> {
        self.write_file(name, |write| {
            write(&header(layout.parameters()))?;
            let mut bytes = Vec::with_capacity(BLOCK_BYTES);
            for parameter in layout.parameters() {
                let values = tensor(parameter)?;
                assert_eq!(values.len(), parameter.elements(), "elements of `{}`", parameter.key);
                for block in values.chunks(BLOCK_BYTES / size_of::<f32>()) {
                    bytes.clear();
                    bytes.extend(block.iter().flat_map(|value| value.to_le_bytes()));
                    write(&bytes)?;
                }
            }
            Ok(())
        })
    }

    /// Gives the folder its name, in place of an older one.
    ///
    /// # Errors
    /// If it cannot be renamed.
    pub fn commit(mut self) -> Result<(), CheckpointError> {
        let old = beside(&self.target, "old")?;
        let renamed = (|| {
            sync_folder(&self.temporary)?;
            remove(&old)?;
            if self.target.exists() {
                fs::rename(&self.target, &old)?;
            }
            fs::rename(&self.temporary, &self.target)?;
            sync_folder(self.target.parent().unwrap_or(Path::new(".")))
        })();
        renamed.map_err(|e| CheckpointError::new(&self.target, format!("cannot be put in place: {e}")))?;
        self.finished = true;
        // The new folder is in place; an old one that cannot be removed does no harm.
        let _ = remove(&old);
        Ok(())
    }
}

impl Drop for FolderWriter {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// A hidden sibling of `target`.
fn beside(target: &Path, suffix: &str) -> Result<PathBuf, CheckpointError> {
    let name = target.file_name().ok_or_else(|| CheckpointError::new(target, "is no name for a folder"))?;
    Ok(target.with_file_name(format!(".{}.{suffix}", name.to_string_lossy())))
}

/// Removes a folder that may not exist.
fn remove(folder: &Path) -> std::io::Result<()> {
    if folder.exists() { fs::remove_dir_all(folder) } else { Ok(()) }
}

/// Brings a folder's entries to disk, where folders can be opened.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// Length and JSON of a safetensors header, padded so that the elements are aligned.
fn header(parameters: &[Parameter]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_string(), json!({ "format": "pt" }));
    let mut next = 0;
    for parameter in parameters {
        let end = next + parameter.elements() * size_of::<f32>();
        let entry = json!({ "dtype": "F32", "shape": parameter.shape, "data_offsets": [next, end] });
        entries.insert(parameter.key.clone(), entry);
        next = end;
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(&json);
    header
}
