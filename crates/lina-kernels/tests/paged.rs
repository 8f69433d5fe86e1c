//! Paged attention against attention over whole sequences, and the independence of bits that continuous batching relies on.

mod common;

use common::random;
use lina_kernels::*;
use proptest::prelude::*;

/// Heads, their size and the window of a layer.
#[derive(Clone, Copy, Debug)]
struct Layer {
    heads_q: usize,
    heads_kv: usize,
    head_dim: usize,
    window: Option<usize>,
}

impl Layer {
    fn row_stride(&self) -> usize {
        (self.heads_q + 2 * self.heads_kv) * self.head_dim
    }

    fn out_width(&self) -> usize {
        self.heads_q * self.head_dim
    }
}

/// A cache whose free pages are handed out in an order of no meaning, and hold NaN.
struct Cache {
    data: Vec<f32>,
    free: Vec<u32>,
}

impl Cache {
    fn new(layer: Layer, pages: usize) -> Self {
        let count = u32::try_from(pages).unwrap();
        let free = (0..count).step_by(2).chain((1..count).step_by(2)).collect();
        Self { data: vec![f32::NAN; pages * page_elements(layer.heads_kv, layer.head_dim)], free }
    }

    fn grow(&mut self, pages: &mut Vec<u32>, tokens: usize) {
        while pages.len() * PAGE_TOKENS < tokens {
            pages.push(self.free.pop().unwrap());
        }
    }
}

/// Runs sequences of `lengths` tokens through a cache, in steps that advance sequence s by `pieces[step][s]` tokens, and returns each one's outputs.
fn run(ctx: &Compute, layer: Layer, lengths: &[usize], pieces: &[Vec<usize>]) -> Vec<Vec<f32>> {
    let tokens: Vec<Vec<f32>> =
        lengths.iter().zip(1..).map(|(length, seed)| scores(length * layer.row_stride(), seed)).collect();
    let total: usize = lengths.iter().map(|length| length.div_ceil(PAGE_TOKENS)).sum();
    let mut cache = Cache::new(layer, total + 3);
    let mut pages = vec![Vec::new(); lengths.len()];
    let mut done = vec![0; lengths.len()];
    let mut outputs = vec![Vec::new(); lengths.len()];
    for piece in pieces {
        // A row of no sequence before each one.
        let (mut qkv, mut start_rows) = (Vec::new(), Vec::new());
        for (index, &rows) in piece.iter().enumerate() {
            qkv.resize(qkv.len() + layer.row_stride(), f32::NAN);
            start_rows.push(qkv.len() / layer.row_stride());
            let from = done[index] * layer.row_stride();
            qkv.extend_from_slice(&tokens[index][from..from + rows * layer.row_stride()]);
            cache.grow(&mut pages[index], done[index] + rows);
        }
        let sequences: Vec<PagedSequence> = (0..piece.len())
            .filter(|&index| piece[index] > 0)
            .map(|index| PagedSequence {
                start_row: start_rows[index],
                rows: piece[index],
                past: done[index],
                pages: &pages[index],
            })
            .collect();
        let shape = PagedShape {
            window: layer.window,
            ..PagedShape::fused(&sequences, layer.heads_q, layer.heads_kv, layer.head_dim)
        };
        let width = layer.out_width();
        let mut out = vec![7.0; qkv.len() / layer.row_stride() * width];
        paged_append(ctx, &shape, &qkv, &mut cache.data);
        paged_attention(ctx, &shape, &qkv, &cache.data, &mut out);
        for (index, &rows) in piece.iter().enumerate() {
            let start = start_rows[index] * width;
            assert!(out[start - width..start].iter().all(|&x| x == 7.0), "a row of no sequence stays");
            outputs[index].extend_from_slice(&out[start..start + rows * width]);
            done[index] += rows;
        }
    }
    assert_eq!(done, lengths);
    outputs
}

/// Queries and keys large enough that a softmax is far from even.
fn scores(len: usize, seed: u64) -> Vec<f32> {
    random(len, seed).iter().map(|x| 3.0 * x).collect()
}

fn whole(ctx: &Compute, layer: Layer, length: usize, seed: u64) -> Vec<f32> {
    let sequences = [Sequence { start_row: 0, rows: length }];
    let shape = AttentionShape {
        window: layer.window,
        ..AttentionShape::fused(&sequences, layer.heads_q, layer.heads_kv, layer.head_dim)
    };
    let qkv = scores(length * layer.row_stride(), seed);
    let (mut out, mut lse) = (vec![0.0; length * layer.out_width()], vec![0.0; length * layer.heads_q]);
    attention_forward(ctx, &shape, &qkv, &mut out, &mut lse);
    out
}

fn bits(outputs: &[Vec<f32>]) -> Vec<Vec<u32>> {
    outputs.iter().map(|output| output.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn prefill_equals_attention_over_the_whole_sequence() {
    let layers = [
        Layer { heads_q: 4, heads_kv: 2, head_dim: 12, window: None },
        Layer { heads_q: 6, heads_kv: 1, head_dim: 33, window: Some(100) },
        Layer { heads_q: 2, heads_kv: 2, head_dim: 64, window: Some(1) },
        Layer { heads_q: 1, heads_kv: 1, head_dim: 1, window: Some(usize::MAX) },
    ];
    for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
        let ctx = Compute::with_isa(2, isa);
        for layer in layers {
            let lengths = [1, 64, 700, 129];
            let outputs = run(&ctx, layer, &lengths, &[lengths.to_vec()]);
            for ((output, length), seed) in outputs.iter().zip(lengths).zip(1..) {
                for (actual, expected) in output.iter().zip(whole(&ctx, layer, length, seed)) {
                    let error = (actual - expected).abs();
                    assert!(error < 1e-5 * expected.abs().max(1.0), "{layer:?}: {actual} instead of {expected}");
                }
            }
        }
    }
}

#[test]
fn a_token_at_a_time_has_the_bits_of_prefill() {
    // More than a span of pages, so that states are merged; alone it is cut by spans, in a batch it is not.
    let layer = Layer { heads_q: 5, heads_kv: 1, head_dim: 20, window: None };
    for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
        let ctx = Compute::with_isa(2, isa);
        let prefill = run(&ctx, layer, &[1100], &[vec![1100]]);
        let mut pieces = vec![vec![500]];
        pieces.extend(vec![vec![1]; 600]);
        assert!(bits(&run(&ctx, layer, &[1100], &pieces)) == bits(&prefill), "{isa:?}");
        let one = Compute::with_isa(1, isa);
        assert!(bits(&run(&one, layer, &[1100], &[vec![1], vec![1098], vec![1]])) == bits(&prefill), "{isa:?}");
    }
}

#[test]
#[should_panic(expected = "do not hold")]
fn pages_that_are_missing_are_a_bug_of_the_caller() {
    let sequences = [PagedSequence { start_row: 0, rows: 1, past: PAGE_TOKENS, pages: &[0] }];
    let shape = PagedShape::fused(&sequences, 1, 1, 4);
    paged_append(&Compute::new(1), &shape, &[0.0; 12], &mut vec![0.0; page_elements(1, 4)]);
}

#[test]
#[should_panic(expected = "is not in the cache")]
fn a_page_beyond_the_cache_is_a_bug_of_the_caller() {
    let sequences = [PagedSequence { start_row: 0, rows: 1, past: 0, pages: &[1] }];
    let shape = PagedShape::fused(&sequences, 1, 1, 4);
    paged_append(&Compute::new(1), &shape, &[0.0; 12], &mut vec![0.0; page_elements(1, 4)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// However sequences are cut into pieces and batched, and whatever the threads, every token has the bits that it has in a prefill of its own.
    #[test]
    fn bits_depend_on_the_sequence_alone(
        lengths in prop::collection::vec(1_usize..1300, 1..4),
        cuts in prop::collection::vec(prop::collection::vec(0.0_f64..1.0, 3), 0..4),
        heads in (1_usize..4, 1_usize..4), head_dim in 1_usize..40,
        window in prop::option::of(1_usize..900), threads in 1_usize..4, isa in 0_usize..3,
    ) {
        let layer = Layer { heads_q: heads.0 * heads.1, heads_kv: heads.1, head_dim, window };
        let isa = [Isa::Portable, Isa::Avx2, Isa::Avx512][isa];
        // Cumulative tokens of each sequence after each step.
        let mut ends: Vec<Vec<usize>> = cuts
            .iter()
            .map(|cut| lengths.iter().zip(cut).map(|(&length, cut)| (cut * length as f64) as usize).collect())
            .collect();
        ends.push(lengths.clone());
        let mut done = vec![0; lengths.len()];
        let mut pieces = Vec::new();
        for end in ends {
            let piece: Vec<usize> = end.iter().zip(&done).map(|(end, done)| end.saturating_sub(*done)).collect();
            done.iter_mut().zip(&piece).for_each(|(done, rows)| *done += rows);
            pieces.push(piece);
        }
        let together = run(&Compute::with_isa(threads, isa), layer, &lengths, &pieces);
        for (index, &length) in lengths.iter().enumerate() {
            let only: Vec<usize> = lengths.iter().enumerate().map(|(other, _)| if other == index { length } else { 0 }).collect();
            let others: Vec<usize> = lengths.iter().zip(&only).map(|(length, only)| length - only).collect();
            let alone = run(&Compute::with_isa(1, isa), layer, &lengths, &[only, others]);
            prop_assert!(bits(&alone[index..=index]) == bits(&together[index..=index]), "sequence {}", index);
        }
    }
}
