//! `config.json` of a Hugging Face folder, in both spellings that transformers 4 and 5 write.
//!
//! A key that is absent has the default of the family's configuration class in transformers. A key whose setting this
//! crate does not compute (attention biases, scaled rotary positions, ...) is refused rather than ignored. Settings that
//! act only while transformers trains (dropout, its jitter, whether router losses are reported) are ignored.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{AuxLoss, ConfigError, FfnKind, MAX_LAYERS, ModelConfig, ModelKind, PositionKind, Sizes, SpecialTokens};

impl ModelConfig {
    /// Reads `config.json` in `folder`.
    ///
    /// # Errors
    /// If it cannot be read, a size is missing or impossible, or a setting is not supported.
    pub fn from_folder(folder: &Path) -> Result<Self, ConfigError> {
        let path = folder.join("config.json");
        let place = path.display().to_string();
        let text = std::fs::read_to_string(&path)
            .map_err(|error| ConfigError { place: place.clone(), message: format!("cannot be read: {error}") })?;
        Self::from_json(&text, &place)
    }

    /// Reads the text of a `config.json`; `place` is the file to name in errors.
    ///
    /// # Errors
    /// As [`from_folder`](Self::from_folder).
    pub fn from_json(text: &str, place: &str) -> Result<Self, ConfigError> {
        let checked = read(text).and_then(|config| {
            config.check().map_err(|message| in_their_words(config.kind, message))?;
            Ok(config)
        });
        checked.map_err(|message| ConfigError { place: place.to_string(), message })
    }

    /// The text of a `config.json` that transformers 4 and 5 load (or, for `lina_moe`, that this crate loads).
    pub fn to_json(&self) -> String {
        let mut json = json!({
            "architectures": [match self.kind {
                ModelKind::Mixtral => "MixtralForCausalLM",
                ModelKind::Qwen3Moe => "Qwen3MoeForCausalLM",
                ModelKind::Olmoe => "OlmoeForCausalLM",
                ModelKind::LinaMoe => "LinaMoeForCausalLM",
            }],
            "model_type": self.kind.name(),
            "dtype": "float32",
            "torch_dtype": "float32",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
            "num_experts_per_tok": self.top_k,
            "hidden_act": match self.ffn {
                FfnKind::SwiGlu => "silu",
                FfnKind::Relu => "relu",
                FfnKind::Gelu => "gelu_new",
            },
            "attention_dropout": 0.0,
            "initializer_range": decimal(self.initializer_range),
            "tie_word_embeddings": self.tied_embeddings,
            "router_aux_loss_coef": match self.router.aux_loss {
                AuxLoss::None => 0.0,
                AuxLoss::Switch | AuxLoss::Gshard => decimal(self.router.aux_loss_coefficient),
            },
            "output_router_logits": false,
            "use_cache": true,
            "bos_token_id": self.special_tokens.begin,
            "eos_token_id": match self.special_tokens.end.as_slice() {
                [] => Value::Null,
                [one] => json!(one),
                several => json!(several),
            },
            "pad_token_id": self.special_tokens.padding,
        });
        let epsilon = if self.kind == ModelKind::LinaMoe { "layer_norm_eps" } else { "rms_norm_eps" };
        json[epsilon] = json!(decimal(self.norm_epsilon));
        if let PositionKind::Rotary { theta } = self.position {
            json["rope_theta"] = json!(decimal(theta));
            json["rope_parameters"] = json!({ "rope_type": "default", "rope_theta": decimal(theta) });
        }
        let experts = if self.kind == ModelKind::Mixtral { "num_local_experts" } else { "num_experts" };
        json[experts] = json!(self.experts);
        if self.kind != ModelKind::Olmoe {
            json["head_dim"] = json!(self.head_dim);
            json["sliding_window"] = json!(self.sliding_window);
        }
        if self.kind != ModelKind::Mixtral {
            json["norm_topk_prob"] = json!(self.renormalise);
            json["attention_bias"] = json!(false);
        }
        match self.kind {
            ModelKind::Mixtral | ModelKind::Olmoe => json["intermediate_size"] = json!(self.expert_hidden),
            ModelKind::Qwen3Moe | ModelKind::LinaMoe => {
                json["intermediate_size"] = json!(self.dense_hidden);
                json["moe_intermediate_size"] = json!(self.expert_hidden);
                json["mlp_only_layers"] = json!(self.dense_layers);
                json["decoder_sparse_step"] = json!(1);
            }
        }
        if self.kind == ModelKind::Qwen3Moe {
            json["use_sliding_window"] = json!(self.sliding_window.is_some());
        }
        if matches!(self.kind, ModelKind::Olmoe | ModelKind::LinaMoe) {
            json["clip_qkv"] = json!(self.clip_qkv.map(decimal));
        }
        format!("{json:#}\n")
    }
}

/// A complaint about our key as one about the key that the file has.
fn in_their_words(kind: ModelKind, message: String) -> String {
    let expert_hidden = match kind {
        ModelKind::Mixtral | ModelKind::Olmoe => "intermediate_size",
        ModelKind::Qwen3Moe | ModelKind::LinaMoe => "moe_intermediate_size",
    };
    let names = [
        ("vocab", "vocab_size"),
        ("hidden", "hidden_size"),
        ("layers", "num_hidden_layers"),
        ("heads", "num_attention_heads"),
        ("kv_heads", "num_key_value_heads"),
        ("experts", "num_experts"),
        ("top_k", "num_experts_per_tok"),
        ("expert_hidden", expert_hidden),
        ("dense_hidden", "intermediate_size"),
        ("max_positions", "max_position_embeddings"),
        ("norm_epsilon", if kind == ModelKind::LinaMoe { "layer_norm_eps" } else { "rms_norm_eps" }),
        ("aux_loss_coefficient", "router_aux_loss_coef"),
    ];
    names.iter().fold(message, |message, (ours, theirs)| {
        message
            .replace(&format!("`{ours}`"), &format!("`{theirs}`"))
            .replace(&format!(" {ours} = "), &format!(" {theirs} = "))
    })
}

/// The shortest decimal that reads back as the same `f32`.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().expect("a finite f32 prints as a number")
}

fn read(text: &str) -> Result<ModelConfig, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| format!("is not valid JSON: {error}"))?;
    let Value::Object(map) = value else {
        return Err("holds no JSON object, expected a model's configuration".to_string());
    };
    let keys = Keys(&map);
    let kind = match keys.text("model_type")? {
        Some("mixtral") => ModelKind::Mixtral,
        Some("qwen3_moe") => ModelKind::Qwen3Moe,
        Some("olmoe") => ModelKind::Olmoe,
        Some("lina_moe") => ModelKind::LinaMoe,
        found => {
            let found = found.map_or("missing".to_string(), |kind| format!("\"{kind}\""));
            return Err(format!("`model_type` is {found}, expected mixtral, qwen3_moe, olmoe or lina_moe"));
        }
    };
    refuse_unsupported(&keys, kind)?;

    let own_expert_size = matches!(kind, ModelKind::Qwen3Moe | ModelKind::LinaMoe);
    let mut config = ModelConfig::family(
        kind,
        Sizes {
            vocab: keys.size(&["vocab_size"])?,
            hidden: keys.size(&["hidden_size"])?,
            layers: keys.size(&["num_hidden_layers"])?,
            heads: keys.size(&["num_attention_heads"])?,
            experts: keys.size(&["num_local_experts", "num_experts"])?,
            top_k: keys.size(&["num_experts_per_tok"])?,
            expert_hidden: keys.size(&[if own_expert_size { "moe_intermediate_size" } else { "intermediate_size" }])?,
        },
    );
    if let Some(kv_heads) = keys.optional_size("num_key_value_heads")? {
        config.kv_heads = kv_heads;
    }
    match keys.optional_size("head_dim")? {
        Some(head_dim) => config.head_dim = head_dim,
        None if config.heads == 0 || !config.hidden.is_multiple_of(config.heads) => {
            return Err(format!(
                "`hidden_size` is {}, expected a multiple of num_attention_heads = {}",
                config.hidden, config.heads
            ));
        }
        None => {}
    }
    if let Some(max_positions) = keys.optional_size("max_position_embeddings")? {
        config.max_positions = max_positions;
    }
    let epsilon = if kind == ModelKind::LinaMoe { "layer_norm_eps" } else { "rms_norm_eps" };
    if let Some(value) = keys.number(epsilon)? {
        config.norm_epsilon = value;
    }
    if let PositionKind::Rotary { theta } = &mut config.position
        && let Some(value) = rope_theta(&keys)?
    {
        *theta = value;
    }
    if kind != ModelKind::Mixtral {
        config.renormalise = keys.flag("norm_topk_prob")?.unwrap_or(kind == ModelKind::LinaMoe);
    }
    config.tied_embeddings = keys.flag("tie_word_embeddings")?.unwrap_or(false);
    config.clip_qkv = keys.number("clip_qkv")?;
    let window_is_used = kind != ModelKind::Qwen3Moe || keys.flag("use_sliding_window")? == Some(true);
    if window_is_used {
        config.sliding_window = keys.optional_size("sliding_window")?;
    }
    if let Some(value) = keys.number("initializer_range")? {
        config.initializer_range = value;
    }
    if let Some(value) = keys.number("router_aux_loss_coef")? {
        config.router.aux_loss_coefficient = value;
    }
    config.special_tokens = special_tokens(&keys, kind)?;
    if own_expert_size {
        config.dense_layers = dense_layers(&keys, config.layers)?;
        match keys.optional_size("intermediate_size")? {
            Some(value) => config.dense_hidden = value,
            None if config.dense_layers.is_empty() => {}
            None => return Err("`intermediate_size` is missing, expected the dense layers' hidden width".to_string()),
        }
    }
    config.ffn = match (kind, keys.text("hidden_act")?) {
        (ModelKind::LinaMoe, Some("relu")) => FfnKind::Relu,
        (ModelKind::LinaMoe, Some("gelu_new")) => FfnKind::Gelu,
        (ModelKind::LinaMoe, found) => {
            return Err(format!("`hidden_act` is \"{}\", expected relu or gelu_new", found.unwrap_or("missing")));
        }
        (_, None | Some("silu")) => FfnKind::SwiGlu,
        (_, Some(found)) => return Err(format!("`hidden_act` is \"{found}\", expected silu")),
    };
    Ok(config)
}

/// Settings that change the result and that this crate does not compute.
fn refuse_unsupported(keys: &Keys<'_>, kind: ModelKind) -> Result<(), String> {
    for key in ["attention_bias", "qkv_bias", "mlp_bias", "quantization_config", "num_shared_experts", "layer_types"] {
        match keys.0.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => {}
            // Written for models whose layers differ; all alike is what this crate computes anyway.
            Some(Value::Array(types)) if key == "layer_types" && types.iter().all(|t| t == "full_attention") => {}
            Some(Value::Number(n)) if n.as_u64() == Some(0) => {}
            Some(found) => return Err(format!("`{key}` is {found}, which is not supported")),
        }
    }
    if let Some(factor) = keys.number("partial_rotary_factor")?
        && factor != 1.0
    {
        return Err(format!("`partial_rotary_factor` is {factor}, expected 1"));
    }
    if kind == ModelKind::Olmoe && keys.0.get("sliding_window").is_some_and(|window| !window.is_null()) {
        return Err("`sliding_window` is set, but models of kind olmoe do not have it".to_string());
    }
    Ok(())
}

/// `rope_theta` at the top (transformers 4) or within `rope_parameters` (transformers 5).
fn rope_theta(keys: &Keys<'_>) -> Result<Option<f32>, String> {
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(Value::Object(rope)) = keys.0.get(key) else { continue };
        let rope = Keys(rope);
        let rope_type = match rope.text("rope_type")? {
            Some(name) => Some(name),
            None => rope.text("type")?,
        };
        if let Some(name) = rope_type.filter(|&name| name != "default") {
            return Err(format!("`{key}.rope_type` is \"{name}\", expected default"));
        }
        if let Some(factor) = rope.number("partial_rotary_factor")?
            && factor != 1.0
        {
            return Err(format!("`{key}.partial_rotary_factor` is {factor}, expected 1"));
        }
        if let Some(theta) = rope.number("rope_theta")? {
            return Ok(Some(theta));
        }
    }
    keys.number("rope_theta")
}

/// Qwen3-MoE's rule: a layer is dense if it is named, or if its number (from 1) is no multiple of the step.
fn dense_layers(keys: &Keys<'_>, layers: usize) -> Result<Vec<usize>, String> {
    let mut named = Vec::new();
    match keys.0.get("mlp_only_layers") {
        None | Some(Value::Null) => {}
        Some(Value::Array(list)) => {
            for layer in list {
                match layer.as_u64() {
                    Some(index) if (index as usize) < layers => named.push(index as usize),
                    _ => {
                        return Err(format!("`mlp_only_layers` has {layer}, expected layers below {layers}"));
                    }
                }
            }
        }
        Some(found) => return Err(format!("`mlp_only_layers` is {found}, expected a list of layers")),
    }
    let step = keys.optional_size("decoder_sparse_step")?.unwrap_or(1);
    if step == 0 {
        return Err("`decoder_sparse_step` is 0, expected at least 1".to_string());
    }
    let layers = 0..layers.min(MAX_LAYERS);
    Ok(layers.filter(|layer| named.contains(layer) || !(layer + 1).is_multiple_of(step)).collect())
}

fn special_tokens(keys: &Keys<'_>, kind: ModelKind) -> Result<SpecialTokens, String> {
    let ids = |key: &str, absent: Option<u32>| match keys.0.get(key) {
        None => Ok(absent.into_iter().collect()),
        Some(Value::Null) => Ok(Vec::new()),
        Some(value) => {
            let one = std::slice::from_ref(value);
            let values = value.as_array().map_or(one, Vec::as_slice);
            let ids: Option<Vec<u32>> = values.iter().map(|id| id.as_u64()?.try_into().ok()).collect();
            ids.ok_or_else(|| format!("`{key}` is {value}, expected a token id"))
        }
    };
    let padding = if kind == ModelKind::Olmoe { Some(1) } else { None };
    Ok(SpecialTokens {
        begin: ids("bos_token_id", None)?.first().copied(),
        end: ids("eos_token_id", None)?,
        padding: ids("pad_token_id", padding)?.first().copied(),
    })
}

/// Typed access to the keys of a JSON object; `null` counts as absent.
struct Keys<'a>(&'a Map<String, Value>);

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// The size under the first of `names` that is present.
    fn size(&self, names: &[&str]) -> Result<usize, String> {
        for name in names {
            if let Some(value) = self.optional_size(name)? {
                return Ok(value);
            }
        }
        Err(format!("`{}` is missing, expected a number", names[0]))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, String> {
        self.get(key)
            .map(|value| {
                let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
                size.ok_or_else(|| format!("`{key}` is {value}, expected a whole number"))
            })
            .transpose()
    }

    fn number(&self, key: &str) -> Result<Option<f32>, String> {
        self.get(key)
            .map(|value| {
                value.as_f64().map(|n| n as f32).ok_or_else(|| format!("`{key}` is {value}, expected a number"))
            })
            .transpose()
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        self.get(key)
            .map(|value| value.as_bool().ok_or_else(|| format!("`{key}` is {value}, expected true or false")))
            .transpose()
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, String> {
        self.get(key)
            .map(|value| value.as_str().ok_or_else(|| format!("`{key}` is {value}, expected a string")))
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixtral() -> Value {
        json!({
            "model_type": "mixtral", "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40, "num_local_experts": 8,
            "num_experts_per_tok": 2
        })
    }

    /// The configuration after `key` is set to `value` (removed where null), or what is said against it.
    fn check(mut base: Value, key: &str, value: Value) -> Result<ModelConfig, String> {
        base[key] = value;
        ModelConfig::from_json(&base.to_string(), "config.json").map_err(|error| error.to_string())
    }

    fn qwen3_moe() -> Value {
        let mut json = mixtral();
        json["model_type"] = json!("qwen3_moe");
        json["moe_intermediate_size"] = json!(24);
        json
    }

    #[test]
    fn both_spellings_load() {
        let old = check(mixtral(), "rope_theta", json!(5e5)).unwrap();
        let new = check(mixtral(), "rope_parameters", json!({"rope_theta": 5e5, "rope_type": "default"})).unwrap();
        assert_eq!(old, new);
        assert_eq!(old.position, PositionKind::Rotary { theta: 5e5 });
        let mut renamed = mixtral();
        renamed["num_local_experts"] = Value::Null;
        assert_eq!(check(renamed, "num_experts", json!(8)).unwrap().experts, 8);
        assert_eq!(check(mixtral(), "head_dim", Value::Null).unwrap().head_dim, 8);
        assert_eq!(check(mixtral(), "head_dim", json!(16)).unwrap().query_width(), 64);
    }

    #[test]
    fn sparse_step_and_named_layers_make_dense_layers() {
        let mut json = qwen3_moe();
        json["mlp_only_layers"] = json!([1]);
        assert_eq!(check(json.clone(), "decoder_sparse_step", json!(1)).unwrap().dense_layers, [1]);
        assert_eq!(check(json, "decoder_sparse_step", json!(2)).unwrap().dense_layers, [0, 1, 2]);
    }

    #[test]
    fn a_window_counts_for_qwen3_moe_only_where_it_is_switched_on() {
        let mut json = qwen3_moe();
        json["sliding_window"] = json!(16);
        assert_eq!(check(json.clone(), "use_sliding_window", json!(false)).unwrap().sliding_window, None);
        assert_eq!(check(json, "use_sliding_window", json!(true)).unwrap().sliding_window, Some(16));
    }

    #[test]
    fn what_is_written_reads_back() {
        for kind in [ModelKind::Mixtral, ModelKind::Qwen3Moe, ModelKind::Olmoe, ModelKind::LinaMoe] {
            let sizes = Sizes { vocab: 64, hidden: 32, layers: 3, heads: 4, experts: 8, top_k: 2, expert_hidden: 24 };
            let mut config = ModelConfig::family(kind, sizes);
            config.tied_embeddings = true;
            config.norm_epsilon = 3e-5;
            config.special_tokens = SpecialTokens { begin: Some(1), end: vec![2, 5], padding: Some(3) };
            match kind {
                ModelKind::Mixtral => config.sliding_window = Some(7),
                ModelKind::Qwen3Moe => (config.dense_layers, config.dense_hidden) = (vec![0, 2], 48),
                ModelKind::Olmoe => config.clip_qkv = Some(0.3),
                ModelKind::LinaMoe => config.ffn = FfnKind::Relu,
            }
            let mut read = ModelConfig::from_json(&config.to_json(), "config.json").unwrap();
            if kind != ModelKind::Qwen3Moe && kind != ModelKind::LinaMoe {
                read.dense_hidden = config.dense_hidden;
            }
            assert_eq!(read, config);
        }
    }

    #[test]
    fn every_refusal_names_file_key_found_and_expected() {
        let cases = [
            ("model_type", json!("llama"), "`model_type` is \"llama\", expected mixtral, qwen3_moe, olmoe or lina_moe"),
            ("hidden_size", json!(30), "`hidden_size` is 30, expected a multiple of num_attention_heads = 4"),
            ("hidden_size", json!("x"), "`hidden_size` is \"x\", expected a whole number"),
            ("hidden_size", Value::Null, "`hidden_size` is missing, expected a number"),
            ("num_hidden_layers", json!(0), "`num_hidden_layers` is 0, expected a number from 1 to 65536"),
            (
                "num_key_value_heads",
                json!(3),
                "`num_attention_heads` is 4, expected a multiple of num_key_value_heads = 3",
            ),
            ("num_experts_per_tok", json!(9), "`num_experts_per_tok` is 9, expected at most num_experts = 8"),
            ("head_dim", json!(7), "`head_dim` is 7, expected an even number, for rotary positions"),
            ("hidden_act", json!("gelu"), "`hidden_act` is \"gelu\", expected silu"),
            ("attention_bias", json!(true), "`attention_bias` is true, which is not supported"),
            ("rope_scaling", json!({"type": "linear"}), "`rope_scaling.rope_type` is \"linear\", expected default"),
            ("clip_qkv", json!(1.0), "`clip_qkv` is set, but models of kind mixtral do not have it"),
            ("pad_token_id", json!(128), "`pad_token_id` is 128, expected a token id below vocab_size = 128"),
            ("eos_token_id", json!(-1), "`eos_token_id` is -1, expected a token id"),
            ("sliding_window", json!(0), "`sliding_window` is 0, expected at least 1"),
        ];
        for (key, value, message) in cases {
            assert_eq!(check(mixtral(), key, value).unwrap_err(), format!("config.json: {message}"));
        }
        let error = ModelConfig::from_json("{", "config.json").unwrap_err().to_string();
        assert!(error.starts_with("config.json: is not valid JSON: "), "{error}");
        let missing = ModelConfig::from_folder(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(missing.starts_with("/nowhere/config.json: cannot be read: "), "{missing}");
    }
}
