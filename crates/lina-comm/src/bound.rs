//! The bound of a step: the makespan of its dependency graph with every all-to-all at full rate and no overhead, the
//! last gradient's reduction included.
//!
//! Recorded on the emulated cluster, replayed without contention. What a schedule loses against this it loses to
//! sharing the wire, to overheads, or to gradients left over at the end.

use lina_net::{Load, Topology};
use lina_plan::{Nanos, Route};

/// What one rank did in a step, as far as time depends on it.
#[derive(Clone, Debug)]
pub(crate) enum ProgramOp {
    Compute(Nanos),
    /// Submits the next all-to-all, sending these bytes to each rank on this way.
    Submit(Vec<u64>, Route),
    /// Waits for the step's all-to-all of this number.
    Wait(u32),
    /// Waits for all gradients; the last one has these bytes to reduce.
    WaitGradients {
        members: Vec<usize>,
        last_bytes: u64,
    },
}

/// Lower bounds of a step, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepBound {
    /// Step of the run.
    pub step: u64,
    /// Makespan of the step's dependency graph as its policy shapes it, without contention or overhead.
    pub graph: f64,
    /// The busiest port's bytes over its rate.
    pub link: f64,
}

/// The makespan of `programs`, one a rank.
pub(crate) fn makespan(topology: &Topology, programs: &[Vec<ProgramOp>]) -> f64 {
    let ranks = programs.len();
    let alone = |stages: &[Vec<Load>]| stages.iter().map(|loads| topology.alone(loads)).sum::<Nanos>() as f64;
    let mut clock = vec![0.0f64; ranks];
    let mut next = vec![0usize; ranks];
    // For each all-to-all: when each rank submitted it, and its matrix.
    let mut submitted: Vec<(Vec<f64>, Vec<u64>)> = Vec::new();
    let mut submissions = vec![0usize; ranks];
    let mut done: Vec<f64> = Vec::new();
    let mut at_gradients = vec![false; ranks];
    // When the last rank has come to its gradients: each needs the others' parts.
    let mut gradients_ready: Option<f64> = None;
    loop {
        let mut moved = false;
        for rank in 0..ranks {
            while let Some(op) = programs[rank].get(next[rank]) {
                match op {
                    ProgramOp::Compute(duration) => clock[rank] += *duration as f64,
                    ProgramOp::Submit(bytes_to, route) => {
                        let index = submissions[rank];
                        if submitted.len() == index {
                            submitted.push((Vec::new(), vec![0; ranks * ranks]));
                        }
                        let (times, matrix) = &mut submitted[index];
                        times.push(clock[rank]);
                        matrix[rank * ranks..(rank + 1) * ranks].copy_from_slice(bytes_to);
                        submissions[rank] += 1;
                        if times.len() == ranks {
                            let ready = times.iter().copied().fold(0.0, f64::max);
                            let free = done.last().copied().unwrap_or(0.0);
                            done.push(f64::max(ready, free) + alone(&topology.all_to_all(matrix, *route)));
                        }
                    }
                    ProgramOp::Wait(index) => match done.get(*index as usize) {
                        Some(&at) => clock[rank] = clock[rank].max(at),
                        None => break,
                    },
                    ProgramOp::WaitGradients { members, last_bytes } => match gradients_ready {
                        Some(at) => {
                            let reduction = topology.alone(&topology.all_reduce(members, *last_bytes)) as f64;
                            clock[rank] = at + reduction;
                        }
                        None => {
                            moved |= !at_gradients[rank];
                            at_gradients[rank] = true;
                            break;
                        }
                    },
                }
                next[rank] += 1;
                moved = true;
            }
        }
        if gradients_ready.is_none() && at_gradients.iter().all(|&there| there) {
            gradients_ready = Some(clock.iter().copied().fold(0.0, f64::max));
        } else if !moved {
            break;
        }
    }
    debug_assert!((0..ranks).all(|rank| next[rank] == programs[rank].len()), "the programs of a step match");
    clock.into_iter().fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lina_net::Link;

    #[test]
    fn compute_and_exchanges_overlap_where_the_program_lets_them() {
        let link = Link { gbps: 8.0, latency_us: 9.0, launch_us: 9.0, message_us: 0.0, nodes: 2, inner_gbps: 8.0 };
        let topology = Topology::new(link, 2).unwrap();
        let program = |to: usize| {
            let mut bytes = vec![0; 2];
            bytes[to] = 1000;
            vec![
                ProgramOp::Compute(100),
                ProgramOp::Submit(bytes.clone(), Route::Direct),
                ProgramOp::Submit(bytes, Route::Direct),
                ProgramOp::Wait(0),
                ProgramOp::Compute(300),
                ProgramOp::Wait(1),
                ProgramOp::Compute(50),
                ProgramOp::WaitGradients { members: vec![0, 1], last_bytes: 70 },
                ProgramOp::Compute(7),
            ]
        };
        // 100, then 1000 + 1000 on the wire with 300 hidden, then 50, the reduction's 70 and 7.
        assert_eq!(makespan(&topology, &[program(1), program(0)]), 2227.0);
    }
}
