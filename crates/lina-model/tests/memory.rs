//! What a model allocates: as much as the plan says, and nothing large once a step has been run.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lina_comm::Comm;
use lina_comm::local::{LocalConfig, LocalJob};
use lina_kernels::Compute;
use lina_model::{Batch, Model, ModelConfig, ModelKind, ModelLimits, Purpose, Sizes, StepContext, memory_plan};
use lina_plan::{ExpertLayout, Policy, PolicyRules, PolicySettings};

/// Counts live bytes and allocations over 4 KiB.
struct Counting;

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static LARGE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        LARGE.fetch_add(usize::from(layout.size() > 4096), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The counters are the process's: one test at a time.
static TURN: Mutex<()> = Mutex::new(());

const LIMITS: ModelLimits = ModelLimits { max_tokens: 512, max_sequence_tokens: 128, max_expert_rows: None };

fn config(kind: ModelKind) -> ModelConfig {
    let sizes = Sizes { vocab: 256, hidden: 64, layers: 4, heads: 4, experts: 8, top_k: 2, expert_hidden: 128 };
    ModelConfig::family(kind, sizes)
}

fn step(model: &mut Model, comm: &mut Comm, number: u64) {
    let ids: Vec<u32> = (0..512).map(|i| (i * 37 + i * i * 11) % 256).collect();
    let step = StepContext { training: true, global_tokens: 512, ..StepContext::evaluation() };
    comm.begin_step(number).unwrap();
    comm.begin_micro_batch(true).unwrap();
    model.forward(comm, Batch { input: &ids, target: &ids, sequences: &[128; 4] }, step).unwrap();
    model.backward(comm, false).unwrap();
    comm.finish_gradients().unwrap();
    comm.agree(&mut [0.0]).unwrap();
    comm.end_step();
}

fn random_model(config: &ModelConfig, layout: &ExpertLayout, rank: usize) -> Model {
    let mut model =
        Model::new(Purpose::Training, config.clone(), layout.clone(), rank, Compute::new(1), LIMITS).unwrap();
    let (_, layout, parameters) = model.for_update();
    parameters.initialise(layout, 1);
    model
}

#[test]
fn one_rank_takes_what_the_plan_says_and_then_allocates_nothing_large() {
    let _turn = TURN.lock();
    for kind in [ModelKind::Mixtral, ModelKind::Qwen3Moe, ModelKind::Olmoe, ModelKind::LinaMoe] {
        let config = config(kind);
        let layout = ExpertLayout::new(8, 1, None).unwrap();
        let before = LIVE_BYTES.load(Ordering::Relaxed);
        let mut model = random_model(&config, &layout, 0);
        let mut comm = Comm::solo();
        step(&mut model, &mut comm, 0);
        let found = (LIVE_BYTES.load(Ordering::Relaxed) - before) as f64;
        let plan: usize =
            memory_plan(&config, &layout, 0, LIMITS, Purpose::Training).iter().map(|part| part.bytes).sum();
        assert!((found / plan as f64 - 1.0).abs() < 0.1, "{kind}: {found} bytes, planned {plan}");

        let large = LARGE.load(Ordering::Relaxed);
        step(&mut model, &mut comm, 1);
        assert_eq!(LARGE.load(Ordering::Relaxed), large, "{kind}");
    }
}

#[test]
fn an_evaluation_takes_what_the_plan_says_and_no_gradients() {
    let _turn = TURN.lock();
    for (kind, dense_layers) in
        [(ModelKind::Mixtral, vec![]), (ModelKind::Qwen3Moe, vec![0, 2]), (ModelKind::LinaMoe, vec![])]
    {
        let config = ModelConfig { dense_layers, dense_hidden: 128, ..config(kind) };
        let layout = ExpertLayout::new(8, 1, None).unwrap();
        let before = LIVE_BYTES.load(Ordering::Relaxed);
        let mut model =
            Model::new(Purpose::Evaluation, config.clone(), layout.clone(), 0, Compute::new(1), LIMITS).unwrap();
        let (_, places, parameters) = model.for_update();
        parameters.initialise(places, 1);
        let ids: Vec<u32> = (0..512).map(|i| (i * 37 + i * i * 11) % 256).collect();
        let batch = Batch { input: &ids, target: &ids, sequences: &[128; 4] };
        let mut comm = Comm::solo();
        model.forward(&mut comm, batch, StepContext::evaluation()).unwrap();
        let found = (LIVE_BYTES.load(Ordering::Relaxed) - before) as f64;
        let plan = |purpose| -> usize {
            memory_plan(&config, &layout, 0, LIMITS, purpose).iter().map(|part| part.bytes).sum()
        };
        let (planned, training) = (plan(Purpose::Evaluation), plan(Purpose::Training));
        assert!((found / planned as f64 - 1.0).abs() < 0.1, "{kind}: {found} bytes, planned {planned}");
        assert!(2 * planned < training, "{kind}: {planned} bytes, in training {training}");
    }
}

#[test]
fn several_ranks_take_what_the_plan_says() {
    let _turn = TURN.lock();
    let config = config(ModelKind::Mixtral);
    for (ranks, per_rank) in [(2, None), (4, None), (4, Some(4))] {
        let layout = ExpertLayout::new(8, ranks, per_rank).unwrap();
        let settings = PolicySettings { pipeline_chunks: 2, ..PolicySettings::default() };
        let local = LocalConfig {
            ranks,
            groups: layout.groups().to_vec(),
            timeout: Duration::from_secs(20),
            delays: None,
            log_launches: false,
        };
        let (_job, comms) = LocalJob::start(local, PolicyRules::new(Policy::Lina, &settings)).unwrap();
        let before = LIVE_BYTES.load(Ordering::Relaxed);
        let models: Vec<Model> = std::thread::scope(|scope| {
            let run = |(rank, mut comm): (usize, Comm)| {
                let (config, layout) = (&config, &layout);
                scope.spawn(move || {
                    let mut model = random_model(config, layout, rank);
                    step(&mut model, &mut comm, 0);
                    step(&mut model, &mut comm, 1);
                    model
                })
            };
            let threads: Vec<_> = comms.into_iter().enumerate().map(run).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let found = (LIVE_BYTES.load(Ordering::Relaxed) - before) as f64;
        let plans = (0..models.len()).flat_map(|rank| memory_plan(&config, &layout, rank, LIMITS, Purpose::Training));
        let plan: usize = plans.map(|part| part.bytes).sum();
        assert!((found / plan as f64 - 1.0).abs() < 0.1, "{ranks} ranks: {found} bytes, planned {plan}");
    }
}
