//! One sequence on its way from the engine to a client: tokens become text, stop strings end it, its times are kept.

use std::sync::Arc;
use std::time::Instant;

use lina_infer::{FinishReason, GenerateEvent, GeneratedToken, InferError, StopMatcher, TextDecoder, TokenStream};

use crate::server::Server;

/// What stands for the logarithm of a probability of 0, which JSON cannot express.
const LOWEST_LOGPROB: f32 = -9999.0;

/// A stretch of an answer. Parts of an answer follow each other without gaps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    pub(crate) text: String,
    /// Its tokens, if their probabilities are asked for.
    pub(crate) tokens: Vec<TextToken>,
    /// How many tokens were generated for it; also those that a stop string has cut off.
    pub(crate) generated_tokens: usize,
    /// Why the answer ends with it, if it does.
    pub(crate) finish: Option<FinishReason>,
}

impl Part {
    /// Adds the part that follows.
    pub(crate) fn extend(&mut self, next: Part) {
        self.text.push_str(&next.text);
        self.tokens.extend(next.tokens);
        self.generated_tokens += next.generated_tokens;
        self.finish = next.finish;
    }
}

/// A token with what is known of its probability.
#[derive(Clone, Debug)]
pub(crate) struct TextToken {
    pub(crate) chosen: Likely,
    /// The likeliest at its place.
    pub(crate) top: Vec<Likely>,
    /// Characters of the answer before it.
    pub(crate) offset_chars: usize,
}

/// A token as text, and the logarithm of its probability.
#[derive(Clone, Debug)]
pub(crate) struct Likely {
    token: u32,
    /// What it adds to the text; with U+FFFD where it is only a part of a character.
    pub(crate) text: String,
    logprob: f32,
}

impl Likely {
    /// Its text, or its id (as vLLM writes it) where there is no text of its own: names of different tokens differ.
    pub(crate) fn name(&self) -> String {
        match self.bytes() {
            Some([_, ..]) => self.text.clone(),
            _ => format!("token_id:{}", self.token),
        }
    }

    /// Its bytes, if it is whole characters.
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        (!self.text.contains(char::REPLACEMENT_CHARACTER)).then_some(self.text.as_bytes())
    }

    /// Logarithm of its probability, as JSON can express it.
    pub(crate) fn logprob(&self) -> f32 {
        self.logprob.max(LOWEST_LOGPROB)
    }
}

/// OpenAI's name.
pub(crate) fn finish_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// A sequence that is being generated. Dropped before its end, it leaves the engine.
pub(crate) struct Answer {
    server: Arc<Server>,
    /// Gone once the answer has ended.
    stream: Option<TokenStream>,
    decoder: TextDecoder,
    stops: StopMatcher,
    /// Whether the tokens' probabilities are part of the answer.
    logprobs: bool,
    /// What has been generated since the last part.
    pending: Part,
    generated_tokens: usize,
    generated_chars: usize,
    arrived: Instant,
    first_token: Option<Instant>,
}

impl Answer {
    /// The answer to `prompt` that comes through `stream`, which ends before the first of `stops`.
    pub(crate) fn new(
        server: Arc<Server>,
        stream: TokenStream,
        prompt: &[u32],
        stops: Vec<String>,
        logprobs: bool,
        arrived: Instant,
    ) -> Self {
        Answer {
            decoder: TextDecoder::new(server.model.tokenizer.clone(), prompt),
            stops: StopMatcher::new(stops),
            server,
            stream: Some(stream),
            logprobs,
            pending: Part::default(),
            generated_tokens: 0,
            generated_chars: 0,
            arrived,
            first_token: None,
        }
    }

    /// The next part, once it is sure; `None` after the one that finishes.
    ///
    /// # Errors
    /// If the engine cannot go on: its reason.
    pub(crate) async fn next(&mut self) -> Option<Result<Part, String>> {
        loop {
            let taken = match self.stream.as_mut()?.next().await? {
                GenerateEvent::Token(token) => self.push(token),
                GenerateEvent::Finished(reason) => self.push_rest(reason),
                GenerateEvent::Failed(reason) => Err(InferError::Input(reason)),
            };
            if let Err(error) = taken {
                self.stream = None;
                return Some(Err(error.to_string()));
            }
            if !self.pending.text.is_empty() || self.pending.finish.is_some() {
                return Some(Ok(std::mem::take(&mut self.pending)));
            }
        }
    }

    fn push(&mut self, GeneratedToken { token, logprob, top, .. }: GeneratedToken) -> Result<(), InferError> {
        if self.first_token.is_none() {
            self.first_token = Some(Instant::now());
            self.server.metrics.first_token_seconds.observe(self.arrived.elapsed().as_secs_f64());
        }
        self.generated_tokens += 1;
        self.pending.generated_tokens += 1;
        if self.logprobs {
            let likely = |(token, logprob)| self.decoder.piece(token).map(|text| Likely { token, text, logprob });
            let top = top.into_iter().map(likely).collect::<Result<_, _>>()?;
            let chosen = likely((token, logprob))?;
            self.pending.tokens.push(TextToken { chosen, top, offset_chars: self.generated_chars });
        }
        let text = self.decoder.push(token)?;
        self.generated_chars += text.chars().count();
        self.pending.text.push_str(&self.stops.push(&text));
        if self.stops.stopped() {
            self.finish(FinishReason::Stop);
        }
        Ok(())
    }

    /// What was held back until the end, where a stop string may still be complete.
    fn push_rest(&mut self, reason: FinishReason) -> Result<(), InferError> {
        let text = self.decoder.finish()?;
        self.pending.text.push_str(&self.stops.push(&text));
        self.pending.text.push_str(&self.stops.finish());
        self.finish(if self.stops.stopped() { FinishReason::Stop } else { reason });
        Ok(())
    }

    /// Notes the end. Without its stream, a sequence that a stop string has ended leaves the engine.
    fn finish(&mut self, reason: FinishReason) {
        self.stream = None;
        self.pending.finish = Some(reason);
        let metrics = &self.server.metrics;
        metrics.request_seconds.observe(self.arrived.elapsed().as_secs_f64());
        if let (Some(first), 2..) = (self.first_token, self.generated_tokens) {
            let after_first = (self.generated_tokens - 1) as f64;
            metrics.output_token_seconds.observe(first.elapsed().as_secs_f64() / after_first);
        }
    }
}
