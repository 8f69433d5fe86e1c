//! What the paper measured, to stand beside what we do: Li et al., "Accelerating Distributed MoE Training and Inference
//! with Lina", USENIX ATC 2023, on 4 nodes of 4 A100 with 100 Gbit/s InfiniBand, one expert a GPU, top-2, against
//! DeepSpeed. Its models, devices and network are others, so figures compare in kind, not in size.

use serde::{Deserialize, Serialize};

use crate::PolicyRow;

/// Speed-up of a training step with everything, packing included, by number of experts (Figure 10).
const PACKED: [(usize, f64); 4] = [(2, 1.71), (4, 1.37), (8, 1.73), (16, 1.47)];
/// Its mean.
const PACKED_MEAN: f64 = 1.57;
/// Speed-up with priority and partitioning alone, by number of experts (Figure 14).
const PARTITIONED: [(usize, f64); 4] = [(2, 1.36), (4, 1.36), (8, 1.41), (16, 1.42)];
/// Mean speed-up with priority alone; 1.10 to 1.30 (Figure 14).
const PRIORITY_MEAN: f64 = 1.24;
/// By how much backward all-to-alls become faster with everything, by number of experts.
const BACKWARD: [(usize, f64); 3] = [(4, 2.21), (8, 2.39), (16, 2.31)];
/// Pipelining efficiency of the three models, without packing (Table 3).
pub(crate) const EFFICIENCY: [f64; 3] = [0.33, 0.36, 0.34];
/// The same with packing.
pub(crate) const EFFICIENCY_PACKED: [f64; 3] = [0.86, 0.85, 0.79];
/// Inference: how many times faster than static placement batches are at the 95th percentile, with 16 experts, for each
/// of the two models (Transformer-XL, BERT-Large).
pub(crate) const P95_OVER_STATIC: [f64; 2] = [1.82, 1.68];
/// The mean that the paper gives.
pub(crate) const P95_OVER_STATIC_MEAN: f64 = 1.63;
/// The same at the median.
pub(crate) const P50_OVER_STATIC: [f64; 2] = [1.54, 1.36];
/// Batches over those of a gate that is forced to balance, at the 95th percentile: from the best case to the worst.
pub(crate) const P95_VS_IDEAL: [f64; 2] = [1.04, 1.11];
/// Share of estimates whose 2k most popular experts were the true ones, by layers of the path.
pub(crate) const PATH_ACCURACY: [(usize, [f64; 2]); 3] =
    [(1, [0.316, 0.283]), (3, [0.604, 0.635]), (6, [0.714, 0.660])];
/// Share of layers for which phase two plans again.
pub(crate) const REPLANS: f64 = 0.23;
/// How much slower batches are without estimation, at the median.
pub(crate) const NO_ESTIMATION_P50: [f64; 2] = [0.240, 0.186];
/// How much slower batches are without phase two, at the 95th percentile.
pub(crate) const NO_FINE_TUNING_P95: [f64; 2] = [0.267, 0.331];
/// What the paper says of partition sizes.
pub(crate) const PARTITION_SIZES: &str = "The paper settles on 30 MB at 100 Gbit/s (2.4 ms on the wire): over 50 MB slows \
     two of its three models down, and under 10 MB the overhead of operations eats the gain.";

/// A policy's gains over `fair`, here and in the paper. Absent values are `null` in JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PaperRow {
    /// The policy's name.
    pub policy: String,
    /// Median step of `fair` over this policy's.
    pub step_speedup: Option<f64>,
    /// The paper's figure for as many experts, or its mean where it has none for that number.
    pub paper_step_speedup: Option<f64>,
    /// Backward all-to-all time of `fair` over this policy's; absent where this policy exchanges nothing.
    pub backward_a2a_speedup: Option<f64>,
    /// The paper's figure for as many experts.
    pub paper_backward_a2a_speedup: Option<f64>,
}

impl PaperRow {
    /// Puts `rows`, measured on a model of `experts` experts a layer, beside the paper's figures.
    pub fn beside(rows: &[PolicyRow], experts: usize) -> Vec<PaperRow> {
        let fair = rows.iter().find(|row| row.policy == "fair");
        let of = |figures: &[(usize, f64)]| figures.iter().find(|(of, _)| *of == experts).map(|&(_, figure)| figure);
        let row = |row: &PolicyRow| {
            let (paper_step_speedup, paper_backward_a2a_speedup) = match row.policy.as_str() {
                "fair" => (Some(1.0), Some(1.0)),
                "priority" => (Some(PRIORITY_MEAN), None),
                "partition" => (of(&PARTITIONED), None),
                "lina+packing" => (of(&PACKED).or(Some(PACKED_MEAN)), of(&BACKWARD)),
                _ => (None, None),
            };
            let backward = |fair: &PolicyRow| fair.a2a_backward_ms_median / row.a2a_backward_ms_median;
            PaperRow {
                policy: row.policy.clone(),
                step_speedup: row.speedup_vs_fair,
                paper_step_speedup,
                backward_a2a_speedup: fair.map(backward).filter(|speedup| speedup.is_finite()),
                paper_backward_a2a_speedup,
            }
        };
        rows.iter().map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests::row;

    #[test]
    fn figures_are_those_of_as_many_experts() {
        let rows = [row("fair", 29.0), row("partition", 20.0), row("lina+packing", 14.5), row("lina", 18.0)];
        let paper = |experts: usize| {
            let rows = PaperRow::beside(&rows, experts);
            rows.iter().map(|row| row.paper_step_speedup).collect::<Vec<_>>()
        };
        assert_eq!(paper(8), [Some(1.0), Some(1.41), Some(1.73), None]);
        assert_eq!(paper(6), [Some(1.0), None, Some(1.57), None]);
        let packed = &PaperRow::beside(&rows, 16)[2];
        assert_eq!((packed.step_speedup, packed.paper_backward_a2a_speedup), (Some(2.0), Some(2.31)));
        assert_eq!(packed.backward_a2a_speedup, Some(1.0));
    }

    #[test]
    fn without_all_to_alls_there_is_no_ratio_of_them() {
        let mut rows = [row("fair", 29.0), row("lina+packing", 14.5)];
        rows[1].a2a_backward_ms_median = 0.0;
        assert_eq!(PaperRow::beside(&rows, 2)[1].backward_a2a_speedup, None);
        assert_eq!(PaperRow::beside(&rows[1..], 2)[0].backward_a2a_speedup, None);
    }
}
