//! Products of few tokens with the experts that they chose, against f64; skipped where there is no GPU.

use lina_cuda::testing::{gpu, random, relative_error, round_bf16};
use lina_cuda::{
    BLayout, Buffer, ChosenExperts, DType, FewActivation, Gpu, GroupedB, MAX_FEW_TOKENS, few_matmul, few_projected,
    few_rows,
};
use lina_kernels::Activation;

const ACTIVATIONS: [FewActivation; 4] = [
    FewActivation::Swiglu,
    FewActivation::Plain(Activation::Relu),
    FewActivation::Plain(Activation::Gelu),
    FewActivation::Plain(Activation::GeluTanh),
];

/// Sizes of a step and of its experts.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    tokens: usize,
    top_k: usize,
    experts: usize,
    hidden: usize,
    inner: usize,
}

fn sizes([tokens, top_k, experts, hidden, inner]: [usize; 5]) -> Sizes {
    Sizes { tokens, top_k, experts, hidden, inner }
}

/// Values as `dtype` holds them.
fn values(seed: u64, len: usize, dtype: DType) -> Vec<f32> {
    let values = random(seed, len);
    if dtype == DType::Bf16 { round_bf16(&values) } else { values }
}

/// The numbers 0..len in an order that follows from `seed`.
fn shuffled(seed: u64, len: usize) -> Vec<u32> {
    let keys = random(seed, len);
    let mut numbers: Vec<u32> = (0..len as u32).collect();
    numbers.sort_by(|&one, &other| keys[one as usize].total_cmp(&keys[other as usize]));
    numbers
}

/// Different experts for each token.
fn random_choices(seed: u64, sizes: Sizes) -> Vec<u32> {
    let of_token = |token: usize| {
        shuffled(seed + token as u64 * 977, sizes.experts).into_iter().take(sizes.top_k).collect::<Vec<_>>()
    };
    (0..sizes.tokens).flat_map(of_token).collect()
}

fn activated(activation: FewActivation, gate: f64, up: f64) -> f64 {
    let tanh = |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh());
    match activation {
        FewActivation::Swiglu => gate / (1.0 + (-gate).exp()) * up,
        FewActivation::Plain(Activation::Relu) => gate.max(0.0),
        FewActivation::Plain(Activation::Gelu) => 0.5 * gate * (1.0 + erf(gate / 2f64.sqrt())),
        FewActivation::Plain(Activation::GeluTanh) => tanh(gate),
    }
}

/// By its Taylor series, for the small numbers that are asked for.
fn erf(x: f64) -> f64 {
    let (mut power, mut sum) = (x, x);
    for n in 1..200 {
        power *= -x * x / f64::from(n);
        sum += power / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// A step's operands on host and GPU. Everything that no product should read is not a number.
struct Step {
    sizes: Sizes,
    activation: FewActivation,
    dtype: DType,
    index: Vec<u32>,
    slots: Vec<u32>,
    x: Vec<f32>,
    weights: Vec<f32>,
    /// Elements before the first expert's block, from one block to the next, and of one.
    offset: usize,
    stride: usize,
}

impl Step {
    /// Experts' blocks are `gap` elements apart, and one more than there are experts.
    fn new(sizes: Sizes, activation: FewActivation, dtype: DType, index: Vec<u32>, gap: usize) -> Step {
        let Sizes { tokens, experts, hidden, inner, .. } = sizes;
        let parts = if activation == FewActivation::Swiglu { 2 } else { 1 };
        let block = (parts + 1) * inner * hidden;
        let (offset, stride) = (gap, block + gap);
        // The first slot is nobody's.
        let slots: Vec<u32> = shuffled(5, experts).into_iter().map(|slot| slot + 1).collect();
        let mut weights = values(1, offset + (experts + 1) * stride, dtype);
        // So that hidden units are about as large as x.
        let scale = (1.0 / (hidden.max(1) as f32).sqrt()).log2().round().exp2();
        weights.iter_mut().for_each(|weight| *weight *= scale);
        let used = |slot: usize| (0..experts).any(|e| slots[e] as usize == slot && index.contains(&(e as u32)));
        for (at, weight) in weights.iter_mut().enumerate() {
            let place = at.checked_sub(offset).map(|at| (at / stride.max(1), at % stride.max(1)));
            if !place.is_some_and(|(slot, place)| place < block && used(slot)) {
                *weight = f32::NAN;
            }
        }
        let x = values(2, tokens * hidden, dtype);
        Step { sizes, activation, dtype, index, slots, x, weights, offset, stride }
    }

    fn parts(&self) -> usize {
        if self.activation == FewActivation::Swiglu { 2 } else { 1 }
    }

    /// Where the matrices of an expert start.
    fn block(&self, expert: u32) -> usize {
        self.offset + self.slots[expert as usize] as usize * self.stride
    }

    /// Row `row` of a matrix that starts at `matrix`, times `x`.
    fn product(&self, matrix: usize, row: usize, x: &[f32]) -> f64 {
        let weights = &self.weights[matrix + row * x.len()..][..x.len()];
        let exact: f64 = x.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
        exact
    }

    fn round(&self, value: f64) -> f64 {
        f64::from(values_as(self.dtype, value as f32))
    }

    /// Hidden units, `[tokens * top_k, inner]`.
    fn expected_units(&self) -> Vec<f32> {
        let Sizes { top_k, hidden, inner, .. } = self.sizes;
        let mut units = Vec::new();
        for (choice, &expert) in self.index.iter().enumerate() {
            let (matrix, x) = (self.block(expert), &self.x[choice / top_k * hidden..][..hidden]);
            for column in 0..inner {
                let product = |part| self.round(self.product(matrix, part * inner + column, x));
                let up = if self.parts() == 2 { product(1) } else { 0.0 };
                units.push(activated(self.activation, product(0), up) as f32);
            }
        }
        units
    }

    /// Outputs, `[tokens * top_k, hidden]`, of these units.
    fn expected_rows(&self, units: &[f32]) -> Vec<f32> {
        let Sizes { hidden, inner, .. } = self.sizes;
        let mut rows = Vec::new();
        for (choice, &expert) in self.index.iter().enumerate() {
            let matrix = self.block(expert) + self.parts() * inner * hidden;
            let units = &units[choice * inner..][..inner];
            rows.extend((0..hidden).map(|column| self.product(matrix, column, units) as f32));
        }
        rows
    }

    /// What the GPU computes: units and rows. All views start `skip` elements into their memory.
    fn run(&self, gpu: &Gpu, skip: usize) -> (Vec<f32>, Vec<f32>) {
        let Sizes { tokens, top_k, hidden, inner, .. } = self.sizes;
        let choices = tokens * top_k;
        let place = |values: &[f32]| -> Buffer {
            let values: Vec<f32> = std::iter::repeat_n(f32::NAN, skip).chain(values.iter().copied()).collect();
            gpu.buffer_from(&values, self.dtype).unwrap()
        };
        let index = gpu.buffer_from(&self.index, DType::U32).unwrap();
        let slots = gpu.buffer_from(&self.slots, DType::U32).unwrap();
        let (x, weights) = (place(&self.x), place(&self.weights));
        let mut units = place(&vec![f32::NAN; choices * inner]);
        let mut rows = place(&vec![f32::NAN; choices * hidden]);

        let chosen = ChosenExperts { index: index.whole(), top_k, slots: slots.whole() };
        let data = weights.slice(skip..weights.len());
        let matrices = |offset, n, k| {
            let offset = self.offset + offset;
            GroupedB { data, offset, stride: self.stride, n, k, layout: BLayout::Nk }
        };
        let (width, x) = (self.parts() * inner, x.slice(skip..x.len()));
        let unit_range = skip..skip + choices * inner;
        let to = units.slice_mut(unit_range.clone());
        few_projected(gpu, &chosen, self.activation, x, matrices(0, width, hidden), to).unwrap();
        let to = rows.slice_mut(skip..skip + choices * hidden);
        few_rows(gpu, &chosen, units.slice(unit_range), matrices(width * hidden, hidden, inner), to).unwrap();
        let host = |buffer: &Buffer| {
            let values = gpu.to_host::<f32>(buffer.whole()).unwrap();
            assert!(values[..skip].iter().all(|value| value.is_nan()), "{:?}: written before the results", self.sizes);
            values[skip..].to_vec()
        };
        (host(&units), host(&rows))
    }

    fn check(&self, gpu: &Gpu, skip: usize) {
        let limit = if self.dtype == DType::F32 { 1e-5 } else { 1e-2 };
        let (units, rows) = self.run(gpu, skip);
        let what = format!("{:?} {:?} {:?}", self.sizes, self.activation, self.dtype);
        let error = relative_error(&units, &self.expected_units());
        assert!(error <= limit, "units of {what}: {error}");
        // Of the units that the GPU has, so that errors are the second product's.
        let error = relative_error(&rows, &self.expected_rows(&units));
        assert!(error <= limit, "rows of {what}: {error}");
    }
}

fn values_as(dtype: DType, value: f32) -> f32 {
    if dtype == DType::Bf16 { round_bf16(&[value])[0] } else { value }
}

#[test]
fn every_activation_and_many_sizes() {
    let Some(gpu) = gpu() else { return };
    let shapes = [
        [1, 1, 1, 64, 24],
        [1, 2, 8, 64, 96],
        [3, 2, 8, 64, 40],
        [8, 2, 4, 136, 72],
        [9, 3, 5, 264, 104],
        [16, 2, 8, 512, 320],
        [17, 4, 60, 72, 24],
        [33, 2, 7, 96, 520],
        [64, 2, 8, 200, 136],
        [64, 8, 128, 64, 48],
        [40, 1, 2, 1024, 768],
        [2, 64, 100, 32, 16],
    ];
    for dtype in [DType::F32, DType::Bf16] {
        for (number, shape) in shapes.into_iter().enumerate() {
            let sizes = sizes(shape);
            let activation = ACTIVATIONS[number % ACTIVATIONS.len()];
            for activation in [activation, FewActivation::Swiglu] {
                let index = random_choices(number as u64, sizes);
                Step::new(sizes, activation, dtype, index, if number % 2 == 0 { 0 } else { 16 }).check(&gpu, 0);
            }
        }
    }
}

#[test]
fn sizes_and_addresses_that_are_not_aligned() {
    let Some(gpu) = gpu() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        for (shape, gap, skip) in [
            ([1, 1, 1, 1, 1], 0, 0),
            ([5, 2, 3, 7, 5], 3, 0),
            ([12, 2, 4, 100, 36], 1, 0),
            ([20, 3, 6, 65, 131], 0, 0),
            // The sizes are, memory is not.
            ([7, 2, 4, 64, 64], 0, 1),
            ([7, 2, 4, 64, 64], 4, 0),
            ([64, 2, 3, 33, 20], 0, 3),
        ] {
            let sizes = sizes(shape);
            for activation in ACTIVATIONS {
                Step::new(sizes, activation, dtype, random_choices(3, sizes), gap).check(&gpu, skip);
            }
        }
    }
}

#[test]
fn everybody_chooses_one_expert() {
    let Some(gpu) = gpu() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        for tokens in [1, 7, 8, 16, 23, 31, 32, 57, MAX_FEW_TOKENS] {
            // Fewer and more choices than experts.
            for experts in [2, 80] {
                let sizes = sizes([tokens, 1, experts, 328, 80]);
                let index = vec![1; tokens];
                Step::new(sizes, FewActivation::Swiglu, dtype, index, 8).check(&gpu, 0);
            }
        }
    }
}

#[test]
fn nothing_is_ordinary() {
    let Some(gpu) = gpu() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        for shape in [[0, 2, 4, 64, 32], [3, 2, 4, 64, 0], [3, 2, 4, 0, 32], [0, 0, 0, 8, 8]] {
            let sizes = sizes(shape);
            for activation in ACTIVATIONS {
                Step::new(sizes, activation, dtype, random_choices(4, sizes), 8).check(&gpu, 0);
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_alone_and_among_others() {
    let Some(gpu) = gpu() else { return };
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    for dtype in [DType::F32, DType::Bf16] {
        for (experts, hidden, inner) in [(8, 1024, 320), (40, 264, 1000), (5, 65, 33)] {
            let all = sizes([MAX_FEW_TOKENS, 2, experts, hidden, inner]);
            let mut index = random_choices(6, all);
            // The expert of every other token, at least.
            index.chunks_exact_mut(2).step_by(2).filter(|pair| pair[1] != 3).for_each(|pair| pair[0] = 3);
            let whole = Step::new(all, FewActivation::Swiglu, dtype, index.clone(), 8);
            let (units, rows) = whole.run(&gpu, 0);
            assert_eq!(bits(&whole.run(&gpu, 0).1), bits(&rows), "a second time");
            for range in [0..1, 5..6, 63..64, 10..18, 3..19, 20..52, 1..64] {
                let Step { slots, weights, offset, stride, .. } = &whole;
                let part = Step {
                    sizes: Sizes { tokens: range.len(), ..all },
                    activation: whole.activation,
                    dtype,
                    index: index[range.start * 2..range.end * 2].to_vec(),
                    slots: slots.clone(),
                    x: whole.x[range.start * hidden..range.end * hidden].to_vec(),
                    weights: weights.clone(),
                    offset: *offset,
                    stride: *stride,
                };
                let (part_units, part_rows) = part.run(&gpu, 0);
                let of = |values: &[f32], width: usize| bits(&values[range.start * 2 * width..range.end * 2 * width]);
                assert!(bits(&part_units) == of(&units, inner), "{dtype:?} {all:?}: units of {range:?}");
                assert!(bits(&part_rows) == of(&rows, hidden), "{dtype:?} {all:?}: rows of {range:?}");
            }
        }
    }
}

#[test]
fn a_matrix_for_all_rows() {
    let Some(gpu) = gpu() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        for [rows, n, k] in
            [[0, 8, 8], [1, 1, 1], [1, 48, 64], [3, 7, 5], [5, 40, 24], [8, 256, 1024], [17, 33, 72], [64, 100, 136]]
        {
            let (x, b, addend) = (values(1, rows * k, dtype), values(2, n * k, dtype), values(3, rows * n, dtype));
            let exact = |row: usize, column: usize| -> f64 {
                let (x, b) = (&x[row * k..][..k], &b[column * k..][..k]);
                x.iter().zip(b).map(|(&x, &b)| f64::from(x) * f64::from(b)).sum()
            };
            let [x_there, b_there, addend_there] =
                [&x, &b, &addend].map(|values| gpu.buffer_from(values, dtype).unwrap());
            for (added, out) in [(false, dtype), (true, dtype), (false, DType::F32), (true, DType::F32)] {
                let expected: Vec<f32> = (0..rows * n)
                    .map(|at| (exact(at / n, at % n) + if added { f64::from(addend[at]) } else { 0.0 }) as f32)
                    .collect();
                let mut y = gpu.buffer_from(&vec![f32::NAN; rows * n], out).unwrap();
                let addend = added.then(|| addend_there.whole());
                few_matmul(&gpu, x_there.whole(), b_there.whole(), [n, k], addend, y.whole_mut()).unwrap();
                let found: Vec<f32> = gpu.to_host(y.whole()).unwrap();
                let tolerance = if out == DType::F32 { 1e-5 } else { 1e-2 };
                let error = relative_error(&found, &expected);
                assert!(error < tolerance, "{dtype:?} {out:?} [{rows}, {n}, {k}], added {added}: {error}");
                // A row alone has the same bits.
                for row in 0..rows.min(3) {
                    let mut alone = gpu.buffer_from(&vec![f32::NAN; n], out).unwrap();
                    let addend = added.then(|| addend_there.slice(row * n..(row + 1) * n));
                    let x = x_there.slice(row * k..(row + 1) * k);
                    if x.ptr() % 16 != x_there.whole().ptr() % 16 {
                        continue;
                    }
                    few_matmul(&gpu, x, b_there.whole(), [n, k], addend, alone.whole_mut()).unwrap();
                    let alone: Vec<f32> = gpu.to_host(alone.whole()).unwrap();
                    let same = alone.iter().zip(&found[row * n..]).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{dtype:?} [{rows}, {n}, {k}], row {row}");
                }
            }
        }
    }
}
