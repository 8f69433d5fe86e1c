//! Even splits that every rank computes alike: pipeline chunks of tokens, shares of a batch.

use std::ops::Range;

/// Source tokens of pipeline chunk `chunk` of `chunks`, of a rank with `tokens` tokens.
///
/// The number of chunks is agreed by all ranks, so a rank with few tokens has empty chunks, which are still sent.
pub fn chunk_range(tokens: usize, chunks: usize, chunk: usize) -> Range<usize> {
    share_range(tokens, chunks, chunk)
}

/// Items `[i·n/parts, (i+1)·n/parts)`: part `i` of `n` items split evenly over `parts`, in order, without a
/// divisibility rule; sizes differ by at most one.
pub fn share_range(n: usize, parts: usize, i: usize) -> Range<usize> {
    debug_assert!(i < parts);
    n * i / parts..n * (i + 1) / parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shares_cover_everything_once_and_evenly(n in 0usize..1000, parts in 1usize..40) {
            let shares: Vec<_> = (0..parts).map(|i| share_range(n, parts, i)).collect();
            prop_assert_eq!(shares[0].start, 0);
            prop_assert_eq!(shares[parts - 1].end, n);
            for pair in shares.windows(2) {
                prop_assert_eq!(pair[0].end, pair[1].start);
            }
            let sizes: Vec<_> = shares.iter().map(|r| r.len()).collect();
            prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
        }
    }
}
