//! One measured step of a comparison, on one rank.

use lina_comm::{Lane, Nanos, Span, StepStats};

/// One measured step on one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Number of the candidate that was measured.
    pub(super) candidate: usize,
    pub(super) step: u64,
    /// Whether allreduces waited for the end of backward, so that nothing shared the link.
    pub(super) alone: bool,
    pub(super) experts_per_rank: usize,
    /// Largest allreduce micro-op; 0 where gradients are not cut.
    pub(super) partition_bytes: usize,
    pub(super) pipeline_chunks: usize,
    pub(super) overlap: Overlap,
    pub(super) stats: StepStats,
}

/// Words of a sample before those of its statistics.
const HEAD: usize = 8;

impl Sample {
    /// The sample as words, to send it to another process.
    pub(crate) fn words(&self) -> Vec<u64> {
        let &Sample { candidate, step, alone, experts_per_rank, partition_bytes, pipeline_chunks, overlap, stats } =
            self;
        let sizes = [candidate, experts_per_rank, partition_bytes, pipeline_chunks].map(|size| size as u64);
        let [candidate, experts_per_rank, partition_bytes, pipeline_chunks] = sizes;
        let Overlap { all_to_all, computing } = overlap;
        let head: [u64; HEAD] = [
            candidate,
            step,
            u64::from(alone),
            experts_per_rank,
            partition_bytes,
            pipeline_chunks,
            all_to_all,
            computing,
        ];
        [&head[..], &stats.to_words()].concat()
    }

    /// The sample that [`words`](Self::words) made words of.
    ///
    /// # Panics
    /// If there are too few words.
    pub(crate) fn from_words(words: &[u64]) -> Self {
        let Some((&head, stats)) = words.split_first_chunk::<HEAD>() else {
            panic!("a sample has {HEAD} words or more")
        };
        let [candidate, step, alone, experts_per_rank, partition_bytes, pipeline_chunks, all_to_all, computing] = head;
        Sample {
            candidate: candidate as usize,
            step,
            alone: alone > 0,
            experts_per_rank: experts_per_rank as usize,
            partition_bytes: partition_bytes as usize,
            pipeline_chunks: pipeline_chunks as usize,
            overlap: Overlap { all_to_all, computing },
            stats: StepStats::from_words(stats),
        }
    }
}

/// How much of a step's all-to-alls the rank computed through, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Overlap {
    /// All-to-alls were on the wire.
    pub(super) all_to_all: Nanos,
    /// Of which the rank computed.
    pub(super) computing: Nanos,
}

impl Overlap {
    /// Of a step's `spans`, whose spans of one lane do not overlap each other.
    pub(super) fn of(spans: &[Span]) -> Self {
        let lane = |lane: Lane| {
            let mut found: Vec<(Nanos, Nanos)> =
                spans.iter().filter(|span| span.lane == lane).map(|span| (span.start, span.end)).collect();
            found.sort_unstable();
            found
        };
        let (exchanges, works) = (lane(Lane::AllToAll), lane(Lane::Compute));
        let mut overlap = Overlap::default();
        let mut first = 0;
        for (start, end) in exchanges {
            overlap.all_to_all += end - start;
            first += works[first..].iter().take_while(|work| work.1 <= start).count();
            let through = works[first..].iter().take_while(|work| work.0 < end);
            overlap.computing += through.map(|work| work.1.min(end) - work.0.max(start)).sum::<Nanos>();
        }
        overlap
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_bring_everything_back() {
        let mut stats = StepStats { step: 7, deciding_wall: 9, ..StepStats::default() };
        stats.all_reduce = u64::MAX;
        let overlap = Overlap { all_to_all: 10, computing: 4 };
        let (candidate, experts_per_rank, partition_bytes, pipeline_chunks) = (3, 2, 1 << 20, 4);
        let sample = Sample {
            candidate,
            step: 5,
            alone: true,
            experts_per_rank,
            partition_bytes,
            pipeline_chunks,
            overlap,
            stats,
        };
        assert_eq!(Sample::from_words(&sample.words()), sample);
    }

    #[test]
    fn work_counts_while_an_all_to_all_is_on_the_wire() {
        let span = |lane, start, end| Span {
            rank: 0,
            lane,
            name: "",
            step: 0,
            layer: None,
            part: (0, 0),
            start,
            end,
            bytes: 0,
        };
        let spans = [
            span(Lane::AllToAll, 10, 20),
            span(Lane::AllToAll, 20, 40),
            span(Lane::Compute, 0, 12),
            span(Lane::Compute, 18, 23),
            span(Lane::Compute, 39, 50),
            span(Lane::AllReduce, 10, 40),
            span(Lane::AllToAll, 60, 70),
        ];
        assert_eq!(Overlap::of(&spans), Overlap { all_to_all: 40, computing: 2 + 2 + 3 + 1 });
        assert_eq!(Overlap::of(&[]), Overlap::default());
    }
}
