//! One rank on its own: what it exchanges with itself is moved, what it reduces is already summed. With a GPU, all in the
//! order of its compute stream.

use std::collections::VecDeque;
use std::time::Instant;

use lina_plan::{GapTimings, Nanos};

use crate::comm::{Port, Submission};
use crate::copies::{CopyTimes, HostCopy};
#[cfg(feature = "nccl")]
use crate::device::DeviceClock;
use crate::exchange::AnyExchange;
use crate::recorder::ComputeClock;
use crate::{CommError, Span, StepStats, Work};

pub(crate) struct Solo {
    clock: ComputeClock,
    /// Done at once and not yet waited for, by number within the step.
    exchanges: VecDeque<(u32, AnyExchange)>,
    submitted: u32,
    control: Vec<f64>,
}

impl Solo {
    pub(crate) fn new() -> Self {
        let clock = ComputeClock::new(0, Instant::now());
        Solo { clock, exchanges: VecDeque::new(), submitted: 0, control: Vec::new() }
    }

    /// Fills the received part.
    fn receive(&mut self, exchange: &mut AnyExchange) {
        match exchange {
            AnyExchange::Host(exchange) => {
                let n = exchange.send_elements[0];
                assert_eq!(n, exchange.recv_elements[0], "a rank receives what it sends itself");
                exchange.recv[..n].copy_from_slice(&exchange.send[..n]);
            }
            #[cfg(feature = "nccl")]
            AnyExchange::Device(exchange) => {
                assert_eq!(exchange.send_elements, exchange.recv_elements, "a rank receives what it sends itself");
                if exchange.send.len() == exchange.recv.len() {
                    std::mem::swap(&mut exchange.send, &mut exchange.recv);
                } else {
                    let n = exchange.send_elements[0];
                    self.clock.copy(exchange.send.slice(0..n), exchange.recv.slice_mut(0..n));
                }
            }
        }
    }
}

impl Port for Solo {
    fn now(&self) -> Nanos {
        self.clock.now()
    }

    fn work(&mut self, work: Work) -> Result<(), CommError> {
        self.clock.begin_work(work);
        self.clock.check()
    }

    fn end_work(&mut self) -> Nanos {
        self.clock.end_work();
        self.clock.now()
    }

    #[cfg(feature = "nccl")]
    fn set_device(&mut self, clock: DeviceClock) {
        self.clock.set_device(clock);
    }

    fn copied(&mut self, copy: &HostCopy, times: CopyTimes) {
        self.clock.copied(copy, times);
    }

    fn wait_copies(&mut self, end: Nanos) -> Result<(), CommError> {
        self.clock.wait_copies(end);
        Ok(())
    }

    fn submit(&mut self, submission: Submission) -> Result<(), CommError> {
        self.clock.end_work();
        match submission {
            Submission::BeginStep { step, .. } => {
                self.submitted = 0;
                self.clock.begin_step(step);
            }
            Submission::AllToAll(mut exchange) => {
                self.receive(&mut exchange);
                self.exchanges.push_back((self.submitted, exchange));
                self.submitted += 1;
            }
            Submission::Control(values) => self.control = values,
            Submission::BeginMicroBatch { .. }
            | Submission::Gradient { .. }
            | Submission::Flush
            | Submission::Groups(_) => {}
        }
        self.clock.check()
    }

    fn wait_all_to_all(&mut self, index: u32) -> Result<AnyExchange, CommError> {
        let position = self.exchanges.iter().position(|(done, _)| *done == index);
        let (_, exchange) = position.and_then(|i| self.exchanges.remove(i)).expect("a ticket is waited for once");
        Ok(exchange)
    }

    fn wait_gradients(&mut self) -> Result<(), CommError> {
        Ok(())
    }

    fn wait_control(&mut self) -> Result<Vec<f64>, CommError> {
        Ok(std::mem::take(&mut self.control))
    }

    fn timings(&self) -> GapTimings {
        GapTimings { windows: vec![0.0], between_pairs: vec![true], ..GapTimings::default() }
    }

    fn stats(&self) -> StepStats {
        self.clock.stats()
    }

    fn end_step(&mut self) -> StepStats {
        self.clock.end_step()
    }

    fn record(&mut self, on: bool) -> Vec<Span> {
        self.clock.record(on)
    }

    fn set_busy(&mut self, _busy: bool) -> bool {
        false
    }

    fn fail(&mut self, _reason: String) {}
}
