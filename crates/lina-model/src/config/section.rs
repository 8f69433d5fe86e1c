//! The `[model]` section of a training configuration.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{AuxLoss, ConfigError, FfnKind, ModelConfig, ModelKind, PositionKind, RouterConfig, Sizes};

/// Activation of two-matrix experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// Rectified linear unit.
    Relu,
    /// GPT-2's tanh form of GELU.
    Gelu,
}

/// Shapes of the paper's models. Their attention is plain causal self-attention with learned positions: what the
/// paper measures is their size, not Transformer-XL's recurrence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Preset {
    /// 12 layers of width 768, 12 heads, experts of 3072, top-2.
    #[serde(rename = "gpt2-moe")]
    Gpt2Moe,
    /// 24 layers of width 1024, 16 heads, experts of 4096, top-2.
    #[serde(rename = "transformer-xl-moe")]
    TransformerXlMoe,
}

/// What a user writes: a `kind` with sizes, or a `preset` with a number of experts, or the `path` of a Hugging Face
/// folder. Router settings go with all three.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "documented on ModelConfig, under the same names")]
pub struct ModelSection {
    pub kind: Option<ModelKind>,
    pub preset: Option<Preset>,
    /// Hugging Face folder, relative to the current directory.
    pub path: Option<PathBuf>,
    /// 256 by default: token ids are bytes.
    pub vocab: Option<usize>,
    pub hidden: Option<usize>,
    pub layers: Option<usize>,
    pub heads: Option<usize>,
    pub kv_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub experts: Option<usize>,
    pub top_k: Option<usize>,
    pub expert_hidden: Option<usize>,
    /// `relu` or `gelu`, of kind `lina_moe`.
    pub activation: Option<Activation>,
    pub dense_layers: Option<Vec<usize>>,
    pub dense_hidden: Option<usize>,
    pub max_positions: Option<usize>,
    pub rope_theta: Option<f32>,
    pub norm_epsilon: Option<f32>,
    pub renormalise: Option<bool>,
    pub tied_embeddings: Option<bool>,
    pub clip_qkv: Option<f32>,
    pub sliding_window: Option<usize>,
    pub initializer_range: Option<f32>,
    pub aux_loss: Option<AuxLoss>,
    pub aux_loss_coefficient: Option<f32>,
    pub z_loss_coefficient: Option<f32>,
    pub jitter: Option<f32>,
    pub capacity_factor: Option<f32>,
}

impl ModelSection {
    /// The folder to load weights from, if the section names one. `base` is the folder of the configuration file.
    pub fn folder(&self, base: &Path) -> Option<PathBuf> {
        self.path.as_ref().map(|path| base.join(path))
    }

    /// The model that the section describes. `base` is the folder of the configuration file, `place` what to call
    /// the section in errors, such as `train.toml: [model]`.
    ///
    /// # Errors
    /// If sizes are missing or impossible, or settings contradict each other.
    pub fn resolve(&self, base: &Path, place: &str) -> Result<ModelConfig, ConfigError> {
        let one_of_three = |found: &str| Err(format!("{found}, expected exactly one of `kind`, `preset` and `path`"));
        let mut config = match (self.kind, self.preset, self.folder(base)) {
            (Some(kind), None, None) => self.with_kind(kind),
            (None, Some(preset), None) => self.with_preset(preset),
            (None, None, Some(folder)) => {
                let config = ModelConfig::from_folder(&folder)?;
                self.refuse_sizes().map(|()| config)
            }
            (None, None, None) => one_of_three("says no model"),
            _ => one_of_three("says the model more than once"),
        }
        .map_err(|message| ConfigError { place: place.to_string(), message })?;
        self.set_router(&mut config.router);
        config.validate(place)?;
        Ok(config)
    }

    fn with_kind(&self, kind: ModelKind) -> Result<ModelConfig, String> {
        let need = |key: &str, value: Option<usize>| {
            value.ok_or_else(|| format!("`{key}` is missing, expected a size for kind {kind}"))
        };
        let config = ModelConfig::family(
            kind,
            Sizes {
                vocab: self.vocab.unwrap_or(256),
                hidden: need("hidden", self.hidden)?,
                layers: need("layers", self.layers)?,
                heads: need("heads", self.heads)?,
                experts: need("experts", self.experts)?,
                top_k: self.top_k.unwrap_or(2),
                expert_hidden: need("expert_hidden", self.expert_hidden)?,
            },
        );
        self.set_switches(config)
    }

    fn with_preset(&self, preset: Preset) -> Result<ModelConfig, String> {
        let experts = match self.experts {
            Some(experts @ (2 | 4 | 8 | 16)) => experts,
            found => {
                let found = found.map_or("missing".to_string(), |n| n.to_string());
                return Err(format!("`experts` is {found}, expected 2, 4, 8 or 16 for a preset"));
            }
        };
        let (name, layers, hidden, heads, expert_hidden) = match preset {
            Preset::Gpt2Moe => ("gpt2-moe", 12, 768, 12, 3072),
            Preset::TransformerXlMoe => ("transformer-xl-moe", 24, 1024, 16, 4096),
        };
        let fixed = [
            ("hidden", self.hidden.is_some()),
            ("layers", self.layers.is_some()),
            ("heads", self.heads.is_some()),
            ("kv_heads", self.kv_heads.is_some()),
            ("head_dim", self.head_dim.is_some()),
            ("expert_hidden", self.expert_hidden.is_some()),
        ];
        if let Some((key, _)) = fixed.iter().find(|(_, set)| *set) {
            return Err(format!("`{key}` is set, but preset {name} sets it; use `kind` for other sizes"));
        }
        let config = ModelConfig::family(
            ModelKind::LinaMoe,
            Sizes {
                vocab: self.vocab.unwrap_or(256),
                hidden,
                layers,
                heads,
                experts,
                top_k: self.top_k.unwrap_or(2),
                expert_hidden,
            },
        );
        self.set_switches(config)
    }

    /// Everything of the section that is neither one of the [`Sizes`] nor a router setting.
    fn set_switches(&self, mut config: ModelConfig) -> Result<ModelConfig, String> {
        if let Some(kv_heads) = self.kv_heads {
            config.kv_heads = kv_heads;
        }
        match self.head_dim {
            Some(head_dim) => config.head_dim = head_dim,
            None if config.heads == 0 => return Err("`heads` is 0, expected at least 1".to_string()),
            None if !config.hidden.is_multiple_of(config.heads) => {
                return Err(format!("`hidden` is {}, expected a multiple of heads = {}", config.hidden, config.heads));
            }
            None => {}
        }
        match (config.kind, self.activation) {
            (_, None) => {}
            (ModelKind::LinaMoe, Some(Activation::Relu)) => config.ffn = FfnKind::Relu,
            (ModelKind::LinaMoe, Some(Activation::Gelu)) => config.ffn = FfnKind::Gelu,
            (kind, Some(_)) => return Err(format!("`activation` is set, but experts of kind {kind} are SwiGLU")),
        }
        match (&mut config.position, self.rope_theta) {
            (_, None) => {}
            (PositionKind::Rotary { theta }, Some(value)) => *theta = value,
            (PositionKind::Learned, Some(_)) => {
                return Err(format!("`rope_theta` is set, but positions of kind {} are learned", config.kind));
            }
        }
        if let Some(layers) = &self.dense_layers {
            config.dense_layers.clone_from(layers);
        }
        let fields = &mut config;
        set(&mut fields.dense_hidden, self.dense_hidden);
        set(&mut fields.max_positions, self.max_positions);
        set(&mut fields.norm_epsilon, self.norm_epsilon);
        set(&mut fields.renormalise, self.renormalise);
        set(&mut fields.tied_embeddings, self.tied_embeddings);
        set(&mut fields.initializer_range, self.initializer_range);
        config.clip_qkv = self.clip_qkv;
        config.sliding_window = self.sliding_window;
        Ok(config)
    }

    fn set_router(&self, router: &mut RouterConfig) {
        set(&mut router.aux_loss, self.aux_loss);
        set(&mut router.aux_loss_coefficient, self.aux_loss_coefficient);
        set(&mut router.z_loss_coefficient, self.z_loss_coefficient);
        set(&mut router.jitter, self.jitter);
        if self.capacity_factor.is_some() {
            router.capacity_factor = self.capacity_factor;
        }
    }

    /// With a folder, its `config.json` alone says what the model is.
    fn refuse_sizes(&self) -> Result<(), String> {
        let routers_only = ModelSection {
            path: self.path.clone(),
            aux_loss: self.aux_loss,
            aux_loss_coefficient: self.aux_loss_coefficient,
            z_loss_coefficient: self.z_loss_coefficient,
            jitter: self.jitter,
            capacity_factor: self.capacity_factor,
            ..ModelSection::default()
        };
        if *self == routers_only {
            return Ok(());
        }
        Err("with `path`, sizes come from its config.json: expected only router settings (aux_loss, \
             aux_loss_coefficient, z_loss_coefficient, jitter, capacity_factor) beside it"
            .to_string())
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(toml: &str) -> Result<ModelConfig, String> {
        let section: ModelSection = toml::from_str(toml).map_err(|error| error.message().to_string())?;
        section.resolve(Path::new("."), "train.toml: [model]").map_err(|error| error.to_string())
    }

    const SIZES: &str = "hidden = 32\nlayers = 2\nheads = 4\nexperts = 4\nexpert_hidden = 16\n";

    #[test]
    fn kinds_and_presets_resolve() {
        let config = resolve(&format!("kind = \"qwen3_moe\"\n{SIZES}head_dim = 16\ndense_layers = [1]")).unwrap();
        assert_eq!((config.head_dim, config.moe_layers(), config.vocab), (16, 1, 256));
        let config = resolve("preset = \"transformer-xl-moe\"\nexperts = 16\nactivation = \"relu\"").unwrap();
        assert_eq!((config.layers, config.hidden, config.expert_hidden), (24, 1024, 4096));
        assert_eq!((config.top_k, config.ffn), (2, FfnKind::Relu));
    }

    #[test]
    fn every_refusal_names_key_found_and_expected() {
        let kind = format!("kind = \"olmoe\"\n{SIZES}");
        let cases = [
            (String::new(), "says no model, expected exactly one of `kind`, `preset` and `path`"),
            ("kind = \"olmoe\"".to_string(), "`hidden` is missing, expected a size for kind olmoe"),
            (format!("{kind}top_k = 5"), "`top_k` is 5, expected at most experts = 4"),
            (format!("{kind}kv_heads = 3"), "`heads` is 4, expected a multiple of kv_heads = 3"),
            (format!("{kind}activation = \"relu\""), "`activation` is set, but experts of kind olmoe are SwiGLU"),
            (format!("{kind}jitter = 1.5"), "`jitter` is 1.5, expected a number from 0 and below 1"),
            (format!("{kind}capacity_factor = 0.0"), "`capacity_factor` is 0, expected a positive number"),
            (format!("{kind}dense_layers = [0]"), "`dense_layers` is set, but models of kind olmoe do not have it"),
            ("preset = \"gpt2-moe\"\nexperts = 3".to_string(), "`experts` is 3, expected 2, 4, 8 or 16 for a preset"),
            (
                "preset = \"gpt2-moe\"\nexperts = 2\nhidden = 8".to_string(),
                "`hidden` is set, but preset gpt2-moe sets it; use `kind` for other sizes",
            ),
        ];
        for (toml, message) in cases {
            assert_eq!(resolve(&toml).unwrap_err(), format!("train.toml: [model]: {message}"));
        }
        assert!(resolve("kinds = 1").unwrap_err().starts_with("unknown field `kinds`"));
    }

    #[test]
    fn a_folder_says_what_the_model_is_and_the_section_how_it_trains() {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let resolve = |toml: &str| {
            let section: ModelSection = toml::from_str(toml).unwrap();
            section.resolve(&base, "train.toml: [model]").map_err(|error| error.to_string())
        };
        let config = resolve("path = \"hf/olmoe\"\naux_loss = \"none\"\ncapacity_factor = 1.5").unwrap();
        assert_eq!((config.experts, config.router.aux_loss), (16, AuxLoss::None));
        assert_eq!(config.router.capacity_factor, Some(1.5));
        assert_eq!(
            resolve("path = \"hf/olmoe\"\nexperts = 8").unwrap_err(),
            "train.toml: [model]: with `path`, sizes come from its config.json: expected only router settings \
             (aux_loss, aux_loss_coefficient, z_loss_coefficient, jitter, capacity_factor) beside it"
        );
        assert!(resolve("path = \"hf\"").unwrap_err().contains("hf/config.json: cannot be read: "));
    }
}
