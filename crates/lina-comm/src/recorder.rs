//! The wall clock of a rank's compute thread, with the spans and times it yields. (The emulated cluster has a
//! virtual clock of its own.)

use std::time::Instant;

use lina_plan::Nanos;

use crate::{Lane, Span, StepStats, Work};

pub(crate) struct ComputeClock {
    rank: u32,
    epoch: Instant,
    current: Option<(Work, Nanos)>,
    step: u64,
    step_start: Nanos,
    pub(crate) stats: StepStats,
    recording: bool,
    spans: Vec<Span>,
}

impl ComputeClock {
    pub(crate) fn new(rank: u32, epoch: Instant) -> Self {
        ComputeClock {
            rank,
            epoch,
            current: None,
            step: 0,
            step_start: 0,
            stats: StepStats::default(),
            recording: false,
            spans: Vec::new(),
        }
    }

    pub(crate) fn now(&self) -> Nanos {
        self.epoch.elapsed().as_nanos() as Nanos
    }

    /// Work lasts until the next call on the handle.
    pub(crate) fn begin_work(&mut self, work: Work) {
        self.end_work();
        self.current = Some((work, self.now()));
    }

    pub(crate) fn end_work(&mut self) {
        let Some((work, start)) = self.current.take() else { return };
        let end = self.now();
        self.stats.computed(work.kind, end - start);
        if self.recording {
            self.spans.push(Span {
                rank: self.rank,
                lane: Lane::Compute,
                name: work.kind.name(),
                step: self.step,
                layer: work.layer,
                part: (0, 0),
                start,
                end,
                bytes: 0,
            });
        }
    }

    pub(crate) fn begin_step(&mut self, step: u64) {
        self.step = step;
        self.step_start = self.now();
        self.stats = StepStats::default();
    }

    pub(crate) fn end_step(&mut self) -> StepStats {
        self.end_work();
        self.stats.step = self.now() - self.step_start;
        self.stats
    }

    pub(crate) fn record(&mut self, on: bool) -> Vec<Span> {
        self.recording = on;
        std::mem::take(&mut self.spans)
    }
}
