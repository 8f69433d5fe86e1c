//! The time of a rank's GPU.
//!
//! A compute thread enqueues work and runs ahead of its device. So the work's times are asked of the device: events around
//! it, against one of the step's beginning whose time on the host's clock is known. They are looked at when they have
//! happened, at the latest at the end of the step: only there and at its beginning does the host wait for nothing but time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use lina_cuda::cudarc::driver::result::memcpy_dtod_async;
use lina_cuda::pace::Pace;
use lina_cuda::{CudaError, Event, Gpu, Slice, SliceMut, Stream};
use lina_plan::Nanos;

use crate::Work;
use crate::recorder::Awaited;
use crate::threaded::Ready;

/// How many things may be enqueued before it is looked what has happened.
const PENDING: usize = 256;

/// A rank's compute stream as a clock; give it to [`Comm::set_device`](crate::Comm::set_device).
#[derive(Debug)]
pub struct DeviceClock {
    stream: Stream,
    /// Makes work last as long as on an emulated device of so many operations a nanosecond.
    pace: Option<(Pace, f64)>,
    pool: EventPool,
    /// An event, and when it happened on the host's clock.
    base: Option<(Event, Nanos)>,
    /// The work that is being enqueued, and its beginning.
    current: Option<(Work, Event)>,
    /// What has been enqueued or waited for and is not known to have happened, oldest first.
    pending: VecDeque<Pending>,
    /// When the last work or hold that is known ended.
    busy_until: Nanos,
    failure: Option<CudaError>,
}

#[derive(Debug)]
enum Pending {
    Work {
        work: Work,
        start: Event,
        end: Event,
    },
    Wait {
        awaited: Awaited,
        start: Nanos,
        end: Nanos,
    },
    /// The device itself waited for an all-to-all.
    Hold {
        start: Event,
        end: Event,
    },
}

/// What is known once it has happened, on the host's clock.
pub(crate) enum Happened {
    /// Work, from when to when.
    Work(Work, Nanos, Nanos),
    /// The host or the device waited so long while the device had nothing to do.
    Blocked(Awaited, Nanos),
}

impl DeviceClock {
    /// The clock of the compute stream of `gpu`.
    ///
    /// # Errors
    /// If CUDA makes no events.
    pub fn new(gpu: &Gpu) -> Result<Self, CudaError> {
        let stream = gpu.stream().clone();
        let pool = EventPool::default();
        pool.give(pool.take(&stream)?);
        let (pending, busy_until) = (VecDeque::new(), 0);
        Ok(DeviceClock { stream, pace: None, pool, base: None, current: None, pending, busy_until, failure: None })
    }

    /// From now on, announced work lasts on the device at least its operations over `gflops` · 10⁹ a second.
    ///
    /// # Errors
    /// If the kernels that wait cannot be made.
    pub fn emulate_rate(&mut self, gpu: &Gpu, gflops: f64) -> Result<(), CudaError> {
        self.pace = Some((Pace::new(gpu)?, gflops));
        Ok(())
    }

    /// What went wrong, if anything.
    pub(crate) fn failure(&self) -> Option<&CudaError> {
        self.failure.as_ref()
    }

    /// Waits for the device and takes it as the moment that others are measured against; `now` reads the host's clock. CUDA
    /// tells times in single precision, which resolves a microsecond for some ten seconds.
    pub(crate) fn set(&mut self, now: impl Fn() -> Nanos) {
        self.attempt(|this| {
            this.stream.synchronize()?;
            let event = this.pool.take(&this.stream)?;
            let before = now();
            event.record(&this.stream)?;
            event.synchronize()?;
            let base = (event, before.midpoint(now()));
            if let Some((event, _)) = this.base.replace(base) {
                this.pool.give(event);
            }
            Ok(())
        });
    }

    /// What is enqueued from here on is `work`, until [`end`](Self::end).
    pub(crate) fn begin(&mut self, work: Work) {
        self.attempt(|this| {
            let start = this.pool.record(&this.stream)?;
            if let Some((pace, _)) = &mut this.pace
                && work.flops > 0
            {
                pace.begin()?;
            }
            this.current = Some((work, start));
            Ok(())
        });
    }

    pub(crate) fn end(&mut self) {
        let Some((work, start)) = self.current.take() else { return };
        self.attempt(|this| {
            if let Some((pace, flops_per_ns)) = &mut this.pace
                && work.flops > 0
            {
                pace.hold((work.flops as f64 / *flops_per_ns) as u64)?;
            }
            let end = this.pool.record(&this.stream)?;
            this.pending.push_back(Pending::Work { work, start, end });
            Ok(())
        });
    }

    /// Notes that the host waited.
    pub(crate) fn waited(&mut self, awaited: Awaited, start: Nanos, end: Nanos) {
        self.pending.push_back(Pending::Wait { awaited, start, end });
    }

    /// What is enqueued from here on happens after `event`.
    pub(crate) fn hold(&mut self, event: &Event) {
        self.attempt(|this| {
            let start = this.pool.record(&this.stream)?;
            this.stream.wait(event)?;
            let end = this.pool.record(&this.stream)?;
            this.pending.push_back(Pending::Hold { start, end });
            Ok(())
        });
    }

    /// Copies what comes to lie on the device, behind all that has been enqueued.
    pub(crate) fn copy(&mut self, from: Slice<'_>, to: SliceMut<'_>) {
        self.attempt(|this| copy(&this.stream, from, to));
    }

    /// A mark behind all that has been enqueued.
    pub(crate) fn mark(&mut self) -> Option<Box<dyn Ready>> {
        let mut mark = None;
        self.attempt(|this| {
            mark = Some(Mark { event: Some(this.pool.record(&this.stream)?), pool: this.pool.clone() });
            Ok(())
        });
        mark.map(|mark| Box::new(mark) as Box<dyn Ready>)
    }

    /// Whether it is time to look what has happened, so that it does not pile up.
    pub(crate) fn is_behind(&self) -> bool {
        self.pending.len() > PENDING
    }

    /// Takes what has happened, in order; if `all`, waits for everything that has been enqueued.
    pub(crate) fn happened(&mut self, all: bool, mut each: impl FnMut(Happened)) {
        self.attempt(|this| {
            if all {
                this.stream.synchronize()?;
            }
            while let Some(front) = this.pending.front() {
                if let Pending::Work { end, .. } | Pending::Hold { end, .. } = front
                    && !end.query()?
                {
                    break;
                }
                match this.pending.pop_front() {
                    Some(Pending::Work { work, start, end }) => {
                        let (from, to) = (this.time(&start)?, this.time(&end)?);
                        this.busy_until = to;
                        each(Happened::Work(work, from, to));
                        this.pool.give(start);
                        this.pool.give(end);
                    }
                    Some(Pending::Hold { start, end }) => {
                        let (from, to) = (this.time(&start)?, this.time(&end)?);
                        this.busy_until = to;
                        each(Happened::Blocked(Awaited::AllToAll, to.saturating_sub(from)));
                        this.pool.give(start);
                        this.pool.give(end);
                    }
                    Some(Pending::Wait { awaited, start, end }) => {
                        each(Happened::Blocked(awaited, end.saturating_sub(start.max(this.busy_until))));
                    }
                    None => {}
                }
            }
            Ok(())
        });
    }

    /// When an event that has happened did.
    fn time(&self, event: &Event) -> Result<Nanos, CudaError> {
        let Some((base, base_time)) = &self.base else { return Ok(0) };
        let ms = f64::from(event.elapsed_ms_since(base)?);
        Ok(base_time.saturating_add_signed((ms * 1e6).round() as i64))
    }

    /// Does something, unless something has gone wrong.
    fn attempt(&mut self, something: impl FnOnce(&mut Self) -> Result<(), CudaError>) {
        if self.failure.is_none()
            && let Err(failure) = something(self)
        {
            self.failure = Some(failure);
        }
    }
}

/// Copies on the device, in the order of `stream`; like to like.
pub(crate) fn copy(stream: &Stream, from: Slice<'_>, to: SliceMut<'_>) -> Result<(), CudaError> {
    assert_eq!((from.len(), from.dtype()), (to.len(), to.dtype()), "like is copied to like");
    // SAFETY: both views are of as many bytes of device memory, and the destination is exclusively borrowed; what comes
    // after, a write or the memory's release, is enqueued on the same stream.
    unsafe { copy_bytes(stream, from.ptr(), to.ptr(), from.len() * from.dtype().bytes()) }
}

/// Copies `bytes` bytes, if any, between device addresses, in the order of `stream`.
///
/// # Safety
/// Both sides must stay, the one unchanged and the other touched by nobody, until the copy has run.
pub(crate) unsafe fn copy_bytes(stream: &Stream, from: u64, to: u64, bytes: usize) -> Result<(), CudaError> {
    if bytes == 0 {
        return Ok(());
    }
    stream.device().bind()?;
    // SAFETY: the stream lives; the caller vouches for the memory.
    let outcome = unsafe { memcpy_dtod_async(to, from, bytes, stream.raw()) };
    outcome.map_err(|error| CudaError::Call { call: "cuMemcpyDtoDAsync", reason: error.to_string() })
}

/// Events that are used again, by both of a rank's threads.
#[derive(Clone, Debug, Default)]
struct EventPool(Arc<Mutex<Vec<Event>>>);

impl EventPool {
    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn take(&self, stream: &Stream) -> Result<Event, CudaError> {
        let spare = self.lock().pop();
        spare.map_or_else(|| Event::new(stream.device()), Ok)
    }

    /// An event at the present end of `stream`.
    fn record(&self, stream: &Stream) -> Result<Event, CudaError> {
        let event = self.take(stream)?;
        event.record(stream)?;
        Ok(event)
    }

    fn give(&self, event: Event) {
        self.lock().push(event);
    }
}

/// A place in the compute stream.
struct Mark {
    /// Until it goes back to its pool.
    event: Option<Event>,
    pool: EventPool,
}

impl Ready for Mark {
    fn is_ready(&mut self) -> Result<bool, String> {
        self.event.as_ref().map_or(Ok(true), |event| event.query().map_err(|error| error.to_string()))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            self.pool.give(event);
        }
    }
}
