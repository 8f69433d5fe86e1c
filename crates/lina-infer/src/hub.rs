//! Where a model is: a folder, or by the name of a model on the Hugging Face hub a folder of the hub's cache.
//!
//! The cache is the one that Hugging Face's own tools use (`HF_HOME`, by default `~/.cache/huggingface`). A model that
//! is complete there is used as it is, without asking the hub for a newer one. Fetching needs the feature `hub`.

use std::path::{Path, PathBuf};

use crate::InferError;

/// The folder of a model that was asked for by `name`: that folder, or, where there is none and `name` has the form
/// `organisation/model`, the model of that name in the hub's cache, fetched if it is not there.
///
/// # Errors
/// If the hub does not give the model, or this build does not ask it. A name of another form is returned as it is, for
/// whoever reads the folder to say what is missing.
pub fn model_folder(name: &Path) -> Result<PathBuf, InferError> {
    match name.to_str().filter(|id| !name.exists() && is_hub_id(id)) {
        Some(id) => hub_folder(id),
        None => Ok(name.to_owned()),
    }
}

/// Whether the hub could have a model of this name.
fn is_hub_id(name: &str) -> bool {
    let part = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && part.chars().all(allowed) && !part.starts_with(['-', '.']) && !part.ends_with(['-', '.'])
    };
    name.split_once('/').is_some_and(|(organisation, model)| part(organisation) && part(model))
}

#[cfg(not(feature = "hub"))]
fn hub_folder(id: &str) -> Result<PathBuf, InferError> {
    Err(InferError::Input(format!(
        "there is no folder `{id}`; a build with the feature `hub` (cargo build --release --features lina/hub) would ask \
         the Hugging Face hub for a model of this name"
    )))
}

#[cfg(feature = "hub")]
fn hub_folder(id: &str) -> Result<PathBuf, InferError> {
    let offline = std::env::var_os("HF_HUB_OFFLINE").is_some_and(|value| value != "0" && !value.is_empty());
    cached::folder(id, hf_hub::Cache::from_env(), offline, hf_hub::api::sync::ApiBuilder::from_env())
}

/// The hub's cache.
#[cfg(feature = "hub")]
mod cached {
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use hf_hub::api::sync::{ApiBuilder, ApiError};
    use hf_hub::{Cache, CacheRepo};

    use crate::InferError;

    /// Files of a model beside its weights; all but the first may be missing.
    const FILES: [&str; 6] = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    ];
    const WEIGHTS: &str = "model.safetensors";
    const INDEX: &str = "model.safetensors.index.json";

    pub(super) fn folder(id: &str, cache: Cache, offline: bool, hub: ApiBuilder) -> Result<PathBuf, InferError> {
        let model = cache.model(id.to_owned());
        if let Some(folder) = complete(&model) {
            return Ok(folder);
        }
        let cache_path = cache.path().display();
        if offline {
            return Err(InferError::Input(format!(
                "there is no folder `{id}`, no complete model of this name in the cache `{cache_path}`, and \
                 HF_HUB_OFFLINE forbids to fetch it"
            )));
        }
        fetch(id, hub).map_err(|error| {
            let reason = error.to_string();
            let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
            InferError::Input(format!("there is no folder `{id}`, and the Hugging Face hub does not give it: {reason}"))
        })?;
        complete(&model).ok_or_else(|| {
            InferError::Input(format!(
                "the model `{id}` of the Hugging Face hub is not usable: expected config.json and {WEIGHTS}, or {INDEX} \
                 with its files"
            ))
        })
    }

    /// The model's folder, if its configuration and all its weights are there.
    fn complete(model: &CacheRepo) -> Option<PathBuf> {
        let folder = model.get(FILES[0])?.parent()?.to_owned();
        if folder.join(WEIGHTS).exists() {
            return Some(folder);
        }
        let index: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join(INDEX)).ok()?).ok()?;
        let parts: BTreeSet<&str> = index["weight_map"].as_object()?.values().filter_map(|it| it.as_str()).collect();
        (!parts.is_empty() && parts.iter().all(|part| folder.join(part).exists())).then_some(folder)
    }

    /// Fetches the files that are not in the cache.
    fn fetch(id: &str, hub: ApiBuilder) -> Result<(), ApiError> {
        let model = hub.build()?.model(id.to_owned());
        let weights = |name: &str| name.starts_with("model") && name.ends_with(".safetensors") && !name.contains('/');
        for file in model.info()?.siblings {
            let name = file.rfilename;
            if FILES.contains(&name.as_str()) || name == INDEX || weights(&name) {
                model.get(&name)?;
            }
        }
        Ok(())
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use std::collections::BTreeMap;
        use std::fs;
        use std::io::{BufRead, BufReader, Write};
        use std::net::TcpListener;
        use std::path::Path;

        const ID: &str = "someone/small-moe";

        fn cache(folder: &Path) -> Cache {
            Cache::new(folder.join("hub"))
        }

        /// Puts files into the cache as if they had been fetched.
        fn put(folder: &Path, files: &[(&str, &str)]) -> PathBuf {
            let model = folder.join("hub/models--someone--small-moe");
            let snapshot = model.join("snapshots/abc");
            fs::create_dir_all(&snapshot).unwrap();
            fs::create_dir_all(model.join("refs")).unwrap();
            fs::write(model.join("refs/main"), "abc").unwrap();
            files.iter().for_each(|(name, text)| fs::write(snapshot.join(name), text).unwrap());
            snapshot
        }

        /// A hub that knows one model; returns its address and serves until the process ends.
        fn hub(files: &[(&'static str, &'static str)]) -> String {
            let files: BTreeMap<_, _> = files.iter().copied().collect();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                    let Some(request) = lines.next() else { continue };
                    // The one range that is asked for is the first byte, to learn the size.
                    let probes = lines.take_while(|line| !line.is_empty()).any(|line| line.ends_with("bytes=0-0"));
                    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
                    let (status, body) = if path.starts_with(&format!("/api/models/{ID}")) {
                        let siblings: Vec<_> =
                            files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
                        ("200 OK", serde_json::json!({ "sha": "abc", "siblings": siblings }).to_string())
                    } else {
                        let name = path.strip_prefix(&format!("/{ID}/resolve/main/")).unwrap_or_default();
                        match files.get(name) {
                            Some(text) if probes => ("206 Partial Content", text[..1].to_owned()),
                            Some(text) => ("200 OK", (*text).to_owned()),
                            None => ("404 Not Found", String::new()),
                        }
                    };
                    let size = files.get(path.rsplit('/').next().unwrap_or_default()).map_or(0, |text| text.len());
                    let tag = path.replace('/', "-");
                    let headers = format!(
                        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes 0-0/{size}\r\nETag: \"{tag}\"\r\n\
                         X-Repo-Commit: abc\r\nConnection: close\r\n\r\n",
                        body.len()
                    );
                    stream.write_all((headers + &body).as_bytes()).unwrap();
                }
            });
            address
        }

        fn builder(folder: &Path, address: &str) -> ApiBuilder {
            ApiBuilder::from_cache(cache(folder)).with_endpoint(address.to_owned()).with_progress(false)
        }

        #[test]
        fn a_complete_model_is_used_without_asking() {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path();
            // Nobody answers there.
            let find = || self::folder(ID, cache(path), false, builder(path, "http://127.0.0.1:1"));
            let snapshot = put(path, &[("config.json", "{}"), (WEIGHTS, "x")]);
            assert_eq!(find().unwrap(), snapshot);
            fs::rename(snapshot.join(WEIGHTS), snapshot.join("model-1.safetensors")).unwrap();
            let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
            fs::write(snapshot.join(INDEX), index).unwrap();
            let message = find().unwrap_err().to_string();
            let expected = "there is no folder `someone/small-moe`, and the Hugging Face hub does not give it: ";
            assert!(message.starts_with(expected) && !message.contains('\n'), "{message}");
            fs::write(snapshot.join("model-2.safetensors"), "y").unwrap();
            assert_eq!(find().unwrap(), snapshot);
        }

        #[test]
        fn what_is_missing_is_fetched() {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path();
            let address = hub(&[
                ("config.json", "{\"a\": 1}"),
                ("tokenizer.json", "{}"),
                ("README.md", "text"),
                ("consolidated.safetensors", "the same again"),
                (INDEX, r#"{"weight_map": {"a": "model-1.safetensors"}}"#),
                ("model-1.safetensors", "weights"),
            ]);
            let offline = self::folder(ID, cache(path), true, builder(path, &address)).unwrap_err().to_string();
            assert!(offline.contains("HF_HUB_OFFLINE forbids to fetch it"), "{offline}");
            let found = self::folder(ID, cache(path), false, builder(path, &address)).unwrap();
            assert_eq!(fs::read_to_string(found.join("config.json")).unwrap(), "{\"a\": 1}");
            assert_eq!(fs::read_to_string(found.join("model-1.safetensors")).unwrap(), "weights");
            let mut names: Vec<_> = fs::read_dir(&found).unwrap().map(|it| it.unwrap().file_name()).collect();
            names.sort();
            assert_eq!(names, ["config.json", "model-1.safetensors", INDEX, "tokenizer.json"]);
            assert_eq!(self::folder(ID, cache(path), true, builder(path, "http://127.0.0.1:1")).unwrap(), found);
        }

        #[test]
        fn a_model_without_weights_is_not_usable() {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path();
            let address = hub(&[("config.json", "{}"), ("pytorch_model.bin", "x")]);
            let message = self::folder(ID, cache(path), false, builder(path, &address)).unwrap_err().to_string();
            assert!(
                message.starts_with("the model `someone/small-moe` of the Hugging Face hub is not usable"),
                "{message}"
            );
            let message = self::folder("else/where", cache(path), false, builder(path, &address)).unwrap_err();
            assert!(message.to_string().contains("404"), "{message}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_have_two_parts() {
        for name in ["mistralai/Mixtral-8x7B-v0.1", "a/b_c.d"] {
            assert!(is_hub_id(name), "{name}");
        }
        for name in ["", "a", "/a/b", "./a", "../a", "a/", "a/b/c", "a b/c", "~/a", "-a/b", "a/b.", "é/a"] {
            assert!(!is_hub_id(name), "{name}");
        }
    }

    #[test]
    fn a_folder_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(model_folder(folder.path()).unwrap(), folder.path());
        assert_eq!(model_folder(Path::new("no-such-folder")).unwrap(), Path::new("no-such-folder"));
    }

    #[cfg(not(feature = "hub"))]
    #[test]
    fn a_build_that_does_not_ask_says_so() {
        let message = model_folder(Path::new("someone/no-such-model")).unwrap_err().to_string();
        assert_eq!(
            message,
            "there is no folder `someone/no-such-model`; a build with the feature `hub` (cargo build --release \
             --features lina/hub) would ask the Hugging Face hub for a model of this name"
        );
    }
}
