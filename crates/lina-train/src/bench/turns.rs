//! The turns of a comparison on one rank: interleaved, so that a slow minute of the machine hits every candidate.

use lina_comm::Comm;
use lina_plan::{AllReduceUnit, ExpertLayout, GapRule, PolicyRules};

use super::candidates::{Candidate, Candidates, Studies};
use super::sample::{Overlap, Sample};
use crate::TrainError;
use crate::adaptation::Adaptation;
use crate::config::{BenchConfig, RunConfig};
use crate::packing::{Packing, PackingPlan};
use crate::worker::Worker;

/// Turns and lengths of a comparison.
#[derive(Clone, Debug)]
pub(crate) struct BenchPlan {
    pub(super) candidates: Candidates,
    /// Whether the paper's figures stand beside the policies.
    pub(super) paper: bool,
    pub(super) rounds: usize,
    warmup_steps: u64,
    pub(super) steps: u64,
    /// Steps of a policy's turn in which nothing shares the link, to know what that costs; none where it is known.
    alone_steps: u64,
    /// For the candidates with packing.
    packing: Option<PackingPlan>,
    /// For the others.
    layout: ExpertLayout,
}

impl BenchPlan {
    /// What `bench` asks for, with `data_bytes` of data.
    ///
    /// # Errors
    /// If the configured layout of the experts cannot be.
    pub(crate) fn new(config: &RunConfig, bench: &BenchConfig, data_bytes: u64) -> Result<Self, TrainError> {
        Self::with_studies(config, bench, &Studies::default(), data_bytes)
    }

    /// The same with `studies` in the same rounds.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(super) fn with_studies(
        config: &RunConfig,
        bench: &BenchConfig,
        studies: &Studies,
        data_bytes: u64,
    ) -> Result<Self, TrainError> {
        let candidates = Candidates::new(config, &bench.policies, studies);
        let packs = candidates.all.iter().any(|candidate| candidate.schedule.packing);
        let exchanges = config.cluster.ranks > 1;
        Ok(BenchPlan {
            candidates,
            paper: studies.paper,
            rounds: bench.rounds,
            warmup_steps: bench.warmup_steps,
            steps: bench.steps,
            alone_steps: if exchanges && !config.is_emulated() { bench.steps.div_ceil(2) } else { 0 },
            packing: packs.then(|| PackingPlan::new(config, data_bytes, None)).transpose()?,
            layout: config.expert_layout().map_err(TrainError::input)?,
        })
    }

    /// Runs the turns on one rank, as steps `first_step`, ...; a turn's first steps let the policy learn its plan. In the
    /// first turn of a policy that packs or tunes itself, more steps before them let it decide; later ones begin with
    /// what it came to.
    /// `None` if `stop` asked for an end.
    pub(crate) fn run(
        &self,
        worker: &mut Worker<'_>,
        comm: &mut Comm,
        config: &RunConfig,
        first_step: u64,
        stop: impl Fn() -> bool,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Option<Vec<Sample>>, TrainError> {
        let mut samples = Vec::new();
        let mut step = first_step;
        let candidates = &self.candidates.all;
        let turns = self.rounds * candidates.len();
        let ladder = self.packing.as_ref().map(|plan| plan.start(worker, comm, first_step)).transpose()?;
        let adaptation = |Candidate { schedule, policy }: &Candidate| {
            let config = RunConfig { policy: *policy, ..config.clone() };
            Adaptation::new(&config, schedule.policy, ladder.clone().filter(|_| schedule.packing), None)
        };
        let mut adaptations: Vec<Adaptation> = candidates.iter().map(adaptation).collect();
        for turn in 0..turns {
            let candidate = turn % candidates.len();
            let adaptation = &mut adaptations[candidate];
            let layout = adaptation.packing().map_or(&self.layout, Packing::layout).clone();
            comm.set_rules(adaptation.rules());
            worker.repack(comm, &layout, step)?;
            if turn == candidate {
                for _ in 0..adaptation.longest_search_steps() {
                    if adaptation.settled() {
                        break;
                    }
                    let outcome = worker.step(comm, step, stop())?;
                    if outcome.stop {
                        return Ok(None);
                    }
                    step += 1;
                    adaptation.after_step(worker, comm, &outcome, step)?;
                }
            }
            let experts_per_rank = worker.model.expert_layout().most_per_rank();
            let rules = adaptation.rules();
            let alone_steps = if candidate < self.candidates.compared { self.alone_steps } else { 0 };
            for i in 0..self.warmup_steps + self.steps + alone_steps {
                if i == self.warmup_steps {
                    comm.record(true);
                }
                let alone = i >= self.warmup_steps + self.steps;
                if alone {
                    comm.set_rules(PolicyRules { gap: GapRule::AfterBackward, ..rules });
                }
                let outcome = worker.step(comm, step, stop())?;
                if outcome.stop {
                    return Ok(None);
                }
                if i >= self.warmup_steps {
                    samples.push(Sample {
                        candidate,
                        step,
                        alone,
                        experts_per_rank,
                        partition_bytes: match rules.unit {
                            AllReduceUnit::Partition(bytes) => bytes,
                            AllReduceUnit::Bucket(_) | AllReduceUnit::Tensor => 0,
                        },
                        pipeline_chunks: rules.moe.chunks,
                        overlap: Overlap::of(&comm.record(true)),
                        stats: outcome.stats,
                    });
                }
                step += 1;
            }
            comm.record(false);
            progress(turn + 1, turns);
        }
        Ok(Some(samples))
    }
}
