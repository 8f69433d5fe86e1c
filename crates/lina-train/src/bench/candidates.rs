//! What a comparison measures: the policies, and what the paper's studies add to them.

use lina_plan::{Policy, Schedule};

use crate::config::{PolicyConfig, RunConfig};

/// Which of the paper's studies `lina bench train` adds to its comparison, in the same rounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Studies {
    /// The paper's figures stand beside the policies.
    pub paper: bool,
    /// `lina` with these largest allreduce micro-ops, in bytes, and `lina-auto`; an empty list stands for steps of 2
    /// around the configured size.
    pub partition_sweep: Option<Vec<usize>>,
    /// `lina`, without and with packing, with several numbers of chunks.
    pub pipelining: bool,
}

impl Studies {
    /// The rows of the paper's ablation: one means after another. `fixed` is the schedule that the paper compares with.
    pub const ABLATION: [Schedule; 8] = [
        Schedule { policy: Policy::Fair, packing: false },
        Schedule { policy: Policy::Priority, packing: false },
        Schedule { policy: Policy::Fixed, packing: false },
        Schedule { policy: Policy::Partition, packing: false },
        Schedule { policy: Policy::Lina, packing: false },
        Schedule { policy: Policy::Lina, packing: true },
        Schedule { policy: Policy::LinaAuto, packing: false },
        Schedule { policy: Policy::LinaAuto, packing: true },
    ];
}

/// Numbers of chunks in the study of pipelining, besides the configured one.
const CHUNKS: [usize; 3] = [1, 2, 4];

/// What a row of a table is measured with.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) schedule: Schedule,
    /// Sizes, where they are not to be found by the policy itself.
    pub(super) policy: PolicyConfig,
}

/// Everything that is measured, and where each table finds its rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Candidates {
    /// Those of the comparison come first.
    pub(super) all: Vec<Candidate>,
    /// Number of those.
    pub(super) compared: usize,
    pub(super) partition_sweep: Vec<usize>,
    pub(super) pipelining: Vec<usize>,
}

impl Candidates {
    pub(super) fn new(config: &RunConfig, policies: &[Schedule], studies: &Studies) -> Self {
        let base = config.policy;
        let mut candidates = Candidates::default();
        for &schedule in policies {
            candidates.all.push(Candidate { schedule, policy: base });
        }
        candidates.compared = policies.len();
        if let Some(sizes) = &studies.partition_sweep {
            let mut sizes = if sizes.is_empty() { sizes_around(base.partition_bytes) } else { sizes.clone() };
            sizes.sort_unstable();
            sizes.dedup();
            let sized =
                sizes.into_iter().map(|partition_bytes| (Policy::Lina, PolicyConfig { partition_bytes, ..base }));
            candidates.partition_sweep = sized
                .chain([(Policy::LinaAuto, base)])
                .map(|(name, policy)| candidates.place(name.into(), policy))
                .collect();
        }
        if studies.pipelining {
            let mut chunks = [&CHUNKS[..], &[base.pipeline_chunks]].concat();
            chunks.sort_unstable();
            chunks.dedup();
            for packing in [false, true] {
                for &pipeline_chunks in &chunks {
                    let schedule = Schedule { policy: Policy::Lina, packing };
                    let place = candidates.place(schedule, PolicyConfig { pipeline_chunks, ..base });
                    candidates.pipelining.push(place);
                }
            }
        }
        candidates
    }

    /// The number of the candidate, which is added if it is not there.
    fn place(&mut self, schedule: Schedule, policy: PolicyConfig) -> usize {
        let candidate = Candidate { schedule, policy };
        self.all.iter().position(|other| *other == candidate).unwrap_or_else(|| {
            self.all.push(candidate);
            self.all.len() - 1
        })
    }
}

/// A quarter of a size, half of it, it, and so on up to four times as much.
fn sizes_around(bytes: usize) -> Vec<usize> {
    [bytes / 4, bytes / 2, bytes, bytes.saturating_mul(2), bytes.saturating_mul(4)].map(|bytes| bytes.max(4)).to_vec()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config() -> RunConfig {
        let text = "[model]\nkind = \"mixtral\"\nlayers = 1\nhidden = 8\nheads = 2\nexperts = 2\nexpert_hidden = 8\n\
                    [data]\nfiles = [\"a.txt\"]\n[policy]\npartition_bytes = 1024\npipeline_chunks = 3";
        RunConfig::parse(Path::new("run.toml"), text, &[]).unwrap()
    }

    #[test]
    fn a_table_finds_the_rows_that_another_measures() {
        let studies = Studies { paper: false, partition_sweep: Some(Vec::new()), pipelining: true };
        let found = Candidates::new(&config(), &Studies::ABLATION, &studies);
        let (lina, packed, auto) = (4, 5, 6);
        assert_eq!(found.compared, 8);
        let sizes =
            |numbers: &[usize]| numbers.iter().map(|&n| found.all[n].policy.partition_bytes).collect::<Vec<_>>();
        assert_eq!(sizes(&found.partition_sweep[..5]), [256, 512, 1024, 2048, 4096]);
        assert_eq!((found.partition_sweep[2], found.partition_sweep[5]), (lina, auto));
        let chunks: Vec<usize> = found.pipelining.iter().map(|&n| found.all[n].policy.pipeline_chunks).collect();
        assert_eq!(chunks, [1, 2, 3, 4, 1, 2, 3, 4]);
        assert_eq!((found.pipelining[2], found.pipelining[6]), (lina, packed));
        assert_eq!(found.all.len(), 8 + 4 + 6);
    }

    #[test]
    fn a_comparison_alone_has_its_policies_in_their_order() {
        let policies = [Policy::Lina.into(), Policy::Fair.into()];
        let found = Candidates::new(&config(), &policies, &Studies::default());
        assert_eq!(found.all.iter().map(|candidate| candidate.schedule).collect::<Vec<_>>(), policies);
        assert!(found.partition_sweep.is_empty() && found.pipelining.is_empty());
        let sweep = Studies { partition_sweep: Some(vec![64, 32, 64]), ..Studies::default() };
        assert_eq!(Candidates::new(&config(), &policies, &sweep).partition_sweep, [2, 3, 4]);
    }
}
