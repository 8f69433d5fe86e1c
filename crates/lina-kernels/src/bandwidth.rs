//! The rate at which this machine's memory can be read: the bound of a product of few rows, which reads every weight once.

use std::hint::black_box;
use std::time::Instant;

use crate::compute::{Compute, RowsMut};
use crate::huge_pages::advise_huge_pages;
use crate::isa::multiversion;
use crate::prefetch::{LINE, prefetch};

/// Far more than the caches hold.
const BUFFER_BYTES: usize = 256 << 20;
/// What a thread takes at a time: long enough for the processor's prefetchers, short enough that threads end together.
const BLOCK_FLOATS: usize = 256 * 1024;
/// Parts of a block that are read side by side, and how far ahead each asks for its lines (in floats): the fastest of those tried.
const STREAMS: usize = 4;
const AHEAD: usize = 512;
const ROUNDS: usize = 9;

/// Bytes a second that `ctx`'s threads read from memory: the median of a few rounds over a buffer of 256 MiB, which is allocated for the call.
pub fn read_bandwidth(ctx: &Compute) -> f64 {
    let floats = BUFFER_BYTES / size_of::<f32>();
    let mut buffer = vec![0.0_f32; floats];
    advise_huge_pages(&mut buffer);
    // Fresh pages are all backed by one page of zeros until they are written.
    ctx.parallel_rows(floats, BLOCK_FLOATS, RowsMut::new(&mut buffer, 1), |_, part| part.fill(1.0));
    let mut seconds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            ctx.parallel_for(floats / BLOCK_FLOATS, |block| {
                black_box(total(ctx.isa(), &buffer[block * BLOCK_FLOATS..][..BLOCK_FLOATS]));
            });
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    BUFFER_BYTES as f64 / seconds[ROUNDS / 2]
}

multiversion! {
    /// Reads streams side by side, which keeps more of the processor's prefetchers busy than one.
    fn total(block: &[f32]) -> f32 {
        let part = block.len() / STREAMS;
        let mut sums = [[0.0; 2 * LINE]; STREAMS];
        for at in (0..part).step_by(2 * LINE) {
            for (stream, sums) in sums.iter_mut().enumerate() {
                let from = &block[stream * part + at..][..2 * LINE];
                prefetch(from.as_ptr().wrapping_add(AHEAD));
                prefetch(from.as_ptr().wrapping_add(AHEAD + LINE));
                for (sum, x) in sums.iter_mut().zip(from) {
                    *sum += x;
                }
            }
        }
        sums.as_flattened().iter().sum()
    }
}
