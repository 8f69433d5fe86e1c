//! `lina generate`: one answer to one prompt, shown as it comes.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use lina_data::Tokenizer;
use lina_model::ModelConfig;
use serde::Serialize;

use crate::{
    ChatMessage, ChatTemplate, Completion, EngineHandle, EngineOptions, FinishReason, GenerateEvent, GenerateRequest,
    GenerationConfig, InferError, ModelOptions, Sampling, model_folder, with_engine,
};

/// What `lina generate` is asked for.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// The model and its ranks. The longest sequence follows from the prompt and the longest answer.
    pub model: ModelOptions,
    /// Text to go on from, or with `chat` the user's message.
    pub prompt: String,
    /// Whether the model's chat template is put around the prompt.
    pub chat: bool,
    /// Longest answer.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// Texts before which the answer ends.
    pub stop: Vec<String>,
}

/// How tokens are to be chosen, as far as somebody has said so; the model folder says the rest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingOptions {
    /// Always the likeliest token, whatever the folder says.
    pub greedy: bool,
    /// As in [`Sampling`]; tokens are drawn if one of this and the next three is given.
    pub temperature: Option<f32>,
    /// As in [`Sampling`].
    pub top_p: Option<f32>,
    /// As in [`Sampling`].
    pub top_k: Option<usize>,
    /// As in [`Sampling`]; by default another one each time.
    pub seed: Option<u64>,
    /// As in [`Sampling`].
    pub repetition_penalty: Option<f32>,
}

impl SamplingOptions {
    /// The options with the folder's settings where they are silent.
    ///
    /// # Errors
    /// If one is out of its range.
    pub fn resolve(&self, folder: &GenerationConfig) -> Result<Sampling, InferError> {
        let draws = self.temperature.is_some() || self.top_p.is_some() || self.top_k.is_some() || self.seed.is_some();
        let base = match (self.greedy, draws) {
            (true, _) => Sampling { temperature: 0.0, ..folder.drawing() },
            (false, true) => folder.drawing(),
            (false, false) => folder.sampling(),
        };
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(base.temperature),
            top_p: self.top_p.unwrap_or(base.top_p),
            top_k: self.top_k.unwrap_or(base.top_k),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            // A hasher's keys are random.
            seed: self.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish()),
            top_logprobs: 0,
        };
        // The folder's own settings are good, so that it is one of these that is not.
        sampling.check().map_err(|reason| InferError::Input(format!("--{}", reason.replacen('_', "-", 1))))?;
        Ok(sampling)
    }
}

/// What `lina generate` has made.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateSummary {
    /// Tokens of the prompt, with the chat template's.
    pub prompt_tokens: usize,
    /// Tokens of the answer, without an end-of-text token.
    pub token_ids: Vec<u32>,
    /// Natural logarithm of each token's probability under the model.
    pub logprobs: Vec<f32>,
    /// The answer, up to a stop text.
    pub text: String,
    /// Why it ended; none if nobody wanted to read on.
    pub finish_reason: Option<FinishReason>,
    /// Seed of the draws; none if no token was drawn.
    pub seed: Option<u64>,
    /// Number of ranks.
    pub ranks: usize,
    /// From the prompt's way in to the first token, in milliseconds.
    pub first_token_ms: f64,
    /// Tokens after the first one a second; 0 if there are none.
    pub tokens_per_s: f64,
}

/// Generates. `show` gets the answer in pieces as it comes and says whether to go on. `None` on a process that does not
/// lead its job.
///
/// # Errors
/// Bad folder, prompt or options; a lost rank.
pub fn generate(
    options: &GenerateOptions,
    show: impl FnMut(&str) -> ControlFlow<()> + Send,
) -> Result<Option<GenerateSummary>, InferError> {
    let folder = &model_folder(&options.model.model)?;
    if options.stop.iter().any(String::is_empty) {
        return Err(InferError::Input("--stop is empty, expected a text before which the answer ends".into()));
    }
    let positions = ModelConfig::from_folder(folder).map_err(InferError::input)?.max_positions;
    let tokenizer = Tokenizer::for_model_folder(folder).map_err(InferError::input)?;
    let settings = GenerationConfig::for_model_folder(folder)?;
    let sampling = options.sampling.resolve(&settings)?;
    let prompt = prompt_tokens(options, folder, &tokenizer)?;
    if prompt.is_empty() {
        return Err(InferError::Input("the prompt is empty, expected some text".into()));
    }
    if prompt.len() >= positions {
        let (found, most) = (prompt.len(), positions - 1);
        return Err(InferError::Input(format!(
            "the prompt has {found} tokens, expected at most {most}: the model has {positions} positions"
        )));
    }
    let longest = prompt.len().saturating_add(options.max_new_tokens.max(1)).min(positions);
    let model = ModelOptions { model: folder.clone(), max_sequence_tokens: Some(longest), ..options.model.clone() };
    let seed = (sampling.temperature > 0.0).then_some(sampling.seed);
    let stop_tokens = settings.stop_tokens(&tokenizer);
    let request = GenerateRequest { prompt, max_new_tokens: options.max_new_tokens, sampling, stop_tokens };
    let stops = options.stop.clone();
    let engine = EngineOptions { max_queue: 0, max_running: 1, ..EngineOptions::default() };
    let answer = with_engine(&model, engine, move |handle| answer(&handle, request, tokenizer, stops, show))?;
    Ok(answer.transpose()?.map(|summary| GenerateSummary { seed, ranks: model.ranks, ..summary }))
}

fn prompt_tokens(options: &GenerateOptions, folder: &Path, tokenizer: &Tokenizer) -> Result<Vec<u32>, InferError> {
    if !options.chat {
        return tokenizer.encode_prompt(&options.prompt).map_err(InferError::input);
    }
    let template = ChatTemplate::for_model_folder(folder)?.ok_or_else(|| {
        let folder = folder.display();
        InferError::Input(format!(
            "--chat: `{folder}` has no chat template, expected chat_template.jinja or chat_template in \
             tokenizer_config.json"
        ))
    })?;
    let message = ChatMessage { role: "user".into(), content: options.prompt.clone() };
    tokenizer.encode(&template.render(&[message], true)?).map_err(InferError::input)
}

/// Has the engine answer `request`.
fn answer(
    handle: &EngineHandle,
    request: GenerateRequest,
    tokenizer: Tokenizer,
    stops: Vec<String>,
    mut show: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<GenerateSummary, InferError> {
    let mut completion = Completion::new(tokenizer, &request.prompt, stops);
    let mut summary = GenerateSummary {
        prompt_tokens: request.prompt.len(),
        token_ids: Vec::new(),
        logprobs: Vec::new(),
        text: String::new(),
        finish_reason: None,
        seed: None,
        ranks: 1,
        first_token_ms: 0.0,
        tokens_per_s: 0.0,
    };
    let begin = Instant::now();
    let mut first = None;
    let mut stream = handle.submit(request).map_err(InferError::input)?;
    while let Some(event) = stream.recv() {
        let text = match event {
            GenerateEvent::Token(it) => {
                let after = it.at.duration_since(*first.get_or_insert(it.at)).as_secs_f64();
                summary.tokens_per_s = if after > 0.0 { summary.token_ids.len() as f64 / after } else { 0.0 };
                summary.token_ids.push(it.token);
                summary.logprobs.push(it.logprob);
                completion.push(it.token)?
            }
            GenerateEvent::Finished(reason) => {
                summary.finish_reason = Some(reason);
                completion.finish()?
            }
            GenerateEvent::Failed(reason) => return Err(InferError::Input(reason)),
        };
        summary.text += &text;
        if !text.is_empty() && show(&text).is_break() {
            break;
        }
        if completion.stopped() {
            summary.finish_reason = Some(FinishReason::Stop);
            break;
        }
    }
    summary.first_token_ms = first.map_or(0.0, |first| first.duration_since(begin).as_secs_f64() * 1e3);
    Ok(summary)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backend, BackendLimits, ExpertActivity, Sampled, StepOutput, StepPlan, start_engine};

    /// Says what it has learned by heart, whatever the prompt.
    struct Reciter {
        text: &'static [u8],
        said: usize,
    }

    impl Backend for Reciter {
        fn limits(&self) -> BackendLimits {
            BackendLimits {
                vocab: 256,
                max_positions: 100,
                ranks: 1,
                page_tokens: 16,
                pages_per_rank: 10,
                step_tokens_per_rank: 8,
            }
        }

        fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, InferError> {
            let sampled = plan.feeds.iter().filter(|feed| feed.sample).map(|feed| {
                let Some(&byte) = self.text.get(self.said) else {
                    return Err(InferError::Input("rank 0 has forgotten the rest".into()));
                };
                self.said += 1;
                Ok(Sampled { id: feed.id, token: byte.into(), logprob: -1.0, top: vec![] })
            });
            Ok(StepOutput { sampled: sampled.collect::<Result<_, _>>()? })
        }

        fn activity(&self) -> ExpertActivity {
            ExpertActivity::default()
        }
    }

    /// The answer to a prompt, and the pieces in which it came.
    fn recited(
        text: &'static str,
        max_new_tokens: usize,
        stops: &[&str],
        most_pieces: usize,
    ) -> (Result<GenerateSummary, String>, Vec<String>) {
        let build = || Ok(Reciter { text: text.as_bytes(), said: 0 });
        let handle = start_engine(build, EngineOptions::default()).unwrap();
        let request = GenerateRequest {
            prompt: b"Say it: ".map(u32::from).to_vec(),
            max_new_tokens,
            sampling: Sampling::default(),
            stop_tokens: vec![0],
        };
        let mut pieces = Vec::new();
        let show = |piece: &str| {
            pieces.push(piece.to_owned());
            if pieces.len() < most_pieces { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        let stops = stops.iter().map(|&stop| stop.to_owned()).collect();
        let summary = answer(&handle, request, Tokenizer::bytes(), stops, show);
        (summary.map_err(|error| error.to_string()), pieces)
    }

    #[test]
    fn an_answer_comes_in_pieces_and_ends_for_a_reason() {
        let (summary, pieces) = recited("né\0no more", 20, &[], usize::MAX);
        let summary = summary.unwrap();
        assert_eq!(pieces, ["n", "é"]);
        assert_eq!((summary.text.as_str(), summary.finish_reason), ("né", Some(FinishReason::Stop)));
        assert_eq!((summary.prompt_tokens, summary.token_ids.len(), summary.logprobs.len()), (8, 3, 3));
        let (summary, _) = recited("and so on", 6, &[], usize::MAX);
        let summary = summary.unwrap();
        assert_eq!((summary.text.as_str(), summary.finish_reason), ("and so", Some(FinishReason::Length)));
        // What was held back because a stop text could have begun comes at the end.
        let (summary, pieces) = recited("one two", 6, &["two"], usize::MAX);
        assert_eq!((summary.unwrap().text.as_str(), pieces.concat().as_str()), ("one tw", "one tw"));
        let (summary, pieces) = recited("one two three", 20, &["two"], usize::MAX);
        let summary = summary.unwrap();
        assert_eq!((summary.text.as_str(), summary.finish_reason), ("one ", Some(FinishReason::Stop)));
        assert_eq!((pieces.concat().as_str(), summary.token_ids.len()), ("one ", 7));
    }

    #[test]
    fn a_reader_may_leave_and_a_job_may_fail() {
        let (summary, pieces) = recited("and so on", 9, &[], 3);
        let summary = summary.unwrap();
        assert_eq!((summary.text.as_str(), summary.finish_reason, pieces.len()), ("and", None, 3));
        let (summary, pieces) = recited("ab", 9, &[], usize::MAX);
        assert_eq!(summary.unwrap_err(), "rank 0 has forgotten the rest");
        assert_eq!(pieces, ["a", "b"]);
    }

    #[test]
    fn options_come_before_the_folder() {
        let folder = GenerationConfig {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_k: Some(20),
            repetition_penalty: Some(1.1),
            ..GenerationConfig::default()
        };
        let seven = SamplingOptions { seed: Some(7), ..SamplingOptions::default() };
        let expected =
            Sampling { temperature: 0.6, top_k: 20, repetition_penalty: 1.1, seed: 7, ..Sampling::default() };
        assert_eq!(seven.resolve(&folder).unwrap(), expected);
        // A folder that does not draw is made to by an option of drawing.
        let drawn = seven.resolve(&GenerationConfig::default()).unwrap();
        assert_eq!((drawn.temperature, drawn.top_k), (1.0, 50));
        let silent = SamplingOptions::default();
        assert_eq!(silent.resolve(&GenerationConfig::default()).unwrap().temperature, 0.0);
        assert_ne!(silent.resolve(&folder).unwrap().seed, silent.resolve(&folder).unwrap().seed);
        let greedy = SamplingOptions { greedy: true, repetition_penalty: Some(1.5), ..silent };
        let greedy = greedy.resolve(&folder).unwrap();
        assert_eq!((greedy.temperature, greedy.repetition_penalty), (0.0, 1.5));
        let cold = SamplingOptions { temperature: Some(-1.0), ..seven };
        let message = cold.resolve(&folder).unwrap_err().to_string();
        assert_eq!(message, "--temperature is -1, expected a finite number that is not negative");
        let none = SamplingOptions { repetition_penalty: Some(0.0), ..SamplingOptions::default() };
        let message = none.resolve(&folder).unwrap_err().to_string();
        assert_eq!(message, "--repetition-penalty is 0, expected a finite number above 0");
    }
}
