//! The thread pool's promises: every task once, nesting, panics, several ranks at once, no allocation once warm.

mod common;

use common::random;
use lina_kernels::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts allocations above 4 KiB, of which warm kernels make none. The tests of this file run in one process, so they take turns.
struct Counting;

static LARGE: AtomicUsize = AtomicUsize::new(0);
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGE.fetch_add(usize::from(layout.size() > 4096), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn take_turn() -> std::sync::MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn every_task_runs_once_and_nested_calls_work() {
    let _turn = take_turn();
    let ctx = Compute::new(3);
    for round in 0..200 {
        let runs: Vec<AtomicUsize> = (0..round).map(|_| AtomicUsize::new(0)).collect();
        ctx.parallel_for(round, |index| {
            ctx.parallel_for(2, |_| {
                runs[index].fetch_add(1, Ordering::Relaxed);
            });
        });
        assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 2));
    }
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    let _turn = take_turn();
    let ctx = Compute::new(2);
    for index in [0, 50, 99] {
        let result =
            catch_unwind(AssertUnwindSafe(|| ctx.parallel_for(100, |task| assert_ne!(task, index, "the chosen task"))));
        assert!(result.is_err());
    }
    let runs = AtomicUsize::new(0);
    ctx.parallel_for(100, |_| {
        runs.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(runs.into_inner(), 100);
}

#[test]
fn helpers_that_fell_asleep_do_not_hold_up_a_call() {
    let _turn = take_turn();
    let ctx = Compute::new(4);
    for _ in 0..20 {
        std::thread::sleep(std::time::Duration::from_millis(2));
        let runs = AtomicUsize::new(0);
        ctx.parallel_for(8, |_| {
            runs.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(runs.into_inner(), 8);
    }
}

#[test]
fn ranks_in_threads_compute_side_by_side() {
    let _turn = take_turn();
    let (a, b) = (random(300 * 200, 1), random(200 * 100, 2));
    let product = |ctx: &Compute| {
        let mut c = vec![0.0; 300 * 100];
        matmul(ctx, MatMut::new(&mut c, 300, 100), Mat::new(&a, 300, 200), Mat::new(&b, 200, 100), false);
        c
    };
    let expected = product(&Compute::new(1));
    let shared = Compute::new(2);
    std::thread::scope(|scope| {
        for rank in 0..6 {
            let (product, expected, shared) = (&product, &expected, &shared);
            scope.spawn(move || {
                let own = Compute::new(1 + rank % 2);
                for _ in 0..20 {
                    assert_eq!(&product(&own), expected);
                    assert_eq!(&product(shared), expected);
                }
            });
        }
    });
}

#[test]
fn warm_kernels_allocate_nothing_large() {
    let _turn = take_turn();
    let ctx = Compute::new(2);
    let (tokens, width, experts) = (256, 64, 64);
    let sequences = [Sequence { start_row: 0, rows: tokens }];
    let shape = AttentionShape::fused(&sequences, 4, 2, 16);
    let qkv = random(tokens * shape.row_stride, 1);
    let (mut out, mut lse, mut grad_qkv) = (vec![0.0; tokens * width], vec![0.0; tokens * 4], vec![0.0; qkv.len()]);
    let (weight, mut grad_weight, mut inv_rms) = (random(width, 2), vec![0.0; width], vec![0.0; tokens]);
    let (x, mut y, mut grad_x) = (random(tokens * width, 3), vec![0.0; tokens * width], vec![0.0; tokens * width]);
    let weights = random(experts * width * width, 4);
    let mut hidden = vec![0.0; tokens * width];
    let mut step = || {
        rms_norm_forward(&ctx, &x, &weight, 1e-5, &mut y, &mut inv_rms);
        rms_norm_backward(&ctx, &x, &weight, &inv_rms, &y, &mut grad_x, &mut grad_weight);
        attention_forward(&ctx, &shape, &qkv, &mut out, &mut lse);
        attention_backward(&ctx, &shape, &qkv, &out, &lse, &x, &mut grad_qkv);
        let rows = tokens / experts;
        let products =
            hidden.chunks_mut(rows * width).zip(x.chunks(rows * width)).zip(weights.chunks(width * width)).map(
                |((c, a), b)| Product {
                    c: MatMut::new(c, rows, width),
                    a: Mat::new(a, rows, width),
                    b: Mat::new(b, width, width).t(),
                    accumulate: false,
                },
            );
        matmul_grouped(&ctx, products);
        sum_of_squares(&ctx, &hidden)
    };
    // Helpers join a call only if they come in time, so their buffers may grow late; a kernel that allocates at every call never has a clean run.
    let clean = (0..100).any(|_| {
        let before = LARGE.load(Ordering::Relaxed);
        for _ in 0..20 {
            step();
        }
        LARGE.load(Ordering::Relaxed) == before
    });
    assert!(clean);
}
