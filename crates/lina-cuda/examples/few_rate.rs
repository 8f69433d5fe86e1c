//! Rates of the products of a decoding step's few tokens with the experts that they chose.
//!
//! `cargo run --release -p lina-cuda --example few_rate`. Prints, in bf16, microseconds of a launch and the rate at which
//! it reads the chosen experts' matrices. Launches take turns at several layers, so that no cache has their weights.

use lina_cuda::{
    BLayout, Buffer, ChosenExperts, CudaError, DType, FewActivation, Gpu, GroupedB, few_projected, few_rows, testing,
};

const LAUNCHES: usize = 60;
const RUNS: usize = 7;
/// All layers' weights.
const WEIGHT_BYTES: usize = 12 << 30;
/// Cleared before a run, so that the host is ahead of the device when the first launch is due.
const DELAY_BYTES: usize = 4 << 30;

struct Model {
    hidden: usize,
    inner: usize,
    experts: usize,
    top_k: usize,
}

const MODELS: [Model; 3] = [
    Model { hidden: 1024, inner: 2048, experts: 8, top_k: 2 },
    Model { hidden: 4096, inner: 14336, experts: 8, top_k: 2 },
    Model { hidden: 2048, inner: 768, experts: 128, top_k: 8 },
];

/// What a layer's tokens chose.
struct Choices {
    index: Buffer,
    /// Different ones.
    experts: usize,
}

fn main() -> Result<(), CudaError> {
    let gpu = Gpu::open(0)?;
    let pattern = gpu.buffer_from(&testing::random(1, 4 << 20), DType::Bf16)?;
    let mut delay = gpu.uninit(DELAY_BYTES / DType::U32.bytes(), DType::U32)?;
    println!("{}, experts' products of few tokens", gpu.device().facts().name);
    println!(
        "{:<24}{:>8}{:>10}{:>12}{:>10}{:>12}{:>10}",
        "", "tokens", "experts", "first, us", "GB/s", "last, us", "GB/s"
    );
    for model in &MODELS {
        let Model { hidden, inner, experts, top_k } = *model;
        let block = 3 * hidden * inner;
        let layers = (WEIGHT_BYTES / (block * experts * DType::Bf16.bytes())).clamp(3, 20);
        let mut weights = gpu.uninit(layers * experts * block, DType::Bf16)?;
        for start in (0..weights.len()).step_by(pattern.len()) {
            let end = weights.len().min(start + pattern.len());
            gpu.copy(pattern.slice(0..end - start), weights.slice_mut(start..end))?;
        }
        let slots = gpu.buffer_from(&(0..experts as u32).collect::<Vec<_>>(), DType::U32)?;
        for tokens in [1, 4, 16, 64] {
            let choices: Vec<Choices> =
                (0..layers).map(|layer| Choices::new(&gpu, model, layer, tokens)).collect::<Result<_, _>>()?;
            let x = gpu.buffer_from(&testing::random(2, tokens * hidden), DType::Bf16)?;
            let mut units = gpu.buffer_from(&testing::random(3, tokens * top_k * inner), DType::Bf16)?;
            let mut rows = gpu.zeros(tokens * top_k * hidden, DType::Bf16)?;
            let read: usize = (0..LAUNCHES).map(|launch| choices[launch % layers].experts).sum();
            print!("{:<24}{tokens:>8}", format!("{hidden} x {inner}, {top_k} of {experts}"));
            print!("{:>10.1}", read as f64 / LAUNCHES as f64);

            let operands = |launch: usize, offset, n, k| {
                let layer = launch % layers;
                let data = weights.slice(layer * experts * block..(layer + 1) * experts * block);
                let chosen = ChosenExperts { index: choices[layer].index.whole(), top_k, slots: slots.whole() };
                (chosen, GroupedB { data, offset, stride: block, n, k, layout: BLayout::Nk })
            };
            let mut print_rate = |elements: usize, run: &mut dyn FnMut(usize) -> Result<(), CudaError>| {
                let ms = median_ms(&gpu, &mut delay, run)?;
                let bytes = (read * elements * DType::Bf16.bytes()) as f64;
                print!("{:>12.1}{:>10.0}", ms * 1e3 / LAUNCHES as f64, bytes / ms / 1e6);
                Ok::<_, CudaError>(())
            };
            print_rate(2 * inner * hidden, &mut |launch| {
                let (chosen, b) = operands(launch, 0, 2 * inner, hidden);
                few_projected(&gpu, &chosen, FewActivation::Swiglu, x.whole(), b, units.whole_mut())
            })?;
            print_rate(inner * hidden, &mut |launch| {
                let (chosen, b) = operands(launch, 2 * inner * hidden, hidden, inner);
                few_rows(&gpu, &chosen, units.whole(), b, rows.whole_mut())
            })?;
            println!();
        }
    }
    Ok(())
}

impl Choices {
    fn new(gpu: &Gpu, model: &Model, layer: usize, tokens: usize) -> Result<Choices, CudaError> {
        let mut index = Vec::new();
        for token in 0..tokens {
            let keys = testing::random((layer * 1000 + token) as u64, model.experts);
            let mut order: Vec<u32> = (0..model.experts as u32).collect();
            order.sort_by(|&one, &other| keys[one as usize].total_cmp(&keys[other as usize]));
            index.extend_from_slice(&order[..model.top_k]);
        }
        let on_device = gpu.buffer_from(&index, DType::U32)?;
        index.sort_unstable();
        index.dedup();
        Ok(Choices { index: on_device, experts: index.len() })
    }
}

/// Time of [`LAUNCHES`] launches.
fn median_ms(
    gpu: &Gpu,
    delay: &mut Buffer,
    launch: &mut dyn FnMut(usize) -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let mut times = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let (start, end) = (gpu.event()?, gpu.event()?);
        gpu.fill_zero(delay.whole_mut())?;
        start.record(gpu.stream())?;
        (0..LAUNCHES).try_for_each(&mut *launch)?;
        end.record(gpu.stream())?;
        gpu.synchronize()?;
        times.push(end.elapsed_ms_since(&start)?);
    }
    times.sort_by(f32::total_cmp);
    Ok(f64::from(times[RUNS / 2]))
}
