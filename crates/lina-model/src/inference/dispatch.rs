//! Where an MoE layer's tokens go in inference: computed alike on every rank from all ranks' counts and from how the
//! brain divides each expert's rows among its holders.
//!
//! A rank's assignments travel as rows in (destination rank, expert, token) order; where an expert has several
//! holders, a rank's rows for it are cut in token order. On a rank, rows end up in (expert, source rank, token) order.

use std::collections::VecDeque;

use lina_plan::TokenShares;

use crate::routing::{Block, ChunkPlan};

/// One layer's exchange in the pass under way.
#[derive(Debug, Default)]
pub(crate) struct DispatchPlan {
    /// What travels; its blocks name experts by number.
    pub chunk: ChunkPlan,
    /// `[tokens, top_k]`: row of each assignment among the rows sent.
    pub position: Vec<u32>,
    /// Local token of each row sent.
    pub token_of_row: Vec<u32>,
    /// Rows sent to a holder of an expert, in the order in which they travel.
    pieces: Vec<Piece>,
    /// For each expert, its pieces, next one first.
    pieces_of: Vec<VecDeque<usize>>,
    /// Rows received of each (source, expert).
    arrivals: Vec<(usize, Block)>,
}

/// This rank's rows for one holder of one expert.
#[derive(Debug)]
struct Piece {
    destination: u32,
    expert: u32,
    /// Rows that are not given to tokens yet.
    left: u32,
    /// The next of them.
    next: u32,
}

impl DispatchPlan {
    /// Decides every row's place on `rank`; `index` is `[tokens, top_k]`.
    pub fn place(&mut self, rank: usize, shares: &TokenShares, index: &[u32], top_k: usize) {
        self.chunk.reset(0..index.len() / top_k, shares.devices());
        self.place_sent(rank, shares, index, top_k);
        self.place_received(rank, shares);
    }

    /// Has blocks name the slots of this rank that `slot_of` its experts gives.
    #[cfg(feature = "cuda")]
    pub fn name_slots(&mut self, slot_of: impl Fn(usize) -> usize) {
        for block in self.chunk.blocks.iter_mut().chain(&mut self.chunk.runs) {
            block.slot = slot_of(block.slot);
        }
    }

    /// Rows that this rank's experts work on.
    pub fn rows(&self) -> usize {
        self.chunk.received()
    }

    fn place_sent(&mut self, rank: usize, shares: &TokenShares, index: &[u32], top_k: usize) {
        self.pieces.clear();
        for expert in 0..shares.experts() {
            self.pieces.extend(shares.of(rank, expert).iter().map(|share| Piece {
                destination: share.device,
                expert: expert as u32,
                left: share.rows,
                next: 0,
            }));
        }
        self.pieces.sort_unstable_by_key(|piece| (piece.destination, piece.expert));
        self.pieces_of.resize_with(shares.experts(), VecDeque::new);
        self.pieces_of.iter_mut().for_each(VecDeque::clear);
        let mut rows = 0;
        for (number, piece) in self.pieces.iter_mut().enumerate() {
            piece.next = rows;
            rows += piece.left;
            self.chunk.send_rows[piece.destination as usize] += piece.left as usize;
            self.pieces_of[piece.expert as usize].push_back(number);
        }
        self.chunk.sent = 0..rows as usize;
        self.position.clear();
        self.token_of_row.clear();
        self.token_of_row.resize(rows as usize, 0);
        for (token, choices) in index.chunks_exact(top_k).enumerate() {
            for &expert in choices {
                let pieces = &mut self.pieces_of[expert as usize];
                let piece = &mut self.pieces[*pieces.front().expect("shares cover every assignment")];
                self.position.push(piece.next);
                self.token_of_row[piece.next as usize] = token as u32;
                piece.next += 1;
                piece.left -= 1;
                if piece.left == 0 {
                    pieces.pop_front();
                }
            }
        }
    }

    fn place_received(&mut self, rank: usize, shares: &TokenShares) {
        let mut start = 0;
        self.arrivals.clear();
        for expert in 0..shares.experts() {
            for source in 0..shares.devices() {
                let parts = shares.of(source, expert).iter().filter(|share| share.device as usize == rank);
                let rows: usize = parts.map(|share| share.rows as usize).sum();
                if rows > 0 {
                    self.arrivals.push((source, Block { slot: expert, rows: start..start + rows }));
                    self.chunk.recv_rows[source] += rows;
                    start += rows;
                }
            }
        }
        // What arrives comes source by source, each source's rows by expert.
        self.arrivals.sort_by_key(|&(source, _)| source);
        self.chunk.blocks.extend(self.arrivals.drain(..).map(|(_, block)| block));
        self.chunk.join();
    }
}
