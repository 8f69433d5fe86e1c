//! What a run changes about itself as it goes on: where experts are (packing), then the sizes of `lina-auto`.
//!
//! The decisions are the brain's ([`PackingController`](lina_plan::PackingController), [`Tuner`]), made alike on all
//! ranks from agreed numbers after every step; here they are asked for one after the other and carried out. Packing
//! comes first, since it changes what there is to tune, and waits while a search is under way, since trials change the
//! times that it compares.

use lina_comm::Comm;
use lina_model::ParameterLayout;
use lina_plan::{Policy, PolicyRules, PolicySettings, ReplicaCosts, Schedule, TUNING_STEPS, Tuner, TuningSample};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::RunConfig;
use crate::packing::Packing;
use crate::worker::{StepOutcome, Worker};

/// What of a search is in a checkpoint, so that a run goes on exactly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TuningState {
    /// Ranks of the run; on another number its findings mean nothing.
    ranks: usize,
    tuner: Tuner,
}

/// Adaptation under way on one rank; the same on all.
#[derive(Clone, Debug)]
pub(crate) struct Adaptation {
    policy: Policy,
    settings: PolicySettings,
    costs: ReplicaCosts,
    packing: Option<Packing>,
    tuner: Option<Tuner>,
}

impl Adaptation {
    /// Of a run of `policy` under `config`, with `packing` if it packs; a search goes on from `resumed` where that is
    /// of as many ranks.
    pub(crate) fn new(
        config: &RunConfig,
        policy: Policy,
        packing: Option<Packing>,
        resumed: Option<&TuningState>,
    ) -> Self {
        let settings = config.policy.settings();
        let tuner = (policy == Policy::LinaAuto).then(|| {
            let resumed = resumed.filter(|state| state.ranks == config.cluster.ranks);
            resumed.map_or_else(|| Tuner::new(settings, config.cluster.has_nodes()), |state| state.tuner.clone())
        });
        let elements = ParameterLayout::new(&config.model, &[]).expert_elements() * config.model.moe_layers();
        let costs = ReplicaCosts { expert_bytes: elements * size_of::<f32>(), nodes: config.cluster.node_count() };
        Adaptation { policy, settings, costs, packing, tuner }
    }

    /// The policy's switches for the next step.
    pub(crate) fn rules(&self) -> PolicyRules {
        PolicyRules::new(self.policy, self.settings())
    }

    /// The settings in force.
    pub(crate) fn settings(&self) -> &PolicySettings {
        self.tuner.as_ref().map_or(&self.settings, Tuner::settings)
    }

    /// The packing, if the run packs.
    pub(crate) fn packing(&self) -> Option<&Packing> {
        self.packing.as_ref()
    }

    /// Steps after which all has surely been decided, if packing goes no further.
    pub(crate) fn longest_search_steps(&self) -> u64 {
        let packing = self.packing.as_ref().map_or(0, Packing::longest_climb_steps);
        packing + self.tuner.as_ref().map_or(0, |_| TUNING_STEPS)
    }

    /// Whether nothing is being tried.
    pub(crate) fn settled(&self) -> bool {
        self.packing.as_ref().is_none_or(Packing::settled) && self.tuner.as_ref().is_none_or(Tuner::settled)
    }

    /// For a checkpoint.
    pub(crate) fn tuning_state(&self, ranks: usize) -> Option<TuningState> {
        self.tuner.as_ref().map(|tuner| TuningState { ranks, tuner: tuner.clone() })
    }

    /// Takes a step in, of which `steps` are done now, and changes what the brain says. All ranks call it together.
    /// Returns what there is to say of a change.
    pub(crate) fn after_step(
        &mut self,
        worker: &mut Worker<'_>,
        comm: &mut Comm,
        outcome: &StepOutcome,
        steps: u64,
    ) -> Result<Option<String>, TrainError> {
        let searching = self.tuner.as_ref().is_some_and(|tuner| !tuner.settled() && tuner.steps() > 0);
        if let Some(packing) = self.packing.as_mut().filter(|_| !searching) {
            let mut sample = outcome.packing;
            if self.policy == Policy::LinaAuto
                && let Some(link) = comm.link_use()
            {
                sample.forecast = packing.forecast(self.costs, &link, sample.all_to_all_wait_ns);
            }
            let change = packing.after_step(worker, comm, sample, steps)?;
            if change.is_some() || !packing.settled() {
                return Ok(change);
            }
        }
        let Some(tuner) = self.tuner.as_mut().filter(|tuner| !tuner.settled()) else { return Ok(None) };
        let sample = TuningSample {
            step_ns: outcome.packing.step_ns,
            suggested_partition_bytes: comm.link_use().map(|link| link.suggested_partition_bytes()),
        };
        if let Some(settings) = tuner.step(sample) {
            comm.set_rules(PolicyRules::new(self.policy, &settings));
        }
        Ok(tuner.settled().then(|| {
            let ms = tuner.best_step_ns().unwrap_or_default() / 1e6;
            format!(
                "step {steps}: {} settles on {}; its median step was {ms:.2} ms",
                Schedule { policy: self.policy, packing: self.packing.is_some() },
                describe(tuner.settings())
            )
        }))
    }
}

/// Settings in words.
pub(crate) fn describe(settings: &PolicySettings) -> String {
    let PolicySettings { partition_bytes, pipeline_chunks, defer_attention_gradients, hierarchical_all_to_all, .. } =
        *settings;
    let mut words = format!("partition_bytes = {partition_bytes}, pipeline_chunks = {pipeline_chunks}");
    if defer_attention_gradients {
        words += ", defer_attention_gradients";
    }
    if hierarchical_all_to_all {
        words += ", hierarchical_all_to_all";
    }
    words
}
