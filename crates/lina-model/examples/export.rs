//! Writes a small random model as a Hugging Face folder, with the logits that it should give, for
//! `scripts/check_transformers.py`:
//!
//! ```text
//! cargo run -p lina-model --example export -- qwen3_moe FOLDER
//! ```

use std::borrow::Cow;
use std::error::Error;
use std::path::Path;

use lina_comm::Comm;
use lina_kernels::Compute;
use lina_model::{
    Batch, CheckpointError, FolderWriter, Model, ModelConfig, ModelKind, ModelLimits, Purpose, Sizes, StepContext,
};
use lina_plan::ExpertLayout;
use safetensors::tensor::{Dtype, TensorView};

const ROWS: usize = 2;
const LENGTH: usize = 40;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, folder] = arguments.as_slice() else { return Err("usage: export KIND FOLDER".into()) };
    let mut model = random_model(kind)?;
    let writer = FolderWriter::create(Path::new(folder))?;
    let (config, layout, parameters) = (model.config(), model.layout(), model.parameters());
    writer.write_model(config, layout, |parameter| {
        let values = parameters.get(layout, &parameter.place).expect("one rank holds every expert");
        Ok::<_, CheckpointError>(Cow::Borrowed(values))
    })?;

    let vocab = model.config().vocab;
    let ids: Vec<u32> = (0..(ROWS * LENGTH) as u32).map(|i| (i * i + 7 * i + 3) % vocab as u32).collect();
    let batch = Batch { input: &ids, target: &vec![u32::MAX; ids.len()], sequences: &[LENGTH; ROWS] };
    model.forward(&mut Comm::solo(), batch, StepContext::evaluation())?;
    let logits = model.logits().ok_or("logits of an evaluation")?;
    let ids: Vec<u8> = ids.iter().flat_map(|id| i64::from(*id).to_le_bytes()).collect();
    let logits: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
    let expected = safetensors::serialize(
        [
            ("input_ids", TensorView::new(Dtype::I64, vec![ROWS, LENGTH], &ids)?),
            ("logits", TensorView::new(Dtype::F32, vec![ROWS, LENGTH, vocab], &logits)?),
        ],
        None,
    )?;
    writer.write_file("expected.safetensors", |write| write(&expected))?;
    writer.commit()?;
    Ok(())
}

fn random_model(kind: &str) -> Result<Model, Box<dyn Error>> {
    let sizes = Sizes { vocab: 96, hidden: 48, layers: 4, heads: 4, experts: 6, top_k: 2, expert_hidden: 40 };
    let mut config = match kind {
        "mixtral" => {
            let mut config = ModelConfig::family(ModelKind::Mixtral, sizes);
            (config.kv_heads, config.sliding_window) = (2, Some(11));
            config
        }
        "qwen3_moe" => {
            let mut config = ModelConfig::family(ModelKind::Qwen3Moe, sizes);
            (config.kv_heads, config.head_dim) = (1, 20);
            (config.dense_layers, config.dense_hidden) = (vec![0, 2], 56);
            config
        }
        "olmoe" => {
            let mut config = ModelConfig::family(ModelKind::Olmoe, sizes);
            (config.clip_qkv, config.tied_embeddings) = (Some(0.7), true);
            config
        }
        "lina_moe" => ModelConfig::family(ModelKind::LinaMoe, sizes),
        other => return Err(format!("kind is {other}, expected mixtral, qwen3_moe, olmoe or lina_moe").into()),
    };
    config.initializer_range = 0.15;
    let layout = ExpertLayout::new(config.experts, 1, None)?;
    let limits = ModelLimits { max_tokens: ROWS * LENGTH, max_sequence_tokens: LENGTH, max_expert_rows: None };
    let mut model = Model::new(Purpose::Training, config, layout, 0, Compute::new(1), limits)?;
    let (_, layout, parameters) = model.for_update();
    parameters.initialise(layout, 11);
    Ok(model)
}
