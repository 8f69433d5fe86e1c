//! Products of many experts against those of the processor, by every kernel; skipped where there is no GPU.

use lina_cuda::testing::{gpu, random, relative_error, round_bf16};
use lina_cuda::{
    BLayout, Buffer, DType, Gpu, GroupedB, GroupedKernel, GroupedReduction, GroupedRows, TileWidth, grouped_matmul,
    grouped_matmul_with, grouped_weight_gradient, grouped_weight_gradient_with,
};
use lina_kernels::{Compute, Mat, MatMut};

/// Rows of experts around the sizes of tiles, and none.
const RAGGED: [u32; 12] = [0, 1, 63, 65, 127, 129, 1000, 64, 128, 0, 7, 256];
const SIZES: [usize; 6] = [64, 128, 192, 320, 768, 1536];
/// Rows that belong to nobody, before each group.
const GAP: u32 = 3;

/// Every kernel that this GPU has.
fn kernels(gpu: &Gpu, dtype: DType) -> Vec<GroupedKernel> {
    let mut kernels = vec![GroupedKernel::Blas];
    if dtype == DType::Bf16 && gpu.compute_capability() == (9, 0) {
        kernels.extend([TileWidth::Wide, TileWidth::Narrow].map(GroupedKernel::Hopper));
    }
    kernels
}

/// Values as `dtype` holds them.
fn values(seed: u64, len: usize, dtype: DType) -> Vec<f32> {
    let values = random(seed, len);
    if dtype == DType::Bf16 { round_bf16(&values) } else { values }
}

/// Makes everything but `kept` not a number.
fn poison(values: &mut [f32], kept: impl Fn(usize) -> bool) {
    values.iter_mut().enumerate().filter(|(at, _)| !kept(*at)).for_each(|(_, value)| *value = f32::NAN);
}

/// A product of groups on the processor, and its operands on the GPU.
struct Rows {
    groups: Vec<GroupedRows>,
    n: usize,
    k: usize,
    layout: BLayout,
    offset: usize,
    stride: usize,
    a: Buffer,
    b: Buffer,
    /// Not a number where no group has a row.
    expected: Vec<f32>,
    dtype: DType,
}

impl Rows {
    /// Groups of `rows` rows, whose places in C are in another order than those in A, and which share `slots` matrices.
    fn new(gpu: &Gpu, rows: &[u32], slots: u32, n: usize, k: usize, layout: BLayout, dtype: DType) -> Rows {
        let (mut a_row, mut c_row) = (GAP, GAP);
        let mut groups: Vec<GroupedRows> = Vec::new();
        for (number, &rows) in rows.iter().enumerate() {
            groups.push(GroupedRows { slot: number as u32 * 5 % slots, a_row, c_row: 0, rows });
            a_row += rows + GAP;
        }
        for group in groups.iter_mut().rev() {
            group.c_row = c_row;
            c_row += group.rows + GAP;
        }
        let total = a_row as usize;
        // A distance that is no whole number of rows.
        let (offset, stride) = (24, n * k + 8);
        let belongs = |row: usize| {
            groups
                .iter()
                .any(|group| row.checked_sub(group.a_row as usize).is_some_and(|row| row < group.rows as usize))
        };
        let owned: Vec<bool> = (0..total).map(belongs).collect();
        let mut a = values(1, total * k, dtype);
        poison(&mut a, |at| owned[at / k]);
        let mut b = values(2, offset + slots as usize * stride, dtype);
        poison(&mut b, |at| at >= offset && (at - offset) % stride < n * k);

        let compute = Compute::new(2);
        let mut expected = vec![f32::NAN; total * n];
        for group in groups.iter().filter(|group| group.rows > 0) {
            let (rows, a_row, c_row) = (group.rows as usize, group.a_row as usize, group.c_row as usize);
            let matrix = &b[offset + group.slot as usize * stride..][..n * k];
            let matrix = match layout {
                BLayout::Nk => Mat::new(matrix, n, k).t(),
                BLayout::Kn => Mat::new(matrix, k, n),
            };
            let product = MatMut::new(&mut expected[c_row * n..][..rows * n], rows, n);
            lina_kernels::matmul(&compute, product, Mat::new(&a[a_row * k..][..rows * k], rows, k), matrix, false);
        }
        let (a, b) = (gpu.buffer_from(&a, dtype).unwrap(), gpu.buffer_from(&b, dtype).unwrap());
        Rows { groups, n, k, layout, offset, stride, a, b, expected, dtype }
    }

    /// The product by one kernel, or by the one that is chosen.
    fn run(&self, gpu: &Gpu, kernel: Option<GroupedKernel>, groups: &[GroupedRows]) -> Vec<f32> {
        let mut c = gpu.buffer_from(&vec![f32::NAN; self.expected.len()], self.dtype).unwrap();
        let Rows { n, k, layout, offset, stride, .. } = *self;
        let b = GroupedB { data: self.b.whole(), offset, stride, n, k, layout };
        match kernel {
            Some(kernel) => grouped_matmul_with(gpu, kernel, groups, self.a.whole(), b, c.whole_mut()),
            None => grouped_matmul(gpu, groups, self.a.whole(), b, c.whole_mut()),
        }
        .unwrap();
        gpu.to_host(c.whole()).unwrap()
    }

    fn check(&self, found: &[f32], what: &str) {
        let Rows { n, k, layout, .. } = *self;
        let bound = if self.dtype == DType::F32 { 1e-5 } else { 1e-2 };
        for (row, (found, expected)) in found.chunks(n).zip(self.expected.chunks(n)).enumerate() {
            if expected[0].is_nan() {
                assert!(
                    found.iter().all(|value| value.is_nan()),
                    "{what}, {layout:?} {n} x {k}: row {row} is nobody's"
                );
            } else {
                let error = relative_error(found, expected);
                let group = self.groups.iter().rfind(|group| {
                    group.c_row as usize <= row && group.rows > 0 && row < (group.c_row + group.rows) as usize
                });
                assert!(
                    error < bound,
                    "{what}, {layout:?} {n} x {k}: row {row} of {group:?} has error {error}\nfound {:?}\nexpected {:?}",
                    &found[..8],
                    &expected[..8]
                );
            }
        }
    }
}

#[test]
fn products_of_ragged_groups() {
    let Some(gpu) = gpu() else { return };
    for layout in [BLayout::Nk, BLayout::Kn] {
        for n in SIZES {
            for k in SIZES {
                let case = Rows::new(&gpu, &RAGGED, 7, n, k, layout, DType::Bf16);
                for kernel in kernels(&gpu, DType::Bf16) {
                    case.check(&case.run(&gpu, Some(kernel), &case.groups), &format!("{kernel:?}"));
                }
            }
        }
    }
}

#[test]
fn sizes_that_are_no_multiple_of_a_tile_or_of_anything() {
    let Some(gpu) = gpu() else { return };
    for layout in [BLayout::Nk, BLayout::Kn] {
        // Multiples of 8 are taken by all kernels.
        for (n, k) in [(8, 8), (72, 40), (264, 136), (520, 1000)] {
            let case = Rows::new(&gpu, &RAGGED, 3, n, k, layout, DType::Bf16);
            for kernel in kernels(&gpu, DType::Bf16) {
                case.check(&case.run(&gpu, Some(kernel), &case.groups), &format!("{kernel:?}"));
            }
        }
        for dtype in [DType::Bf16, DType::F32] {
            for (n, k) in [(1, 1), (5, 3), (36, 100), (64, 64), (131, 70)] {
                let case = Rows::new(&gpu, &RAGGED, 5, n, k, layout, dtype);
                case.check(&case.run(&gpu, None, &case.groups), "the chosen one");
            }
        }
    }
}

#[test]
fn blocks_compute_many_tiles_one_after_another() {
    let Some(gpu) = gpu() else { return };
    let rows: Vec<u32> = (0..40).map(|number| 200 + number * 67 % 190).collect();
    for layout in [BLayout::Nk, BLayout::Kn] {
        let case = Rows::new(&gpu, &rows, 16, 1536, 320, layout, DType::Bf16);
        for kernel in kernels(&gpu, DType::Bf16) {
            case.check(&case.run(&gpu, Some(kernel), &case.groups), &format!("{kernel:?}"));
        }
    }
    // One expert with more rows of tiles than are finished together.
    let case = Rows::new(&gpu, &[5000, 300], 2, 768, 192, BLayout::Nk, DType::Bf16);
    for kernel in kernels(&gpu, DType::Bf16) {
        case.check(&case.run(&gpu, Some(kernel), &case.groups), &format!("{kernel:?}"));
    }
}

#[test]
fn more_groups_than_one_launch_has() {
    let Some(gpu) = gpu() else { return };
    let rows: Vec<u32> = (0..700).map(|number| number % 6).collect();
    let case = Rows::new(&gpu, &rows, 11, 136, 72, BLayout::Nk, DType::Bf16);
    for kernel in kernels(&gpu, DType::Bf16) {
        case.check(&case.run(&gpu, Some(kernel), &case.groups), &format!("{kernel:?}"));
    }
}

#[test]
fn nothing_is_ordinary() {
    let Some(gpu) = gpu() else { return };
    for dtype in [DType::Bf16, DType::F32] {
        for rows in [&[][..], &[0, 0], &[3, 0, 5]] {
            for (n, k) in [(16, 8), (0, 8), (16, 0), (0, 0)] {
                if rows.is_empty() || n == 0 {
                    // Without a row or column there is nothing to compare, only to survive.
                    let groups: Vec<_> =
                        rows.iter().map(|&rows| GroupedRows { slot: 0, a_row: 0, c_row: 0, rows }).collect();
                    let (a, b) = (gpu.zeros(8 * k, dtype).unwrap(), gpu.zeros(n * k, dtype).unwrap());
                    let mut c = gpu.zeros(8 * n, dtype).unwrap();
                    let b = GroupedB { data: b.whole(), offset: 0, stride: n * k, n, k, layout: BLayout::Nk };
                    for kernel in kernels(&gpu, dtype) {
                        grouped_matmul_with(&gpu, kernel, &groups, a.whole(), b, c.whole_mut()).unwrap();
                    }
                    grouped_matmul(&gpu, &groups, a.whole(), b, c.whole_mut()).unwrap();
                    gpu.synchronize().unwrap();
                } else {
                    // A depth of nothing makes zeros.
                    let groups: Vec<_> = rows
                        .iter()
                        .enumerate()
                        .map(|(number, &rows)| GroupedRows { slot: 0, a_row: 0, c_row: 8 * number as u32, rows })
                        .collect();
                    let (a, b) = (gpu.zeros(8 * k, dtype).unwrap(), gpu.zeros(n * k, dtype).unwrap());
                    let b = GroupedB { data: b.whole(), offset: 0, stride: n * k, n, k, layout: BLayout::Kn };
                    for kernel in kernels(&gpu, dtype) {
                        let mut c = gpu.buffer_from(&vec![f32::NAN; 24 * n], dtype).unwrap();
                        grouped_matmul_with(&gpu, kernel, &groups, a.whole(), b, c.whole_mut()).unwrap();
                        let found = gpu.to_host::<f32>(c.whole()).unwrap();
                        for (row, found) in found.chunks(n).enumerate() {
                            let named = groups
                                .iter()
                                .any(|group| (group.c_row..group.c_row + group.rows).contains(&(row as u32)));
                            assert!(
                                found.iter().all(|value| if named { *value == 0.0 } else { value.is_nan() }),
                                "{kernel:?} row {row}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_in_every_tile_and_every_time() {
    let Some(gpu) = gpu() else { return };
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    // A depth that cuBLASLt would cut, and a width at which rows are differently aligned.
    for (dtype, n, k) in
        [(DType::F32, 320, 768), (DType::F32, 64, 4096), (DType::F32, 65, 131), (DType::Bf16, 320, 768)]
    {
        for layout in [BLayout::Nk, BLayout::Kn] {
            let case = Rows::new(&gpu, &RAGGED, 7, n, k, layout, dtype);
            let all = bits(case.run(&gpu, None, &case.groups));
            let exact = |kernel: &GroupedKernel| dtype == DType::F32 || *kernel != GroupedKernel::Blas;
            for kernel in kernels(&gpu, dtype).into_iter().filter(exact) {
                for _ in 0..3 {
                    assert!(bits(case.run(&gpu, Some(kernel), &case.groups)) == all, "{kernel:?} {layout:?}");
                }
                let largest = case.groups.iter().max_by_key(|group| group.rows).unwrap();
                for (row, rows) in [(0, 1), (1, 1), (70, 2), (500, 333), (999, 1)] {
                    let (a_row, c_row) = (largest.a_row + row, largest.c_row + row);
                    let found = bits(case.run(&gpu, Some(kernel), &[GroupedRows { a_row, c_row, rows, ..*largest }]));
                    let place = c_row as usize * n..(c_row + rows) as usize * n;
                    assert!(found[place.clone()] == all[place], "{kernel:?} {layout:?} {n} x {k}: rows from {row}");
                }
            }
        }
    }
}

/// Weight gradients on the processor, and their operands on the GPU.
struct Gradient {
    groups: Vec<GroupedReduction>,
    m: usize,
    n: usize,
    offset: usize,
    stride: usize,
    a: Buffer,
    b: Buffer,
    /// What C holds before; not a number between matrices.
    before: Vec<f32>,
    /// The gradients added to that.
    after: Vec<f32>,
    dtype: DType,
}

impl Gradient {
    /// Groups of `rows` rows, whose slots are in another order, and a slot that none names.
    fn new(gpu: &Gpu, rows: &[u32], m: usize, n: usize, dtype: DType) -> Gradient {
        let slots = rows.len() + 1;
        let mut row = GAP;
        let mut groups = Vec::new();
        for (number, &rows) in rows.iter().enumerate() {
            groups.push(GroupedReduction { slot: (slots - 1 - number) as u32, row, rows });
            row += rows + GAP;
        }
        let total = row as usize;
        let (offset, stride) = (16, m * n + 24);
        let belongs = |row: usize| {
            groups.iter().any(|group| row.checked_sub(group.row as usize).is_some_and(|row| row < group.rows as usize))
        };
        let owned: Vec<bool> = (0..total).map(belongs).collect();
        let (mut a, mut b) = (values(1, total * m, dtype), values(2, total * n, dtype));
        poison(&mut a, |at| owned[at / m]);
        poison(&mut b, |at| owned[at / n]);
        let mut before = random(3, offset + slots * stride);
        poison(&mut before, |at| at >= offset && (at - offset) % stride < m * n);

        let compute = Compute::new(2);
        let mut after = before.clone();
        for group in &groups {
            let (row, rows) = (group.row as usize, group.rows as usize);
            let place = offset + group.slot as usize * stride;
            let gradient = MatMut::new(&mut after[place..place + m * n], m, n);
            let (a, b) = (Mat::new(&a[row * m..][..rows * m], rows, m), Mat::new(&b[row * n..][..rows * n], rows, n));
            lina_kernels::matmul(&compute, gradient, a.t(), b, true);
        }
        let (a, b) = (gpu.buffer_from(&a, dtype).unwrap(), gpu.buffer_from(&b, dtype).unwrap());
        Gradient { groups, m, n, offset, stride, a, b, before, after, dtype }
    }

    fn run(&self, gpu: &Gpu, kernel: Option<GroupedKernel>, accumulate: bool) -> Vec<f32> {
        let Gradient { m, n, offset, stride, .. } = *self;
        let before = if accumulate { &self.before } else { &vec![f32::NAN; self.before.len()] };
        let mut c = gpu.buffer_from(before, DType::F32).unwrap();
        let (a, b, to) = (self.a.whole(), self.b.whole(), c.whole_mut());
        match kernel {
            Some(kernel) => {
                grouped_weight_gradient_with(gpu, kernel, &self.groups, a, m, b, n, to, offset, stride, accumulate)
            }
            None => grouped_weight_gradient(gpu, &self.groups, a, m, b, n, to, offset, stride, accumulate),
        }
        .unwrap();
        gpu.to_host(c.whole()).unwrap()
    }

    fn check(&self, gpu: &Gpu, kernel: Option<GroupedKernel>) {
        let Gradient { m, n, offset, stride, .. } = *self;
        // Operands are what they are, but tensor cores align the summands of a step to the largest and cut off what is
        // below, also of what cuBLASLt has them add to.
        let bound = if self.dtype == DType::F32 { 1e-5 } else { 1e-3 };
        for accumulate in [false, true] {
            let found = self.run(gpu, kernel, accumulate);
            let what = format!("{kernel:?}, {m} x {n}, accumulate {accumulate}");
            for (at, value) in found.iter().enumerate() {
                let between = at < offset || (at - offset) % stride >= m * n;
                assert!(!between || value.is_nan(), "{what}: element {at} is between matrices");
            }
            for slot in 0..=self.groups.len() {
                let place = offset + slot * stride..offset + slot * stride + m * n;
                let found = &found[place.clone()];
                let Some(group) = self.groups.iter().find(|group| group.slot as usize == slot) else {
                    assert!(accumulate || found.iter().all(|value| value.is_nan()), "{what}: slot {slot} is nobody's");
                    continue;
                };
                let (before, after) = (&self.before[place.clone()], &self.after[place]);
                let expected: Vec<f32> = match accumulate {
                    true => after.to_vec(),
                    false => after.iter().zip(before).map(|(after, before)| after - before).collect(),
                };
                if group.rows == 0 {
                    assert!(found == if accumulate { before } else { &expected }, "{what}: {group:?}");
                    continue;
                }
                for (row, (found, expected)) in found.chunks(n).zip(expected.chunks(n)).enumerate() {
                    let error = relative_error(found, expected);
                    assert!(
                        error < bound,
                        "{what}: row {row} of {group:?} has error {error}\nfound {:?}\nexpected {:?}",
                        &found[..n.min(8)],
                        &expected[..n.min(8)]
                    );
                }
            }
        }
    }
}

#[test]
fn gradients_of_ragged_groups() {
    let Some(gpu) = gpu() else { return };
    for m in SIZES {
        for n in [64, 128, 320, 768] {
            let case = Gradient::new(&gpu, &RAGGED, m, n, DType::Bf16);
            for kernel in kernels(&gpu, DType::Bf16) {
                case.check(&gpu, Some(kernel));
            }
        }
    }
}

#[test]
fn gradients_of_any_size() {
    let Some(gpu) = gpu() else { return };
    for (m, n) in [(8, 8), (72, 40), (136, 264), (200, 1000)] {
        let case = Gradient::new(&gpu, &RAGGED, m, n, DType::Bf16);
        for kernel in kernels(&gpu, DType::Bf16) {
            case.check(&gpu, Some(kernel));
        }
    }
    for dtype in [DType::Bf16, DType::F32] {
        for (m, n) in [(1, 9), (5, 11), (36, 100), (64, 64), (131, 70)] {
            Gradient::new(&gpu, &RAGGED, m, n, dtype).check(&gpu, None);
        }
    }
}

#[test]
fn gradients_of_many_tiles() {
    let Some(gpu) = gpu() else { return };
    let rows: Vec<u32> = (0..10).map(|number| 64 + number * 37 % 190).collect();
    let case = Gradient::new(&gpu, &rows, 1536, 1024, DType::Bf16);
    for kernel in kernels(&gpu, DType::Bf16) {
        case.check(&gpu, Some(kernel));
    }
    let case = Gradient::new(&gpu, &[100; 300], 64, 72, DType::Bf16);
    for kernel in kernels(&gpu, DType::Bf16) {
        case.check(&gpu, Some(kernel));
    }
}

#[test]
fn gradients_repeat_bit_by_bit() {
    let Some(gpu) = gpu() else { return };
    let case = Gradient::new(&gpu, &RAGGED, 320, 768, DType::Bf16);
    for kernel in kernels(&gpu, DType::Bf16) {
        let runs: Vec<Vec<u32>> =
            (0..4).map(|_| case.run(&gpu, Some(kernel), true).into_iter().map(f32::to_bits).collect()).collect();
        assert!(runs.iter().all(|run| run == &runs[0]), "{kernel:?}");
    }
}
