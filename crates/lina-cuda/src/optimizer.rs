//! AdamW, one pass over parameters, gradients and both moments, and the norms that clipping needs.

use std::ops::Range;

use lina_kernels::AdamWStep;

use crate::buffer::{DType, Slice, SliceMut};
use crate::compile::Module;
use crate::elementwise::{FlatPacks, THREADS, kernel_name, number};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Arg, LaunchShape};

pub(crate) static OPTIMIZER: Module =
    Module::new("optimizer", concat!(include_str!("kernels/pack.cuh"), include_str!("kernels/optimizer.cu")));

/// Elements of a range whose squares a block adds up.
const SQUARES_BLOCK: usize = 65_536;

/// Updates `params` and the moments `m` and `v` in place from `grads`; all are f32 and have one length. `copy` (bf16),
/// if given, receives the new parameters too.
///
/// # Errors
/// If the device has failed.
pub fn adamw_step(
    gpu: &Gpu,
    params: SliceMut<'_>,
    grads: Slice<'_>,
    m: SliceMut<'_>,
    v: SliceMut<'_>,
    copy: Option<SliceMut<'_>>,
    step: &AdamWStep,
) -> Result<(), CudaError> {
    let len = params.len();
    let types = [params.dtype(), grads.dtype(), m.dtype(), v.dtype()];
    assert!(grads.len() == len && m.len() == len && v.len() == len, "adamw_step: shapes");
    assert!(types.iter().all(|&dtype| dtype == DType::F32), "adamw_step: types");
    let mut arrays =
        vec![params.ptr(), grads.ptr(), m.ptr(), v.ptr()].into_iter().map(|at| (at, 4)).collect::<Vec<_>>();
    let (mut narrowest, mut copy_at) = (DType::F32, 0);
    if let Some(copy) = &copy {
        assert!(copy.len() == len && copy.dtype() == DType::Bf16, "adamw_step: shape of the copy");
        (narrowest, copy_at) = (DType::Bf16, copy.ptr());
        arrays.push((copy_at, 2));
    }
    let packs = FlatPacks::new(16 / narrowest.bytes(), len, &arrays);
    let scalars = [
        step.beta1,
        step.beta2,
        step.epsilon,
        step.grad_scale,
        1.0 - step.learning_rate * step.weight_decay,
        step.learning_rate / step.bias_correction1,
        1.0 / step.bias_correction2.sqrt(),
    ];
    let scalars: Vec<u8> = scalars.iter().flat_map(|scalar| scalar.to_le_bytes()).collect();
    let [elements, shift] = packs.args();
    let args = [
        (&params).into(),
        grads.into(),
        (&m).into(),
        (&v).into(),
        Arg::Pointer(copy_at),
        Arg::Bytes(&scalars),
        elements,
        shift,
    ];
    gpu.launch(&OPTIMIZER, &kernel_name("adamw", narrowest, packs.pack), packs.shape(), &args)
}

/// The sum of the squares of each of `ranges` of `values` (f32), in double precision; waits for it. Blocks are cut by
/// the ranges alone, so every range has the same bits on every GPU.
///
/// # Errors
/// If the device's memory does not suffice, or it has failed.
///
/// # Panics
/// If a range is not within `values`.
pub fn sum_of_squares(gpu: &Gpu, values: Slice<'_>, ranges: &[Range<usize>], out: &mut [f64]) -> Result<(), CudaError> {
    assert!(values.dtype() == DType::F32 && out.len() == ranges.len(), "sum_of_squares: shapes");
    if ranges.is_empty() {
        return Ok(());
    }
    let mut table = Vec::with_capacity(5 * ranges.len());
    let mut blocks = 0;
    for range in ranges {
        assert!(range.start <= range.end && range.end <= values.len(), "{range:?} of {} elements", values.len());
        let halves = |number: usize| [number as u32, (number as u64 >> 32) as u32];
        table.extend(halves(range.start));
        table.extend(halves(range.len()));
        table.push(u32::try_from(blocks).expect("a grid has less than 2^31 blocks"));
        blocks += range.len().div_ceil(SQUARES_BLOCK);
    }
    let table = gpu.buffer_from(&table, DType::U32)?;
    // A double takes the room of two numbers.
    let mut partials = gpu.uninit(2 * blocks, DType::U32)?;
    let mut sums = gpu.uninit(2 * ranges.len(), DType::U32)?;
    let (partials, count) = (Arg::from(&partials.whole_mut()), number(ranges.len()));
    let args = [values.into(), table.whole().into(), count, number(SQUARES_BLOCK), partials];
    gpu.launch(&OPTIMIZER, "sum_of_squares", LaunchShape::linear(blocks as u32, THREADS), &args)?;
    let args = [partials, table.whole().into(), count, number(blocks), (&sums.whole_mut()).into()];
    gpu.launch(&OPTIMIZER, "sum_of_partials", LaunchShape::covering(32 * ranges.len(), THREADS), &args)?;
    let words: Vec<u32> = gpu.to_host(sums.whole())?;
    for (sum, word) in out.iter_mut().zip(words.chunks_exact(2)) {
        *sum = f64::from_bits(u64::from(word[1]) << 32 | u64::from(word[0]));
    }
    Ok(())
}
