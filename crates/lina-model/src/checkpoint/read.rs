//! Reading weights.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use super::CheckpointError;
use crate::params::{Buffer, Parameter, ParameterLayout, Parameters};

/// Bytes read at a time.
const BLOCK_BYTES: usize = 1 << 20;
/// safetensors' own limit.
const HEADER_LIMIT_BYTES: u64 = 100_000_000;

/// The weights of a folder, opened but not read.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: HashMap<String, Tensor>,
}

/// Where a tensor's elements are.
#[derive(Debug)]
struct Tensor {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    offset_bytes: u64,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens `folder` and reads the headers of its weight files.
    ///
    /// # Errors
    /// If there are no weights, a shard is missing, or a file is cut off or is no safetensors file.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let mut checkpoint = Checkpoint { folder: folder.to_path_buf(), files: Vec::new(), tensors: HashMap::new() };
        let whole = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        if whole.exists() {
            checkpoint.add_file(&whole)?;
        } else if index.exists() {
            checkpoint.add_shards(&index)?;
        } else {
            let message = "holds no weights, expected model.safetensors or model.safetensors.index.json";
            return Err(CheckpointError::new(folder, message));
        }
        Ok(checkpoint)
    }

    /// Opens one safetensors file with a tensor for each parameter, as [`FolderWriter::write_tensors`] makes it.
    ///
    /// # Errors
    /// If the file is missing, cut off or no safetensors file.
    ///
    /// [`FolderWriter::write_tensors`]: super::FolderWriter::write_tensors
    pub fn open_file(path: &Path) -> Result<Self, CheckpointError> {
        let mut checkpoint = Checkpoint { folder: path.to_path_buf(), files: Vec::new(), tensors: HashMap::new() };
        checkpoint.add_file(path)?;
        Ok(checkpoint)
    }

    /// Reads every parameter that this rank holds into `parameters`.
    ///
    /// # Errors
    /// If a tensor of the model is missing or has another shape, if the folder holds tensors that the model lacks, or
    /// if a tensor has a type other than F32, F16 and BF16 or an element that is no finite number.
    pub fn load(&self, layout: &ParameterLayout, parameters: &mut Parameters) -> Result<(), CheckpointError> {
        self.load_into(layout, &mut parameters.dense, &mut parameters.experts)
    }

    /// As [`load`](Self::load), into buffers `[dense_len]` and `[experts_len]` of `layout`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_into(
        &self,
        layout: &ParameterLayout,
        dense: &mut [f32],
        experts: &mut [f32],
    ) -> Result<(), CheckpointError> {
        self.check(layout)?;
        for parameter in layout.parameters() {
            match layout.place_range(&parameter.place) {
                Some((Buffer::Dense, range)) => self.read(parameter, &mut dense[range])?,
                Some((Buffer::Experts, range)) => self.read(parameter, &mut experts[range])?,
                None => {}
            }
        }
        Ok(())
    }

    fn add_shards(&mut self, index_path: &Path) -> Result<(), CheckpointError> {
        let error = |message: String| CheckpointError::new(index_path, message);
        let text = std::fs::read_to_string(index_path).map_err(|e| error(format!("cannot be read: {e}")))?;
        let index: Index = serde_json::from_str(&text).map_err(|e| error(format!("is no index of shards: {e}")))?;
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            if Path::new(name).file_name().is_none_or(|file| file != name.as_str()) {
                return Err(error(format!("names the shard `{name}`, expected a file of the same folder")));
            }
            self.add_file(&self.folder.join(name))?;
        }
        for (key, shard) in &index.weight_map {
            let place = self.tensors.get(key).map(|tensor| &self.files[tensor.file].0);
            if place.is_none_or(|path| !path.ends_with(shard)) {
                return Err(error(format!("places tensor `{key}` in {shard}, which does not hold it")));
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let error = |message: String| CheckpointError::new(path, message);
        let cannot = |e: std::io::Error| error(format!("cannot be read: {e}"));
        let mut file = File::open(path).map_err(cannot)?;
        let file_bytes = file.metadata().map_err(cannot)?.len();
        let mut prefix = [0u8; 8];
        if file_bytes < 8 {
            return Err(error(format!("has {file_bytes} bytes, expected a safetensors file, of at least 8")));
        }
        file.read_exact(&mut prefix).map_err(cannot)?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > HEADER_LIMIT_BYTES {
            return Err(error(format!("is no safetensors file: it claims a header of {header_bytes} bytes")));
        }
        if 8 + header_bytes > file_bytes {
            return Err(error(format!("is cut off: it has {file_bytes} bytes, its header alone {}", 8 + header_bytes)));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(cannot)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| error(format!("is no valid safetensors file: {e}")))?;
        let expected_bytes = 8 + header_bytes + metadata.data_len() as u64;
        if file_bytes != expected_bytes {
            let problem = if file_bytes < expected_bytes { "is cut off" } else { "is too long" };
            return Err(error(format!("{problem}: it has {file_bytes} bytes, its header says {expected_bytes}")));
        }
        let number = self.files.len();
        for (key, info) in metadata.tensors() {
            let tensor = Tensor {
                file: number,
                dtype: info.dtype,
                shape: info.shape.clone(),
                offset_bytes: 8 + header_bytes + info.data_offsets.0 as u64,
            };
            if self.tensors.insert(key.clone(), tensor).is_some() {
                return Err(error(format!("holds tensor `{key}`, which another shard holds too")));
            }
        }
        self.files.push((path.to_path_buf(), file));
        Ok(())
    }

    /// Names and shapes of all tensors, those of other ranks included, so that every rank finds the same fault.
    fn check(&self, layout: &ParameterLayout) -> Result<(), CheckpointError> {
        let mut expected = HashMap::with_capacity(layout.parameters().len());
        for parameter in layout.parameters() {
            let key = &parameter.key;
            let Some(tensor) = self.tensors.get(key) else {
                return Err(CheckpointError::new(
                    &self.folder,
                    format!("has no tensor `{key}`, expected one of shape {:?}", parameter.shape),
                ));
            };
            let error = |message| Err(CheckpointError::new(&self.files[tensor.file].0, message));
            if tensor.shape != parameter.shape {
                return error(format!(
                    "tensor `{key}` has shape {:?}, config.json says {:?}",
                    tensor.shape, parameter.shape
                ));
            }
            if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                return error(format!("tensor `{key}` has type {:?}, expected F32, F16 or BF16", tensor.dtype));
            }
            expected.insert(key.as_str(), ());
        }
        let tied = !expected.contains_key("lm_head.weight");
        let ignorable = |key: &str| key.ends_with("rotary_emb.inv_freq") || (tied && key == "lm_head.weight");
        let mut unknown: Vec<&String> =
            self.tensors.keys().filter(|key| !expected.contains_key(key.as_str()) && !ignorable(key)).collect();
        unknown.sort_unstable();
        match unknown.as_slice() {
            [] => Ok(()),
            [first, others @ ..] => {
                let more = if others.is_empty() { String::new() } else { format!(" and {} more", others.len()) };
                let path = &self.files[self.tensors[*first].file].0;
                let message = format!("holds tensor `{first}`{more}, which a model of its config.json does not have");
                Err(CheckpointError::new(path, message))
            }
        }
    }

    /// Reads one tensor, converted to `f32`.
    fn read(&self, parameter: &Parameter, values: &mut [f32]) -> Result<(), CheckpointError> {
        let key = &parameter.key;
        let tensor = &self.tensors[key];
        let (path, file) = &self.files[tensor.file];
        let cannot = |e: std::io::Error| CheckpointError::new(path, format!("tensor `{key}` cannot be read: {e}"));
        let mut file = file;
        file.seek(SeekFrom::Start(tensor.offset_bytes)).map_err(cannot)?;
        let element_bytes = if tensor.dtype == Dtype::F32 { 4 } else { 2 };
        let block = BLOCK_BYTES / element_bytes;
        let mut bytes = vec![0u8; block.min(values.len()) * element_bytes];
        for (number, part) in values.chunks_mut(block).enumerate() {
            let bytes = &mut bytes[..part.len() * element_bytes];
            file.read_exact(bytes).map_err(cannot)?;
            match tensor.dtype {
                Dtype::F16 => convert(bytes, part, |b| f16::from_le_bytes(b).to_f32()),
                Dtype::BF16 => convert(bytes, part, |b| bf16::from_le_bytes(b).to_f32()),
                _ => convert(bytes, part, f32::from_le_bytes),
            }
            if let Some(index) = part.iter().position(|value| !value.is_finite()) {
                let (value, element) = (part[index], number * block + index);
                let message = format!("tensor `{key}` has {value} at element {element}, expected finite numbers");
                return Err(CheckpointError::new(path, message));
            }
        }
        Ok(())
    }
}

fn convert<const N: usize>(bytes: &[u8], values: &mut [f32], to_f32: impl Fn([u8; N]) -> f32) {
    let (elements, rest) = bytes.as_chunks::<N>();
    debug_assert!(rest.is_empty());
    for (value, &element) in values.iter_mut().zip(elements) {
        *value = to_f32(element);
    }
}
