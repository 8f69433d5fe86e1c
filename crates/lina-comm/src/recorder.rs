//! The wall clock of a rank's compute thread, with the spans and times it yields. (The emulated cluster has a
//! virtual clock of its own.)

use std::time::{Duration, Instant};

#[cfg(feature = "nccl")]
use lina_cuda::{Event, Slice, SliceMut};
use lina_plan::Nanos;

use crate::copies::{CopyTimes, HostCopy};
#[cfg(feature = "nccl")]
use crate::device::{DeviceClock, Happened};
#[cfg(feature = "nccl")]
use crate::threaded::Ready;
use crate::{CommError, Lane, Span, StepStats, Work};

/// What a compute thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Awaited {
    AllToAll,
    /// Gradients, or the step's closing sum.
    AllReduce,
}

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
    /// Where computation is a GPU's.
    #[cfg(feature = "nccl")]
    device: Option<DeviceClock>,
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
            #[cfg(feature = "nccl")]
            device: None,
        }
    }

    /// From now on, computation is what a GPU's stream is given.
    #[cfg(feature = "nccl")]
    pub(crate) fn set_device(&mut self, mut device: DeviceClock) {
        device.set(|| self.now());
        self.device = Some(device);
    }

    /// Whether computation is on a GPU.
    pub(crate) fn has_device(&self) -> bool {
        #[cfg(feature = "nccl")]
        return self.device.is_some();
        #[cfg(not(feature = "nccl"))]
        false
    }

    /// A mark behind what has been computed so far, where that is not known to have happened.
    #[cfg(feature = "nccl")]
    pub(crate) fn mark(&mut self) -> Option<Box<dyn Ready>> {
        self.device.as_mut().and_then(DeviceClock::mark)
    }

    /// Copies on the device, behind what has been computed so far.
    ///
    /// # Panics
    /// If there is no device.
    #[cfg(feature = "nccl")]
    pub(crate) fn copy(&mut self, from: Slice<'_>, to: SliceMut<'_>) {
        self.device.as_mut().expect("who exchanges device memory has set the device").copy(from, to);
    }

    /// What is enqueued from here on happens after `event`, for which the device waits as it would for an all-to-all.
    ///
    /// # Panics
    /// If there is no device.
    #[cfg(feature = "nccl")]
    pub(crate) fn hold(&mut self, event: &Event) {
        self.device.as_mut().expect("who exchanges device memory has set the device").hold(event);
    }

    /// Takes over what is known to have happened on the device; if `all`, waits for the rest.
    #[cfg(feature = "nccl")]
    fn take_happened(&mut self, all: bool) {
        let Some(mut device) = self.device.take() else { return };
        device.happened(all, |happened| match happened {
            Happened::Work(work, start, end) => self.computed(work, start, end),
            Happened::Blocked(awaited, duration) => self.blocked(awaited, duration),
        });
        self.device = Some(device);
    }

    /// Whether the clock still goes.
    ///
    /// # Errors
    /// If the device has failed: as a failure of this rank.
    pub(crate) fn check(&self) -> Result<(), CommError> {
        #[cfg(feature = "nccl")]
        if let Some(failure) = self.device.as_ref().and_then(DeviceClock::failure) {
            return Err(CommError::RankFailed { rank: self.rank as usize, reason: failure.to_string() });
        }
        Ok(())
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
        #[cfg(feature = "nccl")]
        if let Some(device) = &mut self.device {
            device.begin(work);
            if device.is_behind() {
                self.take_happened(false);
            }
            return;
        }
        self.current = Some((work, self.now()));
    }

    pub(crate) fn end_work(&mut self) {
        #[cfg(feature = "nccl")]
        if let Some(device) = &mut self.device {
            return device.end();
        }
        let Some((work, start)) = self.current.take() else { return };
        self.keep_pace(work, start);
        self.computed(work, start, self.now());
    }

    fn computed(&mut self, work: Work, start: Nanos, end: Nanos) {
        self.stats.computed(work.kind, end.saturating_sub(start));
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

    /// The compute thread has waited since `start`.
    pub(crate) fn waited(&mut self, awaited: Awaited, start: Nanos) {
        let end = self.now();
        #[cfg(feature = "nccl")]
        if let Some(device) = &mut self.device {
            device.waited(awaited, start, end);
            return self.take_happened(false);
        }
        self.blocked(awaited, end - start);
    }

    fn blocked(&mut self, awaited: Awaited, duration: Nanos) {
        match awaited {
            Awaited::AllToAll => self.stats.all_to_all_blocked += duration,
            Awaited::AllReduce => self.stats.all_reduce_blocked += duration,
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
        // What is between two steps is nobody's.
        #[cfg(feature = "nccl")]
        {
            self.take_happened(true);
            let epoch = self.epoch;
            self.device.iter_mut().for_each(|device| device.set(|| epoch.elapsed().as_nanos() as Nanos));
        }
        self.step = step;
        self.step_start = self.now();
        self.stats = StepStats::default();
    }

    /// The step so far, without the work under way.
    pub(crate) fn stats(&self) -> StepStats {
        StepStats { step: self.now() - self.step_start, ..self.stats }
    }

    /// The whole step. On a device, everything enqueued has run.
    pub(crate) fn end_step(&mut self) -> StepStats {
        self.end_work();
        #[cfg(feature = "nccl")]
        self.take_happened(true);
        self.stats()
    }

    pub(crate) fn record(&mut self, on: bool) -> Vec<Span> {
        #[cfg(feature = "nccl")]
        self.take_happened(true);
        self.recording = on;
        std::mem::take(&mut self.spans)
    }
}
