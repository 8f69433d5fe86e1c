//! Folders: what is written reads back bit for bit, and every fault is one sentence that names file and tensor.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lina_model::{
    Checkpoint, CheckpointError, FolderWriter, ModelConfig, ModelKind, ParameterLayout, Parameters, Sizes,
};
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

fn config(kind: ModelKind) -> ModelConfig {
    let sizes = Sizes { vocab: 20, hidden: 8, layers: 2, heads: 2, experts: 3, top_k: 1, expert_hidden: 6 };
    ModelConfig::family(kind, sizes)
}

fn random(config: &ModelConfig, held: &[usize]) -> (ParameterLayout, Parameters) {
    let layout = ParameterLayout::new(config, held);
    let mut parameters = Parameters::zeros(&layout);
    parameters.initialise(&layout, 3);
    (layout, parameters)
}

fn write(folder: &Path, config: &ModelConfig, layout: &ParameterLayout, parameters: &Parameters) {
    let writer = FolderWriter::create(folder).unwrap();
    writer
        .write_model(config, layout, |parameter| {
            Ok::<_, CheckpointError>(Cow::Borrowed(parameters.get(layout, &parameter.place).unwrap()))
        })
        .unwrap();
    writer.commit().unwrap();
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_written_reads_back_bit_for_bit_on_any_rank() {
    for kind in [ModelKind::Mixtral, ModelKind::Qwen3Moe, ModelKind::Olmoe, ModelKind::LinaMoe] {
        let root = TempDir::new().unwrap();
        let folder = root.path().join("made/checkpoint-1");
        let mut config = config(kind);
        config.tied_embeddings = kind == ModelKind::Olmoe;
        let (layout, parameters) = random(&config, &[0, 1, 2]);
        write(&folder, &config, &layout, &parameters);
        // Again: an older folder of that name is replaced.
        write(&folder, &config, &layout, &parameters);
        assert_eq!(names(folder.parent().unwrap()), ["checkpoint-1"]);
        assert_eq!(names(&folder), ["config.json", "model.safetensors"]);
        assert_eq!(ModelConfig::from_folder(&folder).unwrap(), config);

        let checkpoint = Checkpoint::open(&folder).unwrap();
        for held in [vec![0, 1, 2], vec![1], vec![0, 2]] {
            let (layout, expected) = random(&config, &held);
            let mut loaded = Parameters::zeros(&layout);
            checkpoint.load(&layout, &mut loaded).unwrap();
            assert_eq!(loaded.dense, expected.dense);
            assert_eq!(loaded.experts, expected.experts);
        }
    }
}

#[test]
fn a_folder_that_is_not_finished_leaves_nothing_behind() {
    let root = TempDir::new().unwrap();
    let folder = root.path().join("checkpoint");
    let config = config(ModelKind::Mixtral);
    let (layout, _) = random(&config, &[0, 1, 2]);
    let writer = FolderWriter::create(&folder).unwrap();
    let error = writer.write_model(&config, &layout, |parameter| {
        let (path, message) = (parameter.key.clone(), "cannot be gathered".to_string());
        Err(CheckpointError { path, message })
    });
    assert_eq!(error.unwrap_err().to_string(), "lm_head.weight: cannot be gathered");
    drop(writer);
    assert!(names(root.path()).is_empty());

    fs::write(root.path().join("file"), "").unwrap();
    let error = FolderWriter::create(&root.path().join("file/checkpoint")).unwrap_err();
    assert!(error.to_string().contains("file/checkpoint: cannot be created: "), "{error}");
}

/// A full disk: writing to `/dev/full` always fails.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_with_the_files_name() {
    let root = TempDir::new().unwrap();
    let folder = root.path().join("checkpoint");
    let writer = FolderWriter::create(&folder).unwrap();
    std::os::unix::fs::symlink("/dev/full", root.path().join(".checkpoint.partial/model.safetensors")).unwrap();
    let config = config(ModelKind::Mixtral);
    let (layout, parameters) = random(&config, &[0, 1, 2]);
    let error = writer
        .write_model(&config, &layout, |parameter| {
            Ok::<_, CheckpointError>(Cow::Borrowed(parameters.get(&layout, &parameter.place).unwrap()))
        })
        .unwrap_err();
    assert_eq!(error.path, folder.join("model.safetensors").display().to_string());
    assert!(error.message.starts_with("cannot be written: No space left on device"), "{error}");
    drop(writer);
    assert!(names(root.path()).is_empty());
}

/// Tensors of a good model, to be spoilt: type, shape and bytes by name.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn good_tensors(config: &ModelConfig) -> Tensors {
    let (layout, parameters) = random(config, &[0, 1, 2]);
    let tensor = |parameter: &lina_model::Parameter| {
        let values = parameters.get(&layout, &parameter.place).unwrap();
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        (parameter.key.clone(), (Dtype::F32, parameter.shape.clone(), bytes))
    };
    layout.parameters().iter().map(tensor).collect()
}

fn serialize(tensors: &Tensors) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// What is said against a folder that holds `files`, with its path taken off.
fn complaint(config: &ModelConfig, files: &[(&str, &[u8])]) -> String {
    let root = TempDir::new().unwrap();
    for (name, bytes) in files {
        fs::write(root.path().join(name), bytes).unwrap();
    }
    let (layout, mut parameters) = random(config, &[1]);
    let result = Checkpoint::open(root.path()).and_then(|checkpoint| checkpoint.load(&layout, &mut parameters));
    let message = result.map_or_else(|error| error.to_string(), |()| "loads".to_string());
    message.replace(&format!("{}", root.path().display()), "DIR")
}

#[test]
fn every_fault_of_a_file_is_one_sentence() {
    let config = config(ModelKind::Mixtral);
    let good = good_tensors(&config);
    let check = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        complaint(&config, &[("model.safetensors", &serialize(&tensors))])
    };
    let gate = "model.layers.1.block_sparse_moe.gate.weight";
    assert_eq!(check(&|_| ()), "loads");
    assert_eq!(
        check(&|tensors| {
            tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (Dtype::F32, vec![1], vec![0; 4]));
        }),
        "loads"
    );
    assert_eq!(
        check(&|tensors| drop(tensors.remove(gate))),
        format!("DIR: has no tensor `{gate}`, expected one of shape [3, 8]")
    );
    assert_eq!(
        check(&|tensors| tensors.get_mut(gate).unwrap().1 = vec![8, 3]),
        format!("DIR/model.safetensors: tensor `{gate}` has shape [8, 3], config.json says [3, 8]")
    );
    assert_eq!(
        check(&|tensors| tensors.get_mut(gate).unwrap().0 = Dtype::I32),
        format!("DIR/model.safetensors: tensor `{gate}` has type I32, expected F32, F16 or BF16")
    );
    assert_eq!(
        check(&|tensors| tensors.get_mut(gate).unwrap().2[40..44].copy_from_slice(&f32::NAN.to_le_bytes())),
        format!("DIR/model.safetensors: tensor `{gate}` has NaN at element 10, expected finite numbers")
    );
    assert_eq!(
        check(&|tensors| {
            tensors.insert("model.extra".into(), (Dtype::F32, vec![1], vec![0; 4]));
            tensors.insert("model.more".into(), (Dtype::F32, vec![1], vec![0; 4]));
        }),
        "DIR/model.safetensors: holds tensor `model.extra` and 1 more, which a model of its config.json does not have"
    );

    let bytes = serialize(&good);
    let whole = |bytes: &[u8]| complaint(&config, &[("model.safetensors", bytes)]);
    let length = bytes.len();
    let message = format!("DIR/model.safetensors: is cut off: it has {} bytes, its header says {length}", length - 3);
    assert_eq!(whole(&bytes[..length - 3]), message);
    assert!(whole(&bytes[..100]).starts_with("DIR/model.safetensors: is cut off: it has 100 bytes, its header alone "));
    assert_eq!(whole(&bytes[..5]), "DIR/model.safetensors: has 5 bytes, expected a safetensors file, of at least 8");
    assert!(whole(&[255; 64]).starts_with("DIR/model.safetensors: is no safetensors file: it claims a header of "));
    let mut garbled = bytes.clone();
    garbled[9] = b'?';
    assert!(whole(&garbled).starts_with("DIR/model.safetensors: is no valid safetensors file: "));
    assert_eq!(
        complaint(&config, &[]),
        "DIR: holds no weights, expected model.safetensors or model.safetensors.index.json"
    );
}

#[test]
fn faults_of_shards_name_the_index_or_the_shard() {
    let config = config(ModelKind::Mixtral);
    let mut first = good_tensors(&config);
    let second = first.split_off("model.layers.1");
    let shards = [serialize(&first), serialize(&second)];
    let index = |first_name: &str| {
        let names = first.keys().map(|key| (key, first_name)).chain(second.keys().map(|key| (key, "2.safetensors")));
        let map: BTreeMap<_, _> = names.collect();
        serde_json::json!({ "metadata": {}, "weight_map": map }).to_string()
    };
    let check = |index: &str| {
        let files = [
            ("model.safetensors.index.json", index.as_bytes()),
            ("1.safetensors", &shards[0]),
            ("2.safetensors", &shards[1]),
        ];
        complaint(&config, &files)
    };
    assert_eq!(check(&index("1.safetensors")), "loads");
    assert!(check(&index("3.safetensors")).starts_with("DIR/3.safetensors: cannot be read: "));
    assert_eq!(
        check(&index("../1.safetensors")),
        "DIR/model.safetensors.index.json: names the shard `../1.safetensors`, expected a file of the same folder"
    );
    assert_eq!(
        check(&index("2.safetensors")),
        "DIR/model.safetensors.index.json: places tensor `lm_head.weight` in 2.safetensors, which does not hold it"
    );
    assert!(check("[]").starts_with("DIR/model.safetensors.index.json: is no index of shards: "));
}

#[test]
fn half_precision_is_widened() {
    let config = config(ModelKind::Mixtral);
    let mut tensors = good_tensors(&config);
    let narrow = |bytes: &[u8]| -> Vec<u8> { bytes.as_chunks::<4>().0.iter().flat_map(|b| [b[2], b[3]]).collect() };
    for (dtype, _, bytes) in tensors.values_mut() {
        (*dtype, *bytes) = (Dtype::BF16, narrow(bytes));
    }
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("model.safetensors"), serialize(&tensors)).unwrap();
    let (layout, expected) = random(&config, &[0, 1, 2]);
    let mut loaded = Parameters::zeros(&layout);
    Checkpoint::open(root.path()).unwrap().load(&layout, &mut loaded).unwrap();
    for (found, expected) in loaded.dense.iter().zip(&expected.dense) {
        assert_eq!(found.to_bits(), expected.to_bits() & 0xffff_0000);
    }
}
