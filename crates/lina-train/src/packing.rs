//! Expert packing of a run: asks the controller (`lina-plan`) after every step, and carries its decisions out.
//!
//! A change happens between two steps. In one exchange a layer, every expert's parameters and optimizer moments go from
//! a rank that holds it to every rank that is to hold it and does not yet; then the model and the optimizer take their
//! new buffers and the reduction groups become those of the new layout. Dense parameters stay where they are. No
//! number changes on the way: a run that packs goes on as one that started in the new layout would.

use lina_comm::{AllToAllKind, Comm, Direction, Exchange, Leg, Nanos};
use lina_model::ParameterLayout;
use lina_plan::{
    ExpertLayout, LinkUse, PackingController, PackingForecast, PackingLadder, PackingSample, ReplicaCosts,
};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::RunConfig;
use crate::memory::MemoryPlan;
use crate::optimizer::Moments;
use crate::residency::{fits_devices, residency, sentence};
use crate::worker::Worker;

/// What of packing is in a checkpoint, so that a run goes on exactly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PackingState {
    /// Ranks of the run; on another number its decisions mean nothing.
    ranks: usize,
    /// Experts on each rank, as decided.
    experts_per_rank: usize,
    controller: PackingController,
}

/// The layouts of a run that packs, before its ranks have started.
#[derive(Clone, Debug)]
pub(crate) struct PackingPlan {
    ladder: PackingLadder,
    /// How many of the ladder's layouts, from its first, fit in memory as far as this process knows.
    fitting: usize,
    controller: PackingController,
}

impl PackingPlan {
    /// The plan of `config` with `data_bytes` of data, going on from `resumed` where that fits.
    ///
    /// # Errors
    /// If the configured layout cannot be.
    pub(crate) fn new(config: &RunConfig, data_bytes: u64, resumed: Option<&PackingState>) -> Result<Self, TrainError> {
        let ladder = config.packing_ladder().map_err(TrainError::input)?;
        let limit_bytes = config.cluster.memory_limit_bytes();
        let changes = ladder.layouts().windows(2);
        let fits = |change: &[ExpertLayout]| {
            let moving_bytes = moving_bytes(config, &change[0], &change[1]);
            MemoryPlan::new(config, &change[1], data_bytes).fits(moving_bytes, limit_bytes)
                && fits_devices(config, &change[1])
        };
        let fitting = 1 + changes.take_while(|change| fits(change)).count();
        let same_ranks = |state: &&PackingState| state.ranks == config.cluster.ranks;
        let controller = resumed.filter(same_ranks).map(|state| (state.experts_per_rank, &state.controller));
        let controller = controller.filter(|(experts_per_rank, controller)| {
            let layout = ladder.layouts().get(controller.rung());
            layout.is_some_and(|layout| layout.most_per_rank() == *experts_per_rank)
        });
        let controller = controller.map(|(_, controller)| controller.clone()).unwrap_or_default();
        Ok(PackingPlan { ladder, fitting, controller })
    }

    /// The layout to start with.
    pub(crate) fn layout(&self) -> &ExpertLayout {
        &self.ladder.layouts()[self.controller.rung()]
    }

    /// Agrees with the other ranks on what fits. All ranks call it together, between steps.
    pub(crate) fn start(&self, worker: &Worker<'_>, comm: &mut Comm, step: u64) -> Result<Packing, TrainError> {
        let mut fitting = Vec::with_capacity(self.ladder.layouts().len());
        for (rung, layout) in self.ladder.layouts().iter().enumerate() {
            fitting.push(f64::from(u8::from(rung < self.fitting && worker.device_fits(layout)?)));
        }
        comm.begin_evaluation(step)?;
        comm.sum(&mut fitting)?;
        comm.end_step();
        let everywhere = fitting.iter().take_while(|&&ranks| ranks == comm.ranks() as f64).count();
        let ladder = self.ladder.clone().truncated(everywhere.max(self.controller.rung() + 1));
        Ok(Packing { ladder, controller: self.controller.clone() })
    }
}

/// Packing under way on one rank; the same on all.
#[derive(Clone, Debug)]
pub(crate) struct Packing {
    ladder: PackingLadder,
    controller: PackingController,
}

impl Packing {
    /// The layout in force.
    pub(crate) fn layout(&self) -> &ExpertLayout {
        &self.ladder.layouts()[self.controller.rung()]
    }

    /// What the next rung would bring, from what the link is used for and the time waited for all-to-alls.
    pub(crate) fn forecast(&self, costs: ReplicaCosts, link: &LinkUse, wait_ns: f64) -> Option<PackingForecast> {
        self.ladder.forecast(self.controller.rung(), costs, link, wait_ns)
    }

    /// Whether nothing is on trial.
    pub(crate) fn settled(&self) -> bool {
        self.controller.settled()
    }

    /// Steps after which the controller has surely come to rest or to the top of its ladder, if nothing changes.
    pub(crate) fn longest_climb_steps(&self) -> u64 {
        self.ladder.longest_climb_steps()
    }

    /// For a checkpoint.
    pub(crate) fn state(&self) -> PackingState {
        PackingState {
            ranks: self.layout().ranks(),
            experts_per_rank: self.layout().most_per_rank(),
            controller: self.controller.clone(),
        }
    }

    /// Takes a step in, of which `steps` are done now, and moves experts if the controller says so. All ranks call it
    /// together. Returns what there is to say of a change.
    pub(crate) fn after_step(
        &mut self,
        worker: &mut Worker<'_>,
        comm: &mut Comm,
        sample: PackingSample,
        steps: u64,
    ) -> Result<Option<String>, TrainError> {
        let before = self.layout().most_per_rank();
        if self.controller.step(&self.ladder, sample).is_none() {
            return Ok(None);
        }
        let moved = worker.repack(comm, self.layout(), steps)?;
        let waiting = sentence(worker.config, self.layout()).map_or_else(String::new, |waiting| format!("; {waiting}"));
        let ms = |nanos: f64| nanos / 1e6;
        let reason = if self.controller.rests() {
            "the change before made steps slower".to_owned()
        } else {
            format!(
                "a feed-forward micro-op takes {:.3} ms, an all-to-all micro-op {:.3} ms",
                ms(sample.ffn_micro_op_ns),
                ms(sample.all_to_all_micro_op_ns)
            )
        };
        Ok(Some(format!(
            "step {steps}: packing goes from {before} to {} experts a rank, since {reason}; moving them took {:.2} ms{waiting}",
            self.layout().most_per_rank(),
            ms(moved as f64)
        )))
    }
}

/// An expert's way to a rank that is to hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Move {
    source: usize,
    destination: usize,
    expert: usize,
}

/// What has to move from layout `old` to `new`, by (source, destination, expert). A replica comes from the holder that
/// the rank's tokens went to: in its own part of the cluster, if there is one.
fn moves(old: &ExpertLayout, new: &ExpertLayout) -> Vec<Move> {
    let mut moves: Vec<Move> = (0..new.ranks())
        .flat_map(|destination| new.held_by(destination).iter().map(move |&expert| (destination, expert)))
        .map(|(destination, expert)| Move { source: old.destination(destination, expert), destination, expert })
        .filter(|step| step.source != step.destination)
        .collect();
    moves.sort_unstable_by_key(|step| (step.source, step.destination, step.expert));
    moves
}

/// Blocks of an expert that move: parameters and both moments.
const MOVED_BLOCKS: usize = 3;

/// Bytes that a change takes while it is under way, on all ranks together: the old experts with their gradients, and a
/// layer's exchange.
fn moving_bytes(config: &RunConfig, old: &ExpertLayout, new: &ExpertLayout) -> u64 {
    let layout = ParameterLayout::new(&config.model, &[]);
    let held: usize = (0..old.ranks()).map(|rank| old.held_by(rank).len()).sum();
    let experts = held * config.model.moe_layers() * (MOVED_BLOCKS + 1) + moves(old, new).len() * 2 * MOVED_BLOCKS;
    (experts * layout.expert_elements() * size_of::<f32>()) as u64
}

impl Worker<'_> {
    /// Changes to another layout before step `step`, in one exchange a layer. All ranks call it together; nothing
    /// happens if it is the layout in force. Returns how long the exchange took, virtual where emulated.
    pub(crate) fn repack(&mut self, comm: &mut Comm, new: &ExpertLayout, step: u64) -> Result<Nanos, TrainError> {
        let old = self.model.expert_layout().clone();
        if old == *new {
            return Ok(0);
        }
        self.store_device()?;
        comm.begin_evaluation(step)?;
        let rank = comm.rank();
        let moves = moves(&old, new);
        let config = self.model.config();
        let layout = ParameterLayout::new(config, new.held_by(rank));
        let mut buffers = [(); MOVED_BLOCKS].map(|()| vec![0.0; layout.experts_len()]);
        for layer in (0..config.layers).filter(|&layer| config.is_moe(layer)) {
            self.move_layer(comm, &moves, layer, &layout, &mut buffers)?;
        }
        // Nobody trains on before all have what they need, not even where nothing had to move.
        comm.sum(&mut [0.0])?;
        let took = comm.end_step().step;
        comm.set_groups(new.groups())?;
        let [weights, first, second] = buffers;
        self.model.set_experts(new.clone(), weights);
        self.model.set_residency(residency(self.config, new, rank)?);
        self.optimizer.set_experts(&self.model, Moments { first, second });
        self.set_device_experts()?;
        Ok(took)
    }

    /// Fills a layer's part of the new `buffers` (`[experts_len]` of `layout` each: weights and moments), from this
    /// rank's own experts and from other ranks.
    fn move_layer(
        &self,
        comm: &mut Comm,
        moves: &[Move],
        layer: usize,
        layout: &ParameterLayout,
        buffers: &mut [Vec<f32>; MOVED_BLOCKS],
    ) -> Result<(), TrainError> {
        let old = self.model.layout();
        let moments = &self.optimizer.experts;
        let own = [&self.model.parameters().experts, &moments.first, &moments.second];
        for &expert in layout.held() {
            let (Some(from), Some(to)) = (old.expert_block(layer, expert), layout.expert_block(layer, expert)) else {
                continue;
            };
            for (buffer, own) in buffers.iter_mut().zip(own) {
                buffer[to.clone()].copy_from_slice(&own[from.clone()]);
            }
        }
        if moves.is_empty() {
            return Ok(());
        }
        let (rank, ranks, elements) = (comm.rank(), comm.ranks(), layout.expert_elements());
        let mut send = Vec::new();
        let mut send_elements = vec![0; ranks];
        for step in moves.iter().filter(|step| step.source == rank) {
            send_elements[step.destination] += MOVED_BLOCKS * elements;
            if let Some(block) = old.expert_block(layer, step.expert) {
                own.iter().for_each(|own| send.extend_from_slice(&own[block.clone()]));
            }
        }
        let mut recv_elements = vec![0; ranks];
        let arriving = moves.iter().filter(|step| step.destination == rank);
        arriving.clone().for_each(|step| recv_elements[step.source] += MOVED_BLOCKS * elements);
        let recv = vec![0.0; recv_elements.iter().sum()];
        let kind = AllToAllKind {
            direction: Direction::Forward,
            leg: Leg::Parameters,
            layer: layer as u32,
            chunk: 0,
            chunks: 1,
        };
        let ticket = comm.all_to_all(Exchange { kind, send, send_elements, recv, recv_elements })?;
        let exchange = comm.wait(ticket)?;
        let mut arrived = exchange.recv.chunks_exact(elements);
        for step in arriving {
            let Some(to) = layout.expert_block(layer, step.expert) else { continue };
            for (buffer, block) in buffers.iter_mut().zip(&mut arrived) {
                buffer[to.clone()].copy_from_slice(block);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_come_from_their_own_part_of_the_cluster() {
        let layout = |per_rank| ExpertLayout::new(4, 4, Some(per_rank)).unwrap();
        let step = |source, destination, expert| Move { source, destination, expert };
        // From one expert a rank to two: 0 1 2 3 becomes 01 23 01 23.
        let up = moves(&layout(1), &layout(2));
        let expected = [step(0, 2, 0), step(1, 0, 1), step(1, 2, 1), step(2, 1, 2), step(2, 3, 2), step(3, 1, 3)];
        assert_eq!(up, expected);
        // From two to four, each pair of ranks serves itself.
        let up = moves(&layout(2), &layout(4));
        assert!(up.iter().all(|step| step.source / 2 == step.destination / 2), "{up:?}");
        assert!(moves(&layout(2), &layout(2)).is_empty());
    }
}
