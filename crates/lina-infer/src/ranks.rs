//! A model on the ranks of a job: rank 0 hears what a step is to do and tells the others, every rank computes its
//! sequences' tokens and chooses the next ones, and rank 0 hears which.
//!
//! A step costs two small exchanges beside those of its layers: what to do, and what came of it. Nobody but rank 0
//! knows of requests, and nobody but a sequence's rank sees its logits.

use std::collections::HashMap;

use lina_comm::{AllToAllKind, Comm, CommError, Direction, Exchange, Leg};
use lina_model::{InferenceBatch, InferenceStats, LogitsOf, SequenceFeed, StepError};

use crate::device::StepModel;
use crate::{
    Admission, Backend, BackendLimits, ExpertActivity, InferError, LayerActivity, Sampled, Sampler, Sampling,
    SequenceId, StepOutput, StepPlan,
};

/// Words of a step's first message to a rank; what is longer follows in a second one.
const HEAD_WORDS: usize = 128;
/// Words before the step itself: the message's length, the longest length of all ranks, what is to be done.
const PREFIX_WORDS: usize = 3;
/// Words of an answer's token without its likeliest alternatives: token, logprob.
const ANSWER_WORDS: usize = 2;

/// What the other ranks are asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Step = 0,
    Stop = 1,
}

/// One rank's part of a step.
#[derive(Debug, Default, PartialEq)]
struct RankStep {
    released: Vec<u32>,
    admitted: Vec<RankAdmission>,
    feeds: Vec<RankFeed>,
    token_offset: u64,
}

#[derive(Debug, PartialEq)]
struct RankAdmission {
    id: u32,
    pages: u32,
    sampling: Sampling,
}

#[derive(Debug, PartialEq)]
struct RankFeed {
    id: u32,
    sample: bool,
    tokens: Vec<u32>,
}

impl RankStep {
    fn write(&self, words: &mut Vec<u32>) {
        words.push(self.released.len() as u32);
        words.extend(&self.released);
        words.push(self.admitted.len() as u32);
        for RankAdmission { id, pages, sampling } in &self.admitted {
            let Sampling { temperature, top_p, top_k, repetition_penalty, seed, top_logprobs } = sampling;
            words.extend([*id, *pages, temperature.to_bits(), top_p.to_bits(), repetition_penalty.to_bits()]);
            words.extend([*top_k as u32, *top_logprobs as u32, *seed as u32, (seed >> 32) as u32]);
        }
        words.push(self.feeds.len() as u32);
        for RankFeed { id, sample, tokens } in &self.feeds {
            words.extend([*id, u32::from(*sample), tokens.len() as u32]);
            words.extend(tokens);
        }
        words.extend([self.token_offset as u32, (self.token_offset >> 32) as u32]);
    }

    /// The way back from [`write`](Self::write).
    fn read(words: &[u32]) -> Self {
        let mut words = words.iter().copied();
        let mut next = || words.next().expect("a step is read as it was written");
        let released = (0..next()).map(|_| next()).collect();
        let admitted = (0..next())
            .map(|_| {
                let (id, pages) = (next(), next());
                let [temperature, top_p, repetition_penalty] = [next(), next(), next()].map(f32::from_bits);
                let (top_k, top_logprobs) = (next() as usize, next() as usize);
                let seed = u64::from(next()) | u64::from(next()) << 32;
                let sampling = Sampling { temperature, top_p, top_k, repetition_penalty, seed, top_logprobs };
                RankAdmission { id, pages, sampling }
            })
            .collect();
        let feeds = (0..next())
            .map(|_| {
                let (id, sample, tokens) = (next(), next() == 1, next());
                RankFeed { id, sample, tokens: (0..tokens).map(|_| next()).collect() }
            })
            .collect();
        let token_offset = u64::from(next()) | u64::from(next()) << 32;
        RankStep { released, admitted, feeds, token_offset }
    }
}

/// One rank: its model, and the samplers of its sequences.
pub(crate) struct RankWorker {
    pub model: StepModel,
    samplers: HashMap<u32, Sampler>,
}

impl RankWorker {
    pub fn new(model: StepModel) -> Self {
        RankWorker { model, samplers: HashMap::new() }
    }

    /// Follows rank 0 until it says to stop.
    pub fn follow(&mut self, comm: &mut Comm) -> Result<(), InferError> {
        for step in 0.. {
            comm.begin_evaluation(step)?;
            let Some(order) = hear(comm)? else { break };
            let sampled = self.step(comm, &RankStep::read(&order))?;
            answer(comm, &sampled)?;
            comm.end_step();
        }
        comm.end_step();
        Ok(())
    }

    fn step(&mut self, comm: &mut Comm, step: &RankStep) -> Result<Vec<Sampled>, InferError> {
        for &id in &step.released {
            self.model.cache().release(id);
            self.samplers.remove(&id);
        }
        for RankAdmission { id, pages, sampling } in &step.admitted {
            self.model.cache().admit(*id, *pages as usize);
            self.samplers.insert(*id, Sampler::new(sampling.clone()));
        }
        let feeds: Vec<SequenceFeed<'_>> = step
            .feeds
            .iter()
            .map(|feed| {
                let logits = if feed.sample { LogitsOf::Last } else { LogitsOf::Nothing };
                SequenceFeed { id: feed.id, tokens: &feed.tokens, logits }
            })
            .collect();
        let batch = InferenceBatch { feeds: &feeds, token_offset: step.token_offset, truth: None };
        self.model.forward(comm, batch).map_err(|error| step_error(comm.rank(), error))?;
        let vocab = self.model.config().vocab;
        let mut rows = self.model.logits_mut().chunks_exact_mut(vocab);
        let mut sampled = Vec::new();
        for feed in &step.feeds {
            let sampler = self.samplers.get_mut(&feed.id).expect("an admitted sequence has a sampler");
            sampler.see(&feed.tokens);
            if feed.sample {
                let choice = sampler.sample(rows.next().expect("logits were asked for"))?;
                let id = SequenceId(feed.id);
                sampled.push(Sampled { id, token: choice.token, logprob: choice.logprob, top: choice.top });
            }
        }
        Ok(sampled)
    }
}

/// Numbers the ranks' tokens from `next` on, over all steps: every n-th of them is every n-th also where a step has but one.
fn number_tokens(steps: &mut [RankStep], next: &mut u64) {
    for step in steps {
        step.token_offset = *next;
        *next += step.feeds.iter().map(|feed| feed.tokens.len() as u64).sum::<u64>();
    }
}

/// A failed step as the job's failure: a result that a placement changed, or a GPU that fails, is this rank's fault, not bad
/// input.
pub(crate) fn step_error(rank: usize, error: StepError) -> InferError {
    match error {
        StepError::Comm(error) => InferError::Lost(error),
        error @ StepError::Verification(_) => CommError::RankFailed { rank, reason: error.to_string() }.into(),
        #[cfg(feature = "cuda")]
        StepError::Cuda(error @ lina_cuda::CudaError::Call { .. }) => {
            CommError::RankFailed { rank, reason: error.to_string() }.into()
        }
        #[cfg(feature = "cuda")]
        StepError::Cuda(error) => crate::device::device_error(error).into(),
        error => InferError::input(error),
    }
}

/// The job as rank 0 sees it.
pub(crate) struct Ranks<'a> {
    comm: &'a mut Comm,
    worker: RankWorker,
    limits: BackendLimits,
    emulated: bool,
    step: u64,
    /// Tokens of the steps before.
    tokens: u64,
    /// The rank of each sequence, and how many alternatives it reports.
    sequences: HashMap<SequenceId, (usize, usize)>,
    stats: InferenceStats,
}

impl<'a> Ranks<'a> {
    pub fn new(comm: &'a mut Comm, worker: RankWorker, limits: BackendLimits, emulated: bool) -> Self {
        let sequences = HashMap::new();
        Ranks { comm, worker, limits, emulated, step: 0, tokens: 0, sequences, stats: InferenceStats::default() }
    }

    /// Lets the other ranks end.
    pub fn stop(&mut self) -> Result<(), InferError> {
        self.comm.begin_evaluation(self.step)?;
        tell(self.comm, Command::Stop, &[])?;
        self.comm.end_step();
        Ok(())
    }

    /// What each rank has to do.
    fn divide(&mut self, plan: &StepPlan) -> Vec<RankStep> {
        let mut steps: Vec<RankStep> = (0..self.limits.ranks).map(|_| RankStep::default()).collect();
        for id in &plan.released {
            let (rank, _) = self.sequences.remove(id).expect("an admitted sequence is released once");
            steps[rank].released.push(id.0);
        }
        for Admission { id, rank, pages, sampling, .. } in &plan.admitted {
            self.sequences.insert(*id, (*rank, sampling.top_logprobs));
            let admission = RankAdmission { id: id.0, pages: *pages as u32, sampling: sampling.clone() };
            steps[*rank].admitted.push(admission);
        }
        for feed in &plan.feeds {
            let feed_of_rank = RankFeed { id: feed.id.0, sample: feed.sample, tokens: feed.tokens.clone() };
            steps[self.sequences[&feed.id].0].feeds.push(feed_of_rank);
        }
        number_tokens(&mut steps, &mut self.tokens);
        steps
    }

    /// Every other rank's answer.
    fn hear_answers(&mut self, steps: &[RankStep]) -> Result<Vec<Sampled>, InferError> {
        let words = |step: &RankStep| {
            let asked = step.feeds.iter().filter(|feed| feed.sample);
            asked.map(|feed| ANSWER_WORDS + 2 * self.sequences[&SequenceId(feed.id)].1).sum()
        };
        let recv_elements: Vec<usize> =
            steps.iter().enumerate().map(|(rank, step)| if rank == 0 { 0 } else { words(step) }).collect();
        let received = exchange(self.comm, Vec::new(), vec![0; steps.len()], recv_elements)?;
        let mut words = received.iter().map(|word| word.to_bits());
        let mut next = || words.next().expect("an answer has the length that was expected");
        let mut sampled = Vec::new();
        for feed in steps.iter().skip(1).flat_map(|step| &step.feeds).filter(|feed| feed.sample) {
            let id = SequenceId(feed.id);
            let (token, logprob) = (next(), f32::from_bits(next()));
            let top = (0..self.sequences[&id].1).map(|_| (next(), f32::from_bits(next()))).collect();
            sampled.push(Sampled { id, token, logprob, top });
        }
        Ok(sampled)
    }
}

impl Backend for Ranks<'_> {
    fn limits(&self) -> BackendLimits {
        self.limits
    }

    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, InferError> {
        let steps = self.divide(plan);
        self.comm.begin_evaluation(self.step)?;
        self.step += 1;
        tell(self.comm, Command::Step, &steps)?;
        let mut sampled = self.worker.step(self.comm, &steps[0])?;
        if self.limits.ranks > 1 {
            sampled.extend(self.hear_answers(&steps)?);
        }
        self.comm.end_step();
        self.stats.add(&self.worker.model.take_stats());
        // Sequences belong to ranks in no order; answers are in that of the plan.
        let mut by_id: HashMap<SequenceId, Sampled> =
            sampled.into_iter().map(|sampled| (sampled.id, sampled)).collect();
        let asked = plan.feeds.iter().filter(|feed| feed.sample);
        Ok(StepOutput { sampled: asked.map(|feed| by_id.remove(&feed.id).expect("every rank has answered")).collect() })
    }

    fn activity(&self) -> ExpertActivity {
        let config = self.worker.model.config();
        let resident = self.worker.model.resident();
        let layers = self.stats.layers.iter().zip(resident).enumerate();
        ExpertActivity {
            layers: layers
                .map(|(number, (layer, resident))| LayerActivity {
                    layer: config.moe_layer(number),
                    expert_tokens: layer.expert_rows.clone(),
                    device_tokens: layer.device_rows.clone(),
                    resident,
                })
                .collect(),
            checks: self.stats.total(|layer| layer.passes),
            replans: self.stats.total(|layer| layer.replans),
            moved_bytes: self.stats.total(|layer| layer.moved_bytes),
            emulated: self.emulated,
        }
    }
}

/// Tells every other rank what to do.
fn tell(comm: &mut Comm, command: Command, steps: &[RankStep]) -> Result<(), CommError> {
    let ranks = comm.ranks();
    if ranks == 1 {
        return Ok(());
    }
    let mut messages = vec![Vec::new()];
    for rank in 1..ranks {
        let mut words = vec![0, 0, command as u32];
        if let Some(step) = steps.get(rank) {
            step.write(&mut words);
        }
        words[0] = words.len() as u32;
        messages.push(words);
    }
    let longest = messages.iter().map(Vec::len).max().unwrap_or(0);
    messages[1..].iter_mut().for_each(|message| message[1] = longest as u32);
    let rounds = [(0, HEAD_WORDS), (HEAD_WORDS, longest)];
    for (start, end) in rounds.into_iter().filter(|(start, end)| start < end) {
        let mut send = Vec::new();
        let mut send_elements = vec![0; ranks];
        for (message, elements) in messages.iter().zip(&mut send_elements).skip(1) {
            let part = message.get(start..end.min(message.len()).max(start)).unwrap_or_default();
            send.extend(part.iter().map(|&word| f32::from_bits(word)));
            // The first part has one length, since nobody knows the message's yet.
            *elements = if start == 0 { HEAD_WORDS } else { part.len() };
            send.resize(send.len() + *elements - part.len(), 0.0);
        }
        exchange(comm, send, send_elements, vec![0; ranks])?;
    }
    Ok(())
}

/// What rank 0 tells this rank to do; `None` to stop.
fn hear(comm: &mut Comm) -> Result<Option<Vec<u32>>, CommError> {
    let ranks = comm.ranks();
    let mut part = |elements: usize| {
        let mut recv_elements = vec![0; ranks];
        recv_elements[0] = elements;
        let received = exchange(comm, Vec::new(), vec![0; ranks], recv_elements)?;
        Ok(received.into_iter().map(f32::to_bits))
    };
    let mut words: Vec<u32> = part(HEAD_WORDS)?.collect();
    let (length, longest) = (words[0] as usize, words[1] as usize);
    if longest > HEAD_WORDS {
        words.extend(part(length.saturating_sub(HEAD_WORDS))?);
    }
    let stop = words[2] == Command::Stop as u32;
    Ok((!stop).then(|| words[PREFIX_WORDS..length].to_vec()))
}

/// Tells rank 0 what this rank's sequences go on with.
fn answer(comm: &mut Comm, sampled: &[Sampled]) -> Result<(), CommError> {
    let mut words = Vec::new();
    for Sampled { token, logprob, top, .. } in sampled {
        words.extend([*token, logprob.to_bits()]);
        words.extend(top.iter().flat_map(|&(token, logprob)| [token, logprob.to_bits()]));
    }
    let mut send_elements = vec![0; comm.ranks()];
    send_elements[0] = words.len();
    let send = words.into_iter().map(f32::from_bits).collect();
    let recv_elements = vec![0; send_elements.len()];
    exchange(comm, send, send_elements, recv_elements).map(drop)
}

/// One exchange of words that travel as the bits of floats: what was received, rank by rank.
fn exchange(
    comm: &mut Comm,
    send: Vec<f32>,
    send_elements: Vec<usize>,
    recv_elements: Vec<usize>,
) -> Result<Vec<f32>, CommError> {
    let kind = AllToAllKind { direction: Direction::Forward, leg: Leg::Requests, layer: 0, chunk: 0, chunks: 1 };
    let recv = vec![0.0; recv_elements.iter().sum()];
    let ticket = comm.all_to_all(Exchange { kind, send, send_elements, recv, recv_elements })?;
    Ok(comm.wait(ticket)?.recv)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_numbered_over_ranks_and_steps() {
        let feed = |tokens: usize| RankFeed { id: 0, sample: true, tokens: vec![0; tokens] };
        let mut next = 0;
        let mut offsets = |feeds: [Vec<RankFeed>; 2]| {
            let mut steps = feeds.map(|feeds| RankStep { feeds, ..RankStep::default() });
            number_tokens(&mut steps, &mut next);
            steps.map(|step| step.token_offset)
        };
        assert_eq!(offsets([vec![feed(5), feed(2)], vec![feed(3)]]), [0, 7]);
        assert_eq!(offsets([vec![feed(1)], vec![]]), [10, 11]);
        assert_eq!(offsets([vec![], vec![feed(1)]]), [11, 11]);
    }

    #[test]
    fn a_step_is_read_as_it_was_written() {
        let sampling =
            Sampling { temperature: 0.7, top_k: 5, seed: u64::MAX - 3, top_logprobs: 2, ..Sampling::default() };
        let step = RankStep {
            released: vec![4, 2],
            admitted: vec![RankAdmission { id: 4, pages: 9, sampling }],
            feeds: vec![
                RankFeed { id: 4, sample: false, tokens: (0..300).collect() },
                RankFeed { id: 1, sample: true, tokens: vec![7] },
            ],
            token_offset: 1 << 40,
        };
        let mut words = Vec::new();
        step.write(&mut words);
        assert_eq!(RankStep::read(&words), step);
    }
}
