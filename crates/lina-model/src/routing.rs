//! Where an MoE layer's tokens go: computed alike on every rank from the counts that all have exchanged, without a
//! look at the data.
//!
//! An *assignment* is a (token, slot) pair: a token makes `top_k` of them. A rank's assignments of one pipeline chunk
//! travel as rows in (destination rank, expert, token) order. On the rank that holds the experts, the rows of all
//! chunks and sources end up in *expert-major* order, (expert, source rank, token), whatever the number of chunks: so
//! each expert's weight gradient is one product over its rows in an order that no policy changes.

use std::ops::Range;

use lina_kernels::DROPPED;
use lina_plan::{ExpertLayout, chunk_range};

use crate::config::AuxLoss;

/// Which way tokens can go, fixed by the layout.
#[derive(Debug)]
pub(crate) struct Routes {
    rank: usize,
    ranks: usize,
    experts: usize,
    top_k: usize,
    /// Destination of this rank's tokens for each expert.
    destination: Vec<usize>,
    /// Experts by (destination, expert).
    send_order: Vec<usize>,
    /// For each source, (slot, expert) of this rank's experts that serve it.
    served: Vec<Vec<(usize, usize)>>,
    slots: usize,
}

impl Routes {
    pub fn new(layout: &ExpertLayout, rank: usize, top_k: usize) -> Self {
        let destination: Vec<usize> = (0..layout.experts()).map(|expert| layout.destination(rank, expert)).collect();
        let mut send_order: Vec<usize> = (0..layout.experts()).collect();
        send_order.sort_by_key(|&expert| (destination[expert], expert));
        let held = layout.held_by(rank);
        let serves = |source: usize| {
            let pairs = held.iter().copied().enumerate();
            pairs.filter(|&(_, expert)| layout.destination(source, expert) == rank).collect()
        };
        Routes {
            rank,
            ranks: layout.ranks(),
            experts: layout.experts(),
            top_k,
            destination,
            send_order,
            served: (0..layout.ranks()).map(serves).collect(),
            slots: held.len(),
        }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn top_k(&self) -> usize {
        self.top_k
    }
}

/// Rows of one expert from one source, or neighbouring ones of one expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// Which of the rank's experts.
    pub slot: usize,
    /// Expert-major rows.
    pub rows: Range<usize>,
}

/// What one pipeline chunk moves.
#[derive(Clone, Debug, Default)]
pub(crate) struct ChunkPlan {
    /// Local tokens.
    pub tokens: Range<usize>,
    /// Rows that this rank sends, as a range of [`RoutingPlan::token_of_row`].
    pub sent: Range<usize>,
    /// Rows to each rank.
    pub send_rows: Vec<usize>,
    /// Rows from each rank.
    pub recv_rows: Vec<usize>,
    /// What arrives, in the order in which it arrives: (source, expert).
    pub blocks: Vec<Block>,
    /// The same in expert-major order, neighbours of one expert joined.
    pub runs: Vec<Block>,
    /// The same rows, all neighbours joined.
    pub spans: Vec<Range<usize>>,
}

impl ChunkPlan {
    /// Rows that arrive.
    pub fn received(&self) -> usize {
        self.recv_rows.iter().sum()
    }

    /// `rows` rows for the expert in `slot`.
    pub fn of_one_expert(slot: usize, rows: usize) -> Self {
        let mut chunk = ChunkPlan { blocks: vec![Block { slot, rows: 0..rows }], ..ChunkPlan::default() };
        chunk.join();
        chunk
    }

    /// Puts the rows that arrived, of `width` elements each, into expert-major `rows`.
    pub fn place_arrived(&self, width: usize, arrived: &[f32], rows: &mut [f32]) {
        let mut arrived = arrived;
        for block in &self.blocks {
            let (piece, rest) = arrived.split_at(block.rows.len() * width);
            rows[block.rows.start * width..block.rows.end * width].copy_from_slice(piece);
            arrived = rest;
        }
    }

    /// Forgets everything, for other tokens.
    pub fn reset(&mut self, tokens: Range<usize>, ranks: usize) {
        self.tokens = tokens;
        self.send_rows.clear();
        self.send_rows.resize(ranks, 0);
        self.recv_rows.clear();
        self.recv_rows.resize(ranks, 0);
        self.blocks.clear();
        self.runs.clear();
        self.spans.clear();
    }

    /// Makes `runs` and `spans` of `blocks`.
    pub fn join(&mut self) {
        self.runs.extend_from_slice(&self.blocks);
        self.runs.sort_unstable_by_key(|run| run.rows.start);
        self.runs.dedup_by(|next, run| {
            let joined = run.slot == next.slot && run.rows.end == next.rows.start;
            if joined {
                run.rows.end = next.rows.end;
            }
            joined
        });
        for run in &self.runs {
            match self.spans.last_mut() {
                Some(span) if span.end == run.rows.start => span.end = run.rows.end,
                _ => self.spans.push(run.rows.clone()),
            }
        }
    }
}

/// One layer's routing in the pass under way.
#[derive(Debug, Default)]
pub(crate) struct RoutingPlan {
    pub chunks: Vec<ChunkPlan>,
    /// `[tokens, top_k]`: row of each assignment within its chunk's rows, or [`DROPPED`].
    pub position: Vec<u32>,
    /// Local token of each row sent, chunk after chunk.
    pub token_of_row: Vec<u32>,
    /// Expert-major rows of each of the rank's experts.
    pub slot_rows: Vec<Range<usize>>,
    /// Local assignments beyond capacity.
    pub dropped: u64,
    /// `[ranks, chunks, experts]`: assignments made, before capacity.
    assigned: Vec<u32>,
    /// `[ranks, experts]`: tokens whose first choice the expert is.
    first_choices: Vec<u32>,
    /// As `assigned`, within capacity.
    kept: Vec<u32>,
    /// `[chunks, experts]`: first of this rank's rows for each expert, within its chunk's rows.
    pub row_starts: Vec<u32>,
    /// `[chunks, experts]`: end of those rows.
    pub row_ends: Vec<u32>,
    /// Counters of one value per expert.
    next: Vec<u32>,
}

impl RoutingPlan {
    /// All expert-major rows.
    pub fn rows(&self) -> usize {
        self.slot_rows.last().map_or(0, |rows| rows.end)
    }

    /// Numbers that a rank tells every other: counts per chunk and expert, then first choices per expert.
    pub fn message_len(routes: &Routes, chunks: usize) -> usize {
        (chunks + 1) * routes.experts
    }

    /// Counts this rank's assignments; `index` is `[tokens, top_k]`.
    pub fn count(&mut self, routes: &Routes, index: &[u32], chunks: usize) {
        let Routes { rank, ranks, experts, top_k, .. } = *routes;
        let tokens = index.len() / top_k;
        reset(&mut self.assigned, ranks * chunks * experts);
        reset(&mut self.first_choices, ranks * experts);
        self.chunks.resize_with(chunks, ChunkPlan::default);
        for (number, chunk) in self.chunks.iter_mut().enumerate() {
            chunk.reset(chunk_range(tokens, chunks, number), ranks);
            let counts = &mut self.assigned[(rank * chunks + number) * experts..][..experts];
            for &expert in &index[chunk.tokens.start * top_k..chunk.tokens.end * top_k] {
                counts[expert as usize] += 1;
            }
        }
        let first_choices = &mut self.first_choices[rank * experts..][..experts];
        for token in index.chunks_exact(top_k) {
            first_choices[token[0] as usize] += 1;
        }
    }

    /// As [`count`](Self::count), where a device has counted: `counts` is `[chunks + 1, experts]`, assignments of each chunk
    /// and then first choices.
    #[cfg(feature = "cuda")]
    pub fn take_counts(&mut self, routes: &Routes, tokens: usize, chunks: usize, counts: &[u32]) {
        let Routes { rank, ranks, experts, .. } = *routes;
        reset(&mut self.assigned, ranks * chunks * experts);
        reset(&mut self.first_choices, ranks * experts);
        self.chunks.resize_with(chunks, ChunkPlan::default);
        for (number, chunk) in self.chunks.iter_mut().enumerate() {
            chunk.reset(chunk_range(tokens, chunks, number), ranks);
        }
        let (assigned, first_choices) = counts.split_at(chunks * experts);
        self.assigned[rank * chunks * experts..][..chunks * experts].copy_from_slice(assigned);
        self.first_choices[rank * experts..][..experts].copy_from_slice(first_choices);
    }

    /// Writes this rank's message for another; counts travel as the bits of floats.
    pub fn write_message(&self, routes: &Routes, message: &mut [f32]) {
        let (counts, first_choices) = self.own(routes, routes.rank);
        for (element, &count) in message.iter_mut().zip(counts.iter().chain(first_choices)) {
            *element = f32::from_bits(count);
        }
    }

    /// Takes the message of rank `source` in.
    pub fn read_message(&mut self, routes: &Routes, source: usize, message: &[f32]) {
        let per_rank = self.chunks.len() * routes.experts;
        let (counts, first_choices) = message.split_at(per_rank);
        let assigned = &mut self.assigned[source * per_rank..][..per_rank];
        assigned.iter_mut().zip(counts).for_each(|(count, element)| *count = element.to_bits());
        let first = &mut self.first_choices[source * routes.experts..][..routes.experts];
        first.iter_mut().zip(first_choices).for_each(|(count, element)| *count = element.to_bits());
    }

    fn own(&self, routes: &Routes, rank: usize) -> (&[u32], &[u32]) {
        let per_rank = self.chunks.len() * routes.experts;
        let first_choices = &self.first_choices[rank * routes.experts..][..routes.experts];
        (&self.assigned[rank * per_rank..][..per_rank], first_choices)
    }

    /// Assignments of this rank's tokens to `expert`, before capacity.
    pub fn local_assignments(&self, routes: &Routes, expert: usize) -> u64 {
        let (counts, _) = self.own(routes, routes.rank);
        counts.iter().skip(expert).step_by(routes.experts).map(|&count| u64::from(count)).sum()
    }

    /// Assignments of all ranks' tokens to `expert`, before capacity.
    pub fn global_assignments(&self, routes: &Routes, expert: usize) -> u64 {
        self.assigned.iter().skip(expert).step_by(routes.experts).map(|&count| u64::from(count)).sum()
    }

    /// Tokens of all ranks whose first choice is `expert`.
    pub fn global_first_choices(&self, routes: &Routes, expert: usize) -> u64 {
        self.first_choices.iter().skip(expert).step_by(routes.experts).map(|&count| u64::from(count)).sum()
    }

    /// Tokens of all ranks.
    pub fn global_tokens(&self) -> u64 {
        self.first_choices.iter().map(|&count| u64::from(count)).sum()
    }

    /// What a unit more of an expert's probability, in one token, adds to the load-balancing loss.
    pub fn balance_slope(&self, routes: &Routes, loss: AuxLoss, expert: usize) -> f64 {
        let tokens = self.global_tokens().max(1) as f64;
        let chosen = match loss {
            AuxLoss::Gshard => self.global_first_choices(routes, expert),
            AuxLoss::Switch | AuxLoss::None => self.global_assignments(routes, expert),
        };
        routes.experts as f64 * (chosen as f64 / tokens) / tokens
    }

    /// Decides every row's place, once all ranks' counts are known.
    pub fn place(&mut self, routes: &Routes, index: &[u32], capacity_factor: Option<f32>) {
        self.place_counts(routes, capacity_factor);
        self.place_tokens(routes, index);
    }

    /// The part of [`place`](Self::place) that needs counts alone: where each expert's rows are, not which token is which.
    pub fn place_counts(&mut self, routes: &Routes, capacity_factor: Option<f32>) {
        self.keep(routes, capacity_factor);
        self.place_sent(routes);
        self.place_received(routes);
    }

    /// Cuts each expert's assignments off at its capacity, in (rank, token, slot) order.
    fn keep(&mut self, routes: &Routes, capacity_factor: Option<f32>) {
        let experts = routes.experts;
        self.kept.clone_from(&self.assigned);
        let Some(factor) = capacity_factor else { return };
        let mean = (self.global_tokens() * routes.top_k as u64) as f64 / experts as f64;
        // The product rounds to f32, so that 0.8 of 2.5 is 2 and not a little more, which would be cut off at 3.
        let capacity = (factor * mean as f32).ceil() as u32;
        reset(&mut self.next, experts);
        for counts in self.kept.chunks_exact_mut(experts) {
            for (count, used) in counts.iter_mut().zip(&mut self.next) {
                *count = (*count).min(capacity - *used);
                *used += *count;
            }
        }
    }

    fn place_sent(&mut self, routes: &Routes) {
        let Routes { rank, experts, .. } = *routes;
        let chunks = self.chunks.len();
        reset(&mut self.row_starts, chunks * experts);
        reset(&mut self.row_ends, chunks * experts);
        let mut first = 0;
        for (number, chunk) in self.chunks.iter_mut().enumerate() {
            let of_chunk = number * experts..(number + 1) * experts;
            let kept = &self.kept[rank * chunks * experts..][of_chunk.clone()];
            let (starts, ends) = (&mut self.row_starts[of_chunk.clone()], &mut self.row_ends[of_chunk]);
            let mut rows = 0;
            for &expert in &routes.send_order {
                starts[expert] = rows;
                rows += kept[expert];
                ends[expert] = rows;
                chunk.send_rows[routes.destination[expert]] += kept[expert] as usize;
            }
            chunk.sent = first..first + rows as usize;
            first = chunk.sent.end;
        }
        let own = |counts: &[u32]| -> u64 {
            counts[rank * chunks * experts..][..chunks * experts].iter().map(|&count| u64::from(count)).sum()
        };
        self.dropped = own(&self.assigned) - own(&self.kept);
    }

    /// Gives every assignment its row: in (token, slot) order within each expert's rows of a chunk.
    fn place_tokens(&mut self, routes: &Routes, index: &[u32]) {
        let Routes { experts, top_k, .. } = *routes;
        self.position.clear();
        reset(&mut self.token_of_row, self.chunks.last().map_or(0, |chunk| chunk.sent.end));
        for (number, chunk) in self.chunks.iter().enumerate() {
            let of_chunk = number * experts..(number + 1) * experts;
            self.next.clear();
            self.next.extend_from_slice(&self.row_starts[of_chunk.clone()]);
            let ends = &self.row_ends[of_chunk];
            let token_of_row = &mut self.token_of_row[chunk.sent.clone()];
            for token in chunk.tokens.clone() {
                for &expert in &index[token * top_k..][..top_k] {
                    let expert = expert as usize;
                    let row = self.next[expert];
                    if row == ends[expert] {
                        self.position.push(DROPPED);
                    } else {
                        self.position.push(row);
                        token_of_row[row as usize] = token as u32;
                        self.next[expert] += 1;
                    }
                }
            }
        }
    }

    fn place_received(&mut self, routes: &Routes) {
        let Routes { ranks, experts, .. } = *routes;
        let chunks = self.chunks.len();
        let kept = |source: usize, chunk: usize, expert: usize| {
            self.kept[(source * chunks + chunk) * experts + expert] as usize
        };
        self.slot_rows.clear();
        self.slot_rows.resize(routes.slots, 0..0);
        for source in 0..ranks {
            for &(slot, expert) in &routes.served[source] {
                self.slot_rows[slot].end += (0..chunks).map(|chunk| kept(source, chunk, expert)).sum::<usize>();
            }
        }
        let mut start = 0;
        for rows in &mut self.slot_rows {
            *rows = start..start + rows.len();
            start = rows.end;
        }
        reset(&mut self.next, routes.slots);
        for (next, rows) in self.next.iter_mut().zip(&self.slot_rows) {
            *next = rows.start as u32;
        }
        for source in 0..ranks {
            for (number, chunk) in self.chunks.iter_mut().enumerate() {
                for &(slot, expert) in &routes.served[source] {
                    let count = self.kept[(source * chunks + number) * experts + expert];
                    let rows = self.next[slot] as usize..(self.next[slot] + count) as usize;
                    self.next[slot] += count;
                    chunk.recv_rows[source] += rows.len();
                    if !rows.is_empty() {
                        chunk.blocks.push(Block { slot, rows });
                    }
                }
            }
        }
        self.chunks.iter_mut().for_each(ChunkPlan::join);
    }
}

fn reset(values: &mut Vec<u32>, len: usize) {
    values.clear();
    values.resize(len, 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Plans of all ranks, given each rank's choices.
    fn plans(
        layout: &ExpertLayout,
        top_k: usize,
        index: &[Vec<u32>],
        chunks: usize,
        factor: Option<f32>,
    ) -> Vec<RoutingPlan> {
        let routes: Vec<Routes> = (0..layout.ranks()).map(|rank| Routes::new(layout, rank, top_k)).collect();
        let mut plans: Vec<RoutingPlan> = routes
            .iter()
            .zip(index)
            .map(|(routes, index)| {
                let mut plan = RoutingPlan::default();
                plan.count(routes, index, chunks);
                plan
            })
            .collect();
        let messages: Vec<Vec<f32>> = routes
            .iter()
            .zip(&plans)
            .map(|(routes, plan)| {
                let mut message = vec![0.0; RoutingPlan::message_len(routes, chunks)];
                plan.write_message(routes, &mut message);
                message
            })
            .collect();
        for ((plan, routes), index) in plans.iter_mut().zip(&routes).zip(index) {
            for (source, message) in messages.iter().enumerate() {
                plan.read_message(routes, source, message);
            }
            plan.place(routes, index, factor);
        }
        plans
    }

    /// What each rank's experts hold after every row has travelled: (source, token, slot of the choice), expert-major.
    fn travel(layout: &ExpertLayout, top_k: usize, plans: &[RoutingPlan]) -> Vec<Vec<(usize, u32, usize)>> {
        let mut held: Vec<Vec<_>> = plans.iter().map(|plan| vec![(usize::MAX, 0, 0); plan.rows()]).collect();
        for chunk in 0..plans[0].chunks.len() {
            for (destination, held) in held.iter_mut().enumerate() {
                let mut arriving = Vec::new();
                for (source, plan) in plans.iter().enumerate() {
                    let plan_chunk = &plan.chunks[chunk];
                    let rows = plan_chunk.send_rows[destination];
                    assert_eq!(rows, plans[destination].chunks[chunk].recv_rows[source]);
                    let start: usize = plan_chunk.send_rows[..destination].iter().sum();
                    for row in start..start + rows {
                        let token = plan.token_of_row[plan_chunk.sent.start + row];
                        let choices = &plan.position[token as usize * top_k..][..top_k];
                        let choice = choices.iter().position(|&position| position == row as u32).unwrap();
                        arriving.push((source, token, choice));
                    }
                }
                let mut arriving = arriving.into_iter();
                for block in &plans[destination].chunks[chunk].blocks {
                    for row in block.rows.clone() {
                        held[row] = arriving.next().unwrap();
                    }
                }
                assert!(arriving.next().is_none());
            }
        }
        assert_eq!(held.len(), layout.ranks());
        held
    }

    proptest! {
        #[test]
        fn every_row_arrives_where_its_expert_is_in_an_order_without_chunks(
            experts in 1usize..7, ranks in 1usize..5, packing in 0usize..3, chunks in 1usize..5,
            choices in prop::collection::vec(0usize..1000, 0..40), factor in prop::option::of(0.2f32..2.0),
        ) {
            let per_rank = (packing > 0).then(|| (experts.div_ceil(ranks) * packing).min(experts));
            let layout = ExpertLayout::new(experts, ranks, per_rank).unwrap();
            let top_k = experts.min(2);
            let mut index = vec![Vec::new(); ranks];
            for choice in choices {
                for slot in 0..top_k {
                    index[choice % ranks].push(((choice / ranks + slot) % experts) as u32);
                }
            }
            let whole = plans(&layout, top_k, &index, 1, factor);
            let cut = plans(&layout, top_k, &index, chunks, factor);
            let held = travel(&layout, top_k, &cut);
            prop_assert_eq!(&held, &travel(&layout, top_k, &whole));
            for (rank, rows) in held.iter().enumerate() {
                for (slot, &expert) in layout.held_by(rank).iter().enumerate() {
                    let of_expert = &rows[cut[rank].slot_rows[slot].clone()];
                    prop_assert!(of_expert.is_sorted());
                    for &(source, token, choice) in of_expert {
                        prop_assert_eq!(index[source][token as usize * top_k + choice] as usize, expert);
                        prop_assert_eq!(layout.destination(source, expert), rank);
                    }
                }
            }
            let assignments: usize = index.iter().map(Vec::len).sum();
            let kept: usize = held.iter().map(Vec::len).sum();
            let dropped: u64 = cut.iter().map(|plan| plan.dropped).sum();
            prop_assert_eq!(kept + dropped as usize, assignments);
            if factor.is_none() {
                prop_assert_eq!(dropped, 0);
            }
        }
    }

    #[test]
    fn capacity_keeps_the_first_in_rank_token_slot_order() {
        let layout = ExpertLayout::new(2, 2, None).unwrap();
        // Five tokens, top-1: expert 0 is chosen by four; it keeps ceil(0.8 * 5 / 2) = 2, both of rank 0.
        let index = [vec![0, 1, 0], vec![0, 0]];
        let plans = plans(&layout, 1, &index, 2, Some(0.8));
        // Two chunks of rank 0: token 0 alone, then tokens 1 and 2 with expert 0's row first.
        assert_eq!(plans[0].position, [0, 1, 0]);
        assert_eq!(plans[1].position, [DROPPED, DROPPED]);
        assert_eq!((plans[0].dropped, plans[1].dropped), (0, 2));
        assert_eq!((plans[0].rows(), plans[0].slot_rows.len()), (2, 1));
    }
}
