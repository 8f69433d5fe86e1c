//! A model of a few lines behind a real engine and a real server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lina_data::Tokenizer;
use lina_infer::{
    Backend, BackendLimits, ChatTemplate, EngineHandle, EngineOptions, ExpertActivity, InferError, LayerActivity,
    Sampled, StepOutput, StepPlan, start_engine,
};
use lina_serve::{Listener, RequestDefaults, ServeError, ServeOptions, ServeSummary, ServedModel, Shutdown, serve};
use serde_json::{Value, json};

use crate::client::{self, Answer};

pub const MODEL: &str = "alphabet";
pub const ALIAS: &str = "org/alphabet-2";
/// Longest sequence that it takes.
pub const POSITIONS: usize = 4096;
/// The token that ends an answer.
pub const END: u8 = b'.';
const EXPERTS: usize = 4;
/// How long a test waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A template that shows every message, and refuses what it must not see.
const CHAT_TEMPLATE: &str = "{% for m in messages %}{% if m.content == 'refuse me' %}{{ raise_exception('refused') }}\
    {% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

/// After a letter comes the next one, after `z` an `a`, after `!` the bytes of `é漢🦀` and then letters, after `~` the end.
struct Alphabet {
    step_time: Duration,
    fails: Arc<AtomicBool>,
    activity: ExpertActivity,
    /// Last two tokens of each sequence, by id.
    ends: std::collections::HashMap<u32, [u8; 2]>,
    sampling: std::collections::HashMap<u32, usize>,
}

/// What follows.
fn next(before: [u8; 2]) -> u8 {
    const WIDE: &[u8] = "é漢🦀".as_bytes();
    match before {
        [_, b'~'] => END,
        [_, b'!'] => WIDE[0],
        [_, last] if last >= 0x80 => {
            let at = WIDE.windows(2).position(|pair| pair == before).map(|at| at + 2).unwrap_or(1);
            WIDE.get(at).copied().unwrap_or(b'a')
        }
        [_, last @ b'a'..=b'y'] => last + 1,
        _ => b'a',
    }
}

impl Backend for Alphabet {
    fn limits(&self) -> BackendLimits {
        BackendLimits {
            vocab: 256,
            max_positions: POSITIONS,
            ranks: 2,
            page_tokens: 16,
            pages_per_rank: 8 * POSITIONS / 16,
            step_tokens_per_rank: 512,
        }
    }

    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, InferError> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(InferError::Input("rank 1 was lost".into()));
        }
        std::thread::sleep(if plan.feeds.is_empty() { Duration::ZERO } else { self.step_time });
        for admission in &plan.admitted {
            self.ends.insert(admission.id.0, [0; 2]);
            self.sampling.insert(admission.id.0, admission.sampling.top_logprobs);
        }
        let mut sampled = Vec::new();
        for feed in &plan.feeds {
            let ends = self.ends.get_mut(&feed.id.0).expect("it has been admitted");
            for &token in &feed.tokens {
                *ends = [ends[1], token as u8];
                for layer in &mut self.activity.layers {
                    layer.expert_tokens[token as usize % EXPERTS] += 1;
                    layer.device_tokens[token as usize % EXPERTS / 2] += 1;
                }
            }
            if feed.sample {
                let token = u32::from(next(*ends));
                let top = [(token, -0.5), (u32::from(b'?'), -1.5), (0xc3, f32::NEG_INFINITY)];
                let top = top.into_iter().take(self.sampling[&feed.id.0]).collect();
                sampled.push(Sampled { id: feed.id, token, logprob: -0.5, top });
            }
        }
        Ok(StepOutput { sampled })
    }

    fn activity(&self) -> ExpertActivity {
        self.activity.clone()
    }
}

/// How a test's server differs from the usual one.
pub struct Setting {
    pub options: ServeOptions,
    pub engine: EngineOptions,
    pub step_time: Duration,
    pub template: bool,
    pub experts: bool,
}

impl Default for Setting {
    fn default() -> Self {
        Setting {
            options: ServeOptions { port: 0, ..ServeOptions::default() },
            engine: EngineOptions::default(),
            step_time: Duration::ZERO,
            template: true,
            experts: true,
        }
    }
}

/// A server on a thread of its own, which ends when this is dropped.
pub struct Server {
    pub port: u16,
    pub engine: EngineHandle,
    pub shutdown: Shutdown,
    pub fails: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<ServeSummary, ServeError>>>,
}

/// A server as `change` wants it.
pub fn start(change: impl FnOnce(&mut Setting)) -> Server {
    let mut setting = Setting::default();
    change(&mut setting);
    let Setting { options, engine, step_time, template, experts } = setting;
    let fails = Arc::new(AtomicBool::new(false));
    let layer = |layer| LayerActivity {
        layer,
        expert_tokens: vec![0; EXPERTS],
        device_tokens: vec![0; 2],
        resident: vec![vec![0, 1], vec![2, 3]],
    };
    let layers = if experts { [1, 3].map(layer).into() } else { Vec::new() };
    let activity = ExpertActivity { layers, checks: 7, replans: 2, moved_bytes: 4096, emulated: true };
    let backend = Alphabet {
        step_time,
        fails: Arc::clone(&fails),
        activity,
        ends: Default::default(),
        sampling: Default::default(),
    };
    let engine = start_engine(move || Ok(backend), engine).unwrap();
    let model = ServedModel {
        names: vec![MODEL.into(), ALIAS.into()],
        tokenizer: Tokenizer::bytes(),
        chat_template: template.then(chat_template),
        defaults: RequestDefaults { stop_tokens: vec![END.into()], ..RequestDefaults::default() },
    };
    let shutdown = Shutdown::new();
    let listener = Listener::bind(&options).unwrap();
    let port = listener.address().port();
    let thread = {
        let (engine, shutdown) = (engine.clone(), shutdown.clone());
        std::thread::spawn(move || serve(listener, engine, model, options, &shutdown))
    };
    Server { port, engine, shutdown, fails, thread: Some(thread) }
}

fn chat_template() -> ChatTemplate {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"chat_template": CHAT_TEMPLATE}).to_string();
    std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    ChatTemplate::for_model_folder(folder.path()).unwrap().expect("the folder has a template")
}

impl Server {
    /// What the server makes of a request.
    pub fn get(&self, path: &str) -> Answer {
        client::request(self.port, "GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_raw(path, body.to_string().as_bytes())
    }

    pub fn post_raw(&self, path: &str, body: &[u8]) -> Answer {
        client::request(self.port, "POST", path, &[("Content-Type", "application/json")], body)
    }

    /// A completion of `prompt` with `more` fields.
    pub fn complete(&self, prompt: &str, more: Value) -> Answer {
        self.post("/v1/completions", &completion(prompt, more))
    }

    /// Waits until the engine's figures are as expected.
    pub fn wait_until(&self, what: &str, fits: impl Fn(&lina_infer::EngineStatus) -> bool) {
        let begin = Instant::now();
        while !fits(&self.engine.status()) {
            assert!(begin.elapsed() < PATIENCE, "{what}: {:?}", self.engine.status());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for the end.
    pub fn join(mut self) -> Result<ServeSummary, ServeError> {
        self.thread.take().unwrap().join().unwrap()
    }

    pub fn ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.request();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(std::thread::panicking() || ended.is_ok(), "the server has panicked");
        }
    }
}

/// Body of a request for a completion.
pub fn completion(prompt: &str, more: Value) -> Value {
    let mut body = json!({"model": MODEL, "prompt": prompt});
    body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    body
}
