//! Products of cuBLASLt against those of the processor; skipped where there is no GPU.

use lina_cuda::testing::{gpu, random, relative_error, round_bf16};
use lina_cuda::{Addend, DType, Gpu, Mat, MatMut, matmul};
use lina_kernels::Compute;

/// A stored matrix `[rows, columns]` whose rows have `padding` elements between them that are not a number.
struct Stored {
    values: Vec<f32>,
    rows: usize,
    columns: usize,
    stride: usize,
}

impl Stored {
    fn random(seed: u64, rows: usize, columns: usize, padding: usize, dtype: DType) -> Self {
        // Also rows of nothing are some distance apart.
        let stride = (columns + padding).max(1);
        let mut values = random(seed, rows * stride);
        if dtype == DType::Bf16 {
            values = round_bf16(&values);
        }
        for (at, value) in values.iter_mut().enumerate() {
            if at % stride >= columns {
                *value = f32::NAN;
            }
        }
        Stored { values, rows, columns, stride }
    }

    fn dense(&self) -> Vec<f32> {
        self.values.chunks(self.stride).flat_map(|row| row[..self.columns].iter().copied()).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Added {
    Nothing,
    InPlace,
    Another,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    sizes: [usize; 3],
    transposed: [bool; 2],
    padding: usize,
    types: (DType, DType),
    added: Added,
}

fn check(gpu: &Gpu, case: Case) {
    let Case { sizes: [m, n, k], transposed: [a_transposed, b_transposed], padding, types: (dtype, d_dtype), added } =
        case;
    let stored = |seed, rows, columns, transposed, dtype| {
        let (rows, columns) = if transposed { (columns, rows) } else { (rows, columns) };
        Stored::random(seed, rows, columns, padding, dtype)
    };
    let a = stored(1, m, k, a_transposed, dtype);
    let b = stored(2, k, n, b_transposed, dtype);
    let c = stored(3, m, n, false, d_dtype);

    let (a_dense, b_dense) = (a.dense(), b.dense());
    let mut expected = c.dense();
    let cpu = |values, stored: &Stored, transposed| {
        let mat = lina_kernels::Mat::new(values, stored.rows, stored.columns);
        if transposed { mat.t() } else { mat }
    };
    lina_kernels::matmul(
        &Compute::new(2),
        lina_kernels::MatMut::new(&mut expected, m, n),
        cpu(&a_dense, &a, a_transposed),
        cpu(&b_dense, &b, b_transposed),
        added != Added::Nothing,
    );

    let on_gpu = |stored: &Stored, dtype| gpu.buffer_from(&stored.values, dtype).unwrap();
    let (a_buffer, b_buffer, c_buffer) = (on_gpu(&a, dtype), on_gpu(&b, dtype), on_gpu(&c, d_dtype));
    let mut d_buffer = match added {
        Added::InPlace => on_gpu(&c, d_dtype),
        _ => gpu.buffer_from(&vec![f32::NAN; m * c.stride], d_dtype).unwrap(),
    };
    let mat = |buffer, stored: &Stored, transposed| {
        let mat = Mat::with_stride(buffer, stored.rows, stored.columns, stored.stride);
        if transposed { mat.t() } else { mat }
    };
    let addend = match added {
        Added::Nothing => Addend::None,
        Added::InPlace => Addend::Accumulate,
        Added::Another => Addend::Add(mat(c_buffer.whole(), &c, false)),
    };
    let (a, b) = (mat(a_buffer.whole(), &a, a_transposed), mat(b_buffer.whole(), &b, b_transposed));
    matmul(gpu, MatMut::with_stride(d_buffer.whole_mut(), m, n, c.stride), a, b, addend).unwrap();

    let values = gpu.to_host::<f32>(d_buffer.whole()).unwrap();
    let found = Stored { values, ..c };
    let error = relative_error(&found.dense(), &expected);
    assert!(error < if dtype == DType::F32 { 1e-5 } else { 1e-2 }, "{case:?}: error {error}");
    let padding_kept = found.values.chunks(found.stride).all(|row| row[n..].iter().all(|value| value.is_nan()));
    assert!(padding_kept, "{case:?} writes between rows");
}

const TYPES: [(DType, DType); 3] = [(DType::F32, DType::F32), (DType::Bf16, DType::Bf16), (DType::Bf16, DType::F32)];

#[test]
fn products_are_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    for types in TYPES {
        for transposed in [[false, false], [false, true], [true, false], [true, true]] {
            for added in [Added::Nothing, Added::InPlace, Added::Another] {
                for (sizes, padding) in
                    [([64, 96, 128], 0), ([33, 65, 17], 0), ([7, 130, 300], 3), ([1, 9, 5], 0), ([40, 1, 8], 8)]
                {
                    check(&gpu, Case { sizes, transposed, padding, types, added });
                }
            }
        }
    }
}

#[test]
fn nothing_is_ordinary() {
    let Some(gpu) = gpu() else { return };
    for types in TYPES {
        for added in [Added::Nothing, Added::InPlace, Added::Another] {
            for sizes in [[0, 5, 3], [5, 0, 3], [5, 3, 0]] {
                for padding in [0, 2] {
                    check(&gpu, Case { sizes, transposed: [false, false], padding, types, added });
                }
            }
        }
    }
}

#[test]
fn products_repeat_bit_by_bit() {
    let Some(gpu) = gpu() else { return };
    // Deep and narrow: an algorithm that cuts the depth is the fastest.
    let (m, n, k) = (64, 64, 65536);
    for dtype in [DType::F32, DType::Bf16] {
        let a = gpu.buffer_from(&random(1, m * k), dtype).unwrap();
        let b = gpu.buffer_from(&random(2, k * n), dtype).unwrap();
        let runs: Vec<Vec<f32>> = (0..5)
            .map(|_| {
                let mut d = gpu.buffer_from(&vec![f32::NAN; m * n], DType::F32).unwrap();
                let product = MatMut::new(d.whole_mut(), m, n);
                matmul(&gpu, product, Mat::new(a.whole(), m, k), Mat::new(b.whole(), k, n), Addend::None).unwrap();
                gpu.to_host(d.whole()).unwrap()
            })
            .collect();
        assert!(runs.iter().all(|run| run == &runs[0] && !run[0].is_nan()), "{dtype:?}");
    }
}
