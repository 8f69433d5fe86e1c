//! The wall clock of a rank's compute thread, with the spans and times it yields. (The emulated cluster has a
//! virtual clock of its own.)

use std::time::{Duration, Instant};

use lina_plan::Nanos;

use crate::copies::{CopyTimes, HostCopy};
use crate::{Lane, Span, StepStats, Work};

pub(crate) struct ComputeClock {
    rank: u32,
    epoch: Instant,
    current: Option<(Work, Nanos)>,
    step: u64,
    step_start: Nanos,
    stats: StepStats,
    recording: bool,
    spans: Vec<Span>,
    /// Rate of an emulated device: work lasts at least this long.
    flops_per_ns: Option<f64>,
    /// By how much the last emulated work lasted too long, because sleeps do.
    overslept: Nanos,
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
            flops_per_ns: None,
            overslept: 0,
        }
    }

    /// From now on, announced work lasts at least its operations over the rate of a device of `gflops`.
    #[cfg(feature = "mpi")]
    pub(crate) fn emulate_device(&mut self, gflops: f64) {
        self.flops_per_ns = Some(gflops);
    }

    /// Sleeps until an emulated device would be done with the work that began at `start`.
    fn keep_pace(&mut self, work: Work, start: Nanos) {
        let Some(flops_per_ns) = self.flops_per_ns.filter(|_| work.flops > 0) else { return };
        let due = start + (work.flops as f64 / flops_per_ns) as Nanos;
        let until = due.saturating_sub(self.overslept);
        let now = self.now();
        if now < until {
            std::thread::sleep(Duration::from_nanos(until - now));
            self.overslept = self.now().saturating_sub(until).min(due - start);
        } else {
            self.overslept = 0;
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
        self.keep_pace(work, start);
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

    /// Notes a copy, with the times that an emulated device gives it.
    pub(crate) fn copied(&mut self, copy: &HostCopy, times: CopyTimes) {
        self.stats.copied(times.end - times.start, copy.bytes);
        if self.recording {
            self.spans.push(Span {
                rank: self.rank,
                lane: Lane::Copy,
                name: copy.direction.name(),
                step: self.step,
                layer: Some(copy.layer),
                part: (0, 0),
                start: times.start,
                end: times.end,
                bytes: copy.bytes,
            });
        }
    }

    /// Sleeps until copies have ended.
    pub(crate) fn wait_copies(&mut self, end: Nanos) {
        self.end_work();
        let now = self.now();
        if now < end {
            std::thread::sleep(Duration::from_nanos(end - now));
            self.stats.copy_blocked += self.now() - now;
        }
    }

    pub(crate) fn begin_step(&mut self, step: u64) {
        self.step = step;
        self.step_start = self.now();
        self.stats = StepStats::default();
    }

    /// The step so far, without the work under way.
    pub(crate) fn stats(&self) -> StepStats {
        StepStats { step: self.now() - self.step_start, ..self.stats }
    }

    pub(crate) fn record(&mut self, on: bool) -> Vec<Span> {
        self.recording = on;
        std::mem::take(&mut self.spans)
    }
}
