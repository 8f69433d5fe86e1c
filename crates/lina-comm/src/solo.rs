//! One rank on its own: what it exchanges with itself is moved, what it reduces is already summed.

use std::collections::VecDeque;
use std::time::Instant;

use lina_plan::{GapTimings, Nanos};

use crate::comm::{Port, Submission};
use crate::recorder::ComputeClock;
use crate::{CommError, Exchange, Span, StepStats, Work};

pub(crate) struct Solo {
    clock: ComputeClock,
    exchanges: VecDeque<Exchange>,
    control: Vec<f64>,
}

impl Solo {
    pub(crate) fn new() -> Self {
        Solo { clock: ComputeClock::new(0, Instant::now()), exchanges: VecDeque::new(), control: Vec::new() }
    }
}

impl Port for Solo {
    fn now(&self) -> Nanos {
        self.clock.now()
    }

    fn work(&mut self, work: Work) -> Result<(), CommError> {
        self.clock.begin_work(work);
        Ok(())
    }

    fn submit(&mut self, submission: Submission) -> Result<(), CommError> {
        self.clock.end_work();
        match submission {
            Submission::BeginStep { step, .. } => self.clock.begin_step(step),
            Submission::AllToAll(mut exchange) => {
                let n = exchange.send_elements[0];
                assert_eq!(n, exchange.recv_elements[0], "a rank receives what it sends itself");
                exchange.recv[..n].copy_from_slice(&exchange.send[..n]);
                self.exchanges.push_back(exchange);
            }
            Submission::Control(values) => self.control = values,
            Submission::BeginMicroBatch { .. } | Submission::Gradient { .. } | Submission::Flush => {}
        }
        Ok(())
    }

    fn wait_all_to_all(&mut self, _index: u32) -> Result<Exchange, CommError> {
        Ok(self.exchanges.pop_front().expect("a ticket is waited for once, in order"))
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

    fn end_step(&mut self) -> StepStats {
        self.clock.end_step()
    }

    fn record(&mut self, on: bool) -> Vec<Span> {
        self.clock.record(on)
    }

    fn fail(&mut self, _reason: String) {}
}
