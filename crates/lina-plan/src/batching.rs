//! Which sequences a step of generation feeds, and with how many tokens.
//!
//! Requests join and leave between steps (iteration-level scheduling: "Orca: A Distributed Serving System for
//! Transformer-Based Generative Models", OSDI 2022). A sequence keeps its keys and values in pages of one rank (vLLM,
//! SOSP 2023), here set aside for its longest answer when it is admitted, so that none has to make way for another. A
//! prompt is fed in pieces beside the sequences that are already answering (chunked prefill, Sarathi-Serve, OSDI 2024):
//! these get their token first, and a long prompt only lengthens their steps up to the limit of a step.

use std::collections::{BTreeSet, VecDeque};

/// What ranks can take, and how much is to run at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Ranks; every sequence lives on one of them.
    pub ranks: usize,
    /// Tokens of a page of keys and values.
    pub page_tokens: usize,
    /// Pages of a rank.
    pub pages_per_rank: usize,
    /// Most tokens that a step feeds on one rank.
    pub step_tokens_per_rank: usize,
    /// Most sequences at once, on all ranks together.
    pub max_running: usize,
}

impl BatchLimits {
    /// Pages that hold `tokens` tokens.
    pub fn pages(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Most sequences of one rank: each of them must be able to get a token in the same step.
    fn sequences_per_rank(&self) -> usize {
        self.step_tokens_per_rank
    }
}

/// A request that will never fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoesNotFit {
    /// Pages that it needs.
    pub pages: usize,
    /// Pages that a rank has.
    pub pages_per_rank: usize,
}

/// What is decided for a step; releases come first, then admissions, then feeds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchStep {
    /// Slots of sequences that have left.
    pub released: Vec<u32>,
    /// Sequences that begin, in the order in which they came.
    pub admitted: Vec<AdmittedSequence>,
    /// What is fed: first the sequences that answer, then pieces of prompts, each in order of admission.
    pub feeds: Vec<SequenceFeed>,
}

/// A request becomes a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdmittedSequence {
    /// The request, as [`Batcher::enqueue`] got it.
    pub request: u64,
    /// Small number, taken by no other sequence until this one has been released.
    pub slot: u32,
    /// The rank that keeps its keys and values.
    pub rank: usize,
    /// Pages set aside there.
    pub pages: usize,
}

/// Tokens that one sequence gets in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceFeed {
    /// The request.
    pub request: u64,
    /// Its slot.
    pub slot: u32,
    /// Tokens that it has been fed before, of its prompt and of its answer.
    pub start: usize,
    /// Tokens that it gets; at least one.
    pub tokens: usize,
    /// Whether a token of the answer comes out.
    pub sample: bool,
    /// Whether that is the last one that the request allows: the sequence leaves by itself.
    pub last: bool,
}

/// A request that waits.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    request: u64,
    prompt_tokens: usize,
    max_new_tokens: usize,
}

/// A sequence that is fed.
#[derive(Clone, Copy, Debug)]
struct Running {
    waiting: Waiting,
    slot: u32,
    rank: usize,
    pages: usize,
    fed_tokens: usize,
    ended: bool,
}

impl Running {
    fn answers(&self) -> bool {
        self.fed_tokens >= self.waiting.prompt_tokens
    }
}

#[derive(Clone, Copy, Debug)]
struct RankUse {
    free_pages: usize,
    sequences: usize,
}

/// The queue of requests and the sequences that run.
///
/// Requests are admitted in the order in which they came: one that has to wait for pages holds up those behind it, which
/// is what keeps a long request from waiting forever.
#[derive(Clone, Debug)]
pub struct Batcher {
    limits: BatchLimits,
    queue: VecDeque<Waiting>,
    /// In order of admission.
    running: Vec<Running>,
    ranks: Vec<RankUse>,
    free_slots: BTreeSet<u32>,
    next_slot: u32,
}

impl Batcher {
    /// Nothing waits or runs yet. All limits are at least 1.
    pub fn new(limits: BatchLimits) -> Self {
        let BatchLimits { ranks, page_tokens, pages_per_rank, step_tokens_per_rank, max_running } = limits;
        assert!(
            [ranks, page_tokens, pages_per_rank, step_tokens_per_rank, max_running].iter().all(|&limit| limit > 0),
            "a limit of a batch is 0"
        );
        Batcher {
            limits,
            queue: VecDeque::new(),
            running: Vec::new(),
            ranks: vec![RankUse { free_pages: pages_per_rank, sequences: 0 }; ranks],
            free_slots: BTreeSet::new(),
            next_slot: 0,
        }
    }

    /// A request comes, with at least one token in its prompt and in its longest answer. Its number is the caller's and
    /// like that of no other request that waits or runs.
    ///
    /// # Errors
    /// If no rank has as many pages as it needs.
    pub fn enqueue(&mut self, request: u64, prompt_tokens: usize, max_new_tokens: usize) -> Result<(), DoesNotFit> {
        assert!(prompt_tokens > 0 && max_new_tokens > 0, "a request without a prompt or an answer");
        let waiting = Waiting { request, prompt_tokens, max_new_tokens };
        let (pages, pages_per_rank) = (self.pages_of(&waiting), self.limits.pages_per_rank);
        if pages > pages_per_rank {
            return Err(DoesNotFit { pages, pages_per_rank });
        }
        self.queue.push_back(waiting);
        Ok(())
    }

    /// A request ends early: its answer is complete, or nobody waits for it any more. One that has ended already, or is
    /// not known, changes nothing.
    pub fn end(&mut self, request: u64) {
        self.queue.retain(|waiting| waiting.request != request);
        self.running.iter_mut().filter(|running| running.waiting.request == request).for_each(|it| it.ended = true);
    }

    /// Decides the next step. What is decided counts as done: the next call decides the step after it.
    pub fn next_step(&mut self) -> BatchStep {
        let released = self.release();
        let admitted = std::iter::from_fn(|| self.admit_first()).collect();
        let feeds = self.feeds();
        BatchStep { released, admitted, feeds }
    }

    /// Requests that wait.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Sequences that are not yet at their end.
    pub fn running(&self) -> usize {
        self.running.iter().filter(|running| !running.ended).count()
    }

    /// Pages set aside for sequences that are not yet at their end, on all ranks together.
    pub fn used_pages(&self) -> usize {
        self.running.iter().filter(|running| !running.ended).map(|running| running.pages).sum()
    }

    /// Whether the next step would feed nothing.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running() == 0
    }

    fn pages_of(&self, waiting: &Waiting) -> usize {
        self.limits.pages(waiting.prompt_tokens.saturating_add(waiting.max_new_tokens))
    }

    /// Frees what ended sequences had, and names their slots.
    fn release(&mut self) -> Vec<u32> {
        let ended: Vec<Running> = self.running.extract_if(.., |running| running.ended).collect();
        for running in &ended {
            let rank = &mut self.ranks[running.rank];
            rank.free_pages += running.pages;
            rank.sequences -= 1;
            self.free_slots.insert(running.slot);
        }
        ended.iter().map(|running| running.slot).collect()
    }

    /// Admits the request that has waited longest, if there is room for it.
    fn admit_first(&mut self) -> Option<AdmittedSequence> {
        let waiting = *self.queue.front()?;
        if self.running.len() == self.limits.max_running {
            return None;
        }
        let pages = self.pages_of(&waiting);
        let rank = self.roomiest_rank(pages)?;
        self.queue.pop_front();
        self.ranks[rank].free_pages -= pages;
        self.ranks[rank].sequences += 1;
        let slot = self.free_slots.pop_first().unwrap_or_else(|| {
            self.next_slot += 1;
            self.next_slot - 1
        });
        self.running.push(Running { waiting, slot, rank, pages, fed_tokens: 0, ended: false });
        Some(AdmittedSequence { request: waiting.request, slot, rank, pages })
    }

    /// Of the ranks with room for another sequence of `pages` pages the one with the fewest sequences, which share the
    /// rank's step; among those the one with the most free pages.
    fn roomiest_rank(&self, pages: usize) -> Option<usize> {
        let most_sequences = self.limits.sequences_per_rank();
        let fits = |&rank: &usize| {
            let it = &self.ranks[rank];
            it.free_pages >= pages && it.sequences < most_sequences
        };
        (0..self.ranks.len()).filter(fits).min_by_key(|&rank| {
            let it = &self.ranks[rank];
            (it.sequences, std::cmp::Reverse(it.free_pages))
        })
    }

    /// A token for each sequence that answers; prompts get what that leaves of the step, the longest admitted first.
    fn feeds(&mut self) -> Vec<SequenceFeed> {
        let mut left_tokens = vec![self.limits.step_tokens_per_rank; self.ranks.len()];
        let (answering, prompts): (Vec<usize>, Vec<usize>) =
            (0..self.running.len()).partition(|&index| self.running[index].answers());
        let mut feeds = Vec::with_capacity(self.running.len());
        for index in answering.into_iter().chain(prompts) {
            let running = &mut self.running[index];
            let Waiting { request, prompt_tokens, max_new_tokens } = running.waiting;
            let start = running.fed_tokens;
            let wanted_tokens = prompt_tokens.saturating_sub(start).max(1);
            let tokens = wanted_tokens.min(left_tokens[running.rank]);
            if tokens == 0 {
                continue;
            }
            left_tokens[running.rank] -= tokens;
            running.fed_tokens += tokens;
            let sample = running.answers();
            // The first token of the answer follows the prompt, each further one the token before it.
            let last = sample && running.fed_tokens + 1 - prompt_tokens == max_new_tokens;
            running.ended = last;
            feeds.push(SequenceFeed { request, slot: running.slot, start, tokens, sample, last });
        }
        feeds
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn limits(ranks: usize, pages_per_rank: usize, step_tokens_per_rank: usize) -> BatchLimits {
        BatchLimits { ranks, page_tokens: 4, pages_per_rank, step_tokens_per_rank, max_running: 100 }
    }

    /// A slot's sequence as the ranks know it.
    #[derive(Debug)]
    struct Held {
        request: u64,
        rank: usize,
        pages: usize,
        fed_tokens: usize,
    }

    /// Carries steps out and checks each against the limits.
    #[derive(Debug)]
    struct Ranks {
        limits: BatchLimits,
        held: BTreeMap<u32, Held>,
        admitted: Vec<u64>,
        sampled: BTreeMap<u64, usize>,
    }

    impl Ranks {
        fn new(limits: BatchLimits) -> Self {
            Ranks { limits, held: BTreeMap::new(), admitted: Vec::new(), sampled: BTreeMap::new() }
        }

        fn carry_out(&mut self, step: &BatchStep) {
            for slot in &step.released {
                self.held.remove(slot).expect("only what is held is released");
            }
            for &AdmittedSequence { request, slot, rank, pages } in &step.admitted {
                let before = self.held.insert(slot, Held { request, rank, pages, fed_tokens: 0 });
                assert!(before.is_none(), "slot {slot} is taken");
                self.admitted.push(request);
            }
            assert!(self.held.len() <= self.limits.max_running);
            let mut fed = vec![0; self.limits.ranks];
            let mut slots = BTreeSet::new();
            let mut prompts = false;
            for feed in &step.feeds {
                let held = self.held.get_mut(&feed.slot).expect("only what is held is fed");
                assert!(slots.insert(feed.slot), "slot {} is fed twice", feed.slot);
                assert_eq!((held.request, held.fed_tokens), (feed.request, feed.start));
                assert!(feed.tokens > 0);
                held.fed_tokens += feed.tokens;
                assert!(held.fed_tokens <= held.pages * self.limits.page_tokens);
                fed[held.rank] += feed.tokens;
                let answers = self.sampled.contains_key(&feed.request);
                assert!(!(answers && prompts), "who answers comes first");
                prompts |= !answers;
                if feed.sample {
                    *self.sampled.entry(feed.request).or_default() += 1;
                }
            }
            for (rank, fed) in fed.into_iter().enumerate() {
                assert!(fed <= self.limits.step_tokens_per_rank);
                let pages: usize = self.held.values().filter(|held| held.rank == rank).map(|held| held.pages).sum();
                assert!(pages <= self.limits.pages_per_rank);
            }
        }
    }

    proptest! {
        #[test]
        fn every_request_ends_in_turn_and_within_limits(
            ranks in 1usize..5, page_tokens in 1usize..6, pages_per_rank in 1usize..12,
            step_tokens_per_rank in 1usize..20, max_running in 1usize..12,
            requests in prop::collection::vec((1usize..30, 1usize..20, 0usize..4, prop::option::of(1usize..15)), 1..40),
        ) {
            let limits = BatchLimits { ranks, page_tokens, pages_per_rank, step_tokens_per_rank, max_running };
            let mut batcher = Batcher::new(limits);
            let mut bodies = Ranks::new(limits);
            // Requests that end by themselves, with the length of their answers; those that a reader leaves early.
            let (mut expected, mut left, mut accepted) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
            let mut arrivals = requests.into_iter().enumerate();
            let mut steps = 0;
            loop {
                for (number, (prompt, answer, pause, leaves)) in arrivals.by_ref() {
                    let request = number as u64;
                    match batcher.enqueue(request, prompt, answer) {
                        Ok(()) => {
                            accepted.push(request);
                            match leaves {
                                Some(after) => left.insert(request, steps + after),
                                None => expected.insert(request, answer),
                            };
                        }
                        Err(refused) => {
                            prop_assert_eq!(refused.pages, (prompt + answer).div_ceil(page_tokens));
                            prop_assert!(refused.pages > pages_per_rank);
                        }
                    }
                    if pause == 0 {
                        break;
                    }
                }
                left.iter().filter(|&(_, &at)| at == steps).for_each(|(&request, _)| batcher.end(request));
                let step = batcher.next_step();
                let idle = step.feeds.is_empty();
                prop_assert!(!idle || batcher.is_idle(), "a step with work to do feeds somebody");
                bodies.carry_out(&step);
                steps += 1;
                if idle && arrivals.len() == 0 {
                    break;
                }
                // Alone, a request needs a step for each piece and each token.
                prop_assert!(steps < 40 * 50, "starved");
            }
            for (request, answer) in &expected {
                prop_assert_eq!(bodies.sampled.get(request), Some(answer));
            }
            // Who is not admitted has left before; all others in the order in which they came.
            accepted.retain(|request| bodies.admitted.contains(request) || !left.contains_key(request));
            prop_assert_eq!(&bodies.admitted, &accepted);
            prop_assert!(bodies.held.is_empty());
            prop_assert!(batcher.ranks.iter().all(|rank| rank.free_pages == pages_per_rank && rank.sequences == 0));
        }
    }

    #[test]
    fn who_answers_is_not_held_up_by_a_long_prompt() {
        let mut batcher = Batcher::new(limits(1, 100, 8));
        batcher.enqueue(1, 3, 10).unwrap();
        let fed = |batcher: &mut Batcher| -> Vec<_> {
            batcher.next_step().feeds.iter().map(|feed| (feed.request, feed.tokens, feed.sample)).collect()
        };
        assert_eq!(fed(&mut batcher), [(1, 3, true)]);
        batcher.enqueue(2, 20, 1).unwrap();
        batcher.enqueue(3, 2, 1).unwrap();
        assert_eq!(fed(&mut batcher), [(1, 1, true), (2, 7, false)]);
        assert_eq!(fed(&mut batcher), [(1, 1, true), (2, 7, false)]);
        // What the end of a prompt leaves of the step goes to the next one.
        assert_eq!(fed(&mut batcher), [(1, 1, true), (2, 6, true), (3, 1, false)]);
        assert_eq!(fed(&mut batcher), [(1, 1, true), (3, 1, true)]);
        assert_eq!(fed(&mut batcher), [(1, 1, true)]);
    }

    #[test]
    fn sequences_spread_over_ranks() {
        let mut batcher = Batcher::new(limits(3, 10, 8));
        for (request, tokens) in [(1, 8), (2, 4), (3, 4), (4, 4), (5, 4)] {
            batcher.enqueue(request, tokens, 4).unwrap();
        }
        let ranks: Vec<_> = batcher.next_step().admitted.iter().map(|it| (it.request, it.rank, it.pages)).collect();
        assert_eq!(ranks, [(1, 0, 3), (2, 1, 2), (3, 2, 2), (4, 1, 2), (5, 2, 2)]);
    }

    #[test]
    fn a_large_request_waits_for_pages_and_goes_first() {
        let mut batcher = Batcher::new(limits(1, 4, 8));
        batcher.enqueue(1, 4, 4).unwrap();
        batcher.enqueue(2, 8, 8).unwrap();
        batcher.enqueue(3, 1, 1).unwrap();
        assert_eq!(batcher.enqueue(4, 9, 8), Err(DoesNotFit { pages: 5, pages_per_rank: 4 }));
        let first = batcher.next_step();
        assert_eq!(first.admitted.len(), 1);
        assert_eq!((batcher.queued(), batcher.running(), batcher.used_pages()), (2, 1, 2));
        batcher.end(1);
        assert_eq!((batcher.running(), batcher.used_pages()), (0, 0));
        let second = batcher.next_step();
        assert_eq!(second.released, [0]);
        assert_eq!(second.admitted, [AdmittedSequence { request: 2, slot: 0, rank: 0, pages: 4 }]);
        assert_eq!(batcher.queued(), 1);
    }
}
