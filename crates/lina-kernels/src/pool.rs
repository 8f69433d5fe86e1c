//! A fork-join pool in which the caller works too. A training step forks hundreds of times for tens of microseconds each, so helpers spin briefly before they
//! sleep, a fork allocates nothing, and a helper that wakes too late is not waited for. General work-stealing pools pay a wake-up of a sleeping thread per fork.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a helper looks for the next job before it sleeps: longer than the serial stretches within a step.
const SPIN: Duration = Duration::from_micros(200);
/// Looks without yielding the core, before the first yield.
const EAGER_LOOKS: u32 = 500;

/// `State` packs the job's life into one word: helpers inside (low 16 bits), open (bit 16), generation (the rest).
const OPEN: u64 = 1 << 16;
const GENERATION: u64 = 1 << 17;
const INSIDE: u64 = OPEN - 1;

type Job = *const (dyn Fn() + Sync);

struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    sleeping: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written only by the caller that holds `Pool::busy`, while the state is closed with no helper inside, and read only by helpers inside an open state.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is to a `Sync` closure, and is not used after `Pool::broadcast` returns.
unsafe impl Send for Shared {}

/// Helper threads of one [`crate::Compute`].
pub(crate) struct Pool {
    shared: Arc<Shared>,
    busy: AtomicBool,
    helpers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `helpers` threads.
    pub(crate) fn new(helpers: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            sleeping: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let helpers = (0..helpers)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                // A machine that refuses a thread gets the same results from fewer of them.
                thread::Builder::new().name(format!("kernels-{index}")).spawn(move || help(&shared)).ok()
            })
            .collect();
        Self { shared, busy: AtomicBool::new(false), helpers }
    }

    /// Runs `job` on the caller and on every helper that comes before the caller's own run returns; `job` shares out its work itself.
    /// A call from inside a job, or while another thread uses the pool, runs on the caller alone.
    pub(crate) fn broadcast(&self, job: &(dyn Fn() + Sync)) {
        if self.busy.swap(true, SeqCst) {
            job();
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `broadcast` does not return, nor unwind, before every helper has left the job.
        let erased: Job = unsafe { std::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync)>(job) };
        // SAFETY: `busy` is ours and the state is closed with nobody inside, so nobody reads the cell.
        unsafe { *shared.job.get() = Some(erased) };
        let generation = (shared.state.load(SeqCst) & !(GENERATION - 1)).wrapping_add(GENERATION);
        shared.state.store(generation | OPEN, SeqCst);
        if shared.sleeping.load(SeqCst) > 0 {
            drop(shared.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            shared.wake.notify_all();
        }

        let own = catch_unwind(AssertUnwindSafe(job));

        shared.state.fetch_and(!OPEN, SeqCst);
        let mut looks = 0_u32;
        while shared.state.load(SeqCst) & INSIDE != 0 {
            looks = looks.saturating_add(1);
            if looks < EAGER_LOOKS { std::hint::spin_loop() } else { thread::yield_now() }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.busy.store(false, SeqCst);
        if let Err(payload) = own {
            resume_unwind(payload);
        }
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        drop(self.shared.sleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.wake.notify_all();
        for helper in self.helpers.drain(..) {
            // A helper catches its jobs' panics and hands them to the caller, so there is nothing left to report here.
            let _ = helper.join();
        }
    }
}

fn help(shared: &Shared) {
    let mut last = 0;
    while let Some(generation) = enter(shared, last) {
        last = generation;
        // SAFETY: inside an open state the cell holds a job that outlives our stay.
        let job = unsafe { (*shared.job.get()).map(|job| &*job) };
        if let Some(job) = job
            && let Err(payload) = catch_unwind(AssertUnwindSafe(job))
        {
            shared.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
        shared.state.fetch_sub(1, SeqCst);
    }
}

/// Waits for an open job of a generation other than `last` and enters it; `None` when the pool stops.
fn enter(shared: &Shared, last: u64) -> Option<u64> {
    let mut looks = 0_u32;
    let mut started = None;
    loop {
        if shared.stop.load(SeqCst) {
            return None;
        }
        let state = shared.state.load(SeqCst);
        let generation = state & !(GENERATION - 1);
        if state & OPEN != 0 && generation != last {
            if shared.state.compare_exchange(state, state + 1, SeqCst, SeqCst).is_ok() {
                return Some(generation);
            }
            continue;
        }
        looks = looks.saturating_add(1);
        if looks < EAGER_LOOKS {
            std::hint::spin_loop();
        } else if started.get_or_insert_with(Instant::now).elapsed() < SPIN {
            thread::yield_now();
        } else {
            let guard = shared.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            shared.sleeping.fetch_add(1, SeqCst);
            // A job published before the count was raised is seen here; one published after it sees the count and takes the lock.
            let idle = !shared.stop.load(SeqCst) && {
                let state = shared.state.load(SeqCst);
                state & OPEN == 0 || state & !(GENERATION - 1) == last
            };
            if idle {
                drop(shared.wake.wait(guard).unwrap_or_else(PoisonError::into_inner));
            }
            shared.sleeping.fetch_sub(1, SeqCst);
            looks = 0;
            started = None;
        }
    }
}
