//! Matrix products against a naive reference, and the independence of bits that callers rely on.

use lina_kernels::gemm::{self, Layout};
use lina_kernels::{Compute, Isa, Mat, MatMut, Product, matmul, matmul_grouped};
use proptest::prelude::*;

mod common;
use common::random;

/// The reference in f64, with a bound on the rounding error of an f32 chain.
fn check(ctx: &Compute, m: usize, n: usize, k: usize, layout: Layout, accumulate: bool, seed: u64) {
    let (a, b, before) = (random(m * k, seed), random(k * n, seed + 1), random(m * n, seed + 2));
    let mut c = before.clone();
    matmul(ctx, MatMut::new(&mut c, m, n), mat_a(&a, m, k, layout), mat_b(&b, k, n, layout), accumulate);
    for i in 0..m {
        for j in 0..n {
            let mut expected = if accumulate { f64::from(before[i * n + j]) } else { 0.0 };
            for p in 0..k {
                let a = if matches!(layout, Layout::TN | Layout::TT) { a[p * m + i] } else { a[i * k + p] };
                let b = if matches!(layout, Layout::NT | Layout::TT) { b[j * k + p] } else { b[p * n + j] };
                expected += f64::from(a) * f64::from(b);
            }
            let error = (f64::from(c[i * n + j]) - expected).abs();
            assert!(
                error < 1e-6 * (k as f64 + 4.0),
                "{:?} [{m}, {n}, {k}] {layout:?}: c[{i}][{j}] is {} instead of {expected}",
                ctx.isa(),
                c[i * n + j]
            );
        }
    }
}

fn mat_a(a: &[f32], m: usize, k: usize, layout: Layout) -> Mat<'_> {
    if matches!(layout, Layout::TN | Layout::TT) { Mat::new(a, k, m).t() } else { Mat::new(a, m, k) }
}

fn mat_b(b: &[f32], k: usize, n: usize, layout: Layout) -> Mat<'_> {
    if matches!(layout, Layout::NT | Layout::TT) { Mat::new(b, n, k).t() } else { Mat::new(b, k, n) }
}

const LAYOUTS: [Layout; 4] = [Layout::NN, Layout::NT, Layout::TN, Layout::TT];

#[test]
fn matches_the_reference_at_the_edges_of_every_instruction_set() {
    for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
        for threads in [1, 2] {
            let ctx = Compute::with_isa(threads, isa);
            for layout in LAYOUTS {
                for (m, n, k) in [
                    (0, 5, 3),
                    (3, 0, 3),
                    (4, 5, 0),
                    (1, 1, 1),
                    (1, 100, 70),
                    (15, 33, 17),
                    (14, 32, 16),
                    (2, 50, 515),
                    (3, 17, 33),
                    (4, 100, 1030),
                    (29, 48, 515),
                    (200, 70, 1030),
                    (65, 300, 40),
                ] {
                    check(&ctx, m, n, k, layout, false, 1);
                    check(&ctx, m, n, k, layout, true, 2);
                }
            }
        }
    }
}

#[test]
fn a_group_equals_its_products() {
    let shapes = [(0, 64, 32), (100, 64, 32), (1, 64, 32), (333, 64, 32), (17, 200, 600)];
    let ctx = Compute::new(2);
    let operands: Vec<_> = shapes.iter().map(|&(m, n, k)| (random(m * k, 1), random(n * k, 2))).collect();
    let mut grouped: Vec<_> = shapes.iter().map(|&(m, n, _)| vec![1.0; m * n]).collect();
    let mut single = grouped.clone();
    let products = grouped.iter_mut().zip(&operands).zip(shapes).map(|((c, (a, b)), (m, n, k))| Product {
        c: MatMut::new(c, m, n),
        a: Mat::new(a, m, k),
        b: Mat::new(b, n, k).t(),
        accumulate: true,
    });
    matmul_grouped(&ctx, products);
    for ((c, (a, b)), (m, n, k)) in single.iter_mut().zip(&operands).zip(shapes) {
        matmul(&Compute::new(1), MatMut::new(c, m, n), Mat::new(a, m, k), Mat::new(b, n, k).t(), true);
    }
    assert_eq!(grouped, single);
}

#[test]
fn a_few_rows_have_the_bits_that_they_have_among_many() {
    for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
        // Depths and widths on both sides of the sizes of blocks, panels and stretches that are prefetched.
        for (n, k) in [(1, 1), (16, 16), (37, 300), (70, 512), (33, 515), (100, 1030), (48, 2048)] {
            let rows = 40;
            let (a, w) = (random(rows * k, 1), random(n * k, 2));
            let mut whole = vec![0.5; rows * n];
            matmul(
                &Compute::with_isa(1, isa),
                MatMut::new(&mut whole, rows, n),
                Mat::new(&a, rows, k),
                Mat::new(&w, n, k).t(),
                true,
            );
            for m in 1..=18 {
                for threads in [1, 2] {
                    let ctx = Compute::with_isa(threads, isa);
                    let (first, mut few) = (rows - m - 1, vec![0.5; m * n]);
                    let a = &a[first * k..(first + m) * k];
                    matmul(&ctx, MatMut::new(&mut few, m, n), Mat::new(a, m, k), Mat::new(&w, n, k).t(), true);
                    assert_eq!(few, whole[first * n..(first + m) * n], "{isa:?}: {m} rows of [{n}, {k}]");
                    // The same rows as columns of a stored transpose.
                    let transposed: Vec<f32> = (0..k * m).map(|index| a[index % m * k + index / m]).collect();
                    few.fill(0.5);
                    matmul(
                        &ctx,
                        MatMut::new(&mut few, m, n),
                        Mat::new(&transposed, k, m).t(),
                        Mat::new(&w, n, k).t(),
                        true,
                    );
                    assert_eq!(few, whole[first * n..(first + m) * n], "{isa:?}: {m} columns of [{n}, {k}]");
                }
            }
        }
    }
}

#[test]
fn strided_views_leave_the_gaps_alone() {
    let ctx = Compute::new(1);
    let (m, n, k, stride) = (20, 40, 30, 50);
    let (a, b) = (random(m * stride, 1), random(k * stride, 2));
    let mut c = vec![7.0; m * stride];
    matmul(
        &ctx,
        MatMut::with_stride(&mut c, m, n, stride),
        Mat::with_stride(&a, m, k, stride),
        Mat::with_stride(&b, k, n, stride),
        false,
    );
    let dense = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
        (0..rows).flat_map(|row| x[row * stride..row * stride + cols].to_vec()).collect()
    };
    let mut expected = vec![0.0; m * n];
    matmul(
        &ctx,
        MatMut::new(&mut expected, m, n),
        Mat::new(&dense(&a, m, k), m, k),
        Mat::new(&dense(&b, k, n), k, n),
        false,
    );
    assert_eq!(dense(&c, m, n), expected);
    assert!(c.chunks(stride).all(|row| row[n..].iter().all(|&gap| gap == 7.0)));
}

#[test]
fn one_row_may_be_a_column_of_a_wider_matrix() {
    let ctx = Compute::new(1);
    let (n, k, stride) = (20, 40, 7);
    let (a, w) = (random(k * stride, 1), random(n * k, 2));
    let row: Vec<f32> = a.iter().step_by(stride).copied().collect();
    let (mut strided, mut dense) = (vec![0.0; n], vec![0.0; n]);
    let column = Mat::with_stride(&a, k, 1, stride).t();
    matmul(&ctx, MatMut::new(&mut strided, 1, n), column, Mat::new(&w, n, k).t(), false);
    matmul(&ctx, MatMut::new(&mut dense, 1, n), Mat::new(&row, 1, k), Mat::new(&w, n, k).t(), false);
    assert_eq!(strided, dense);
}

#[test]
fn recording_gives_the_shapes_in_order() {
    let ctx = Compute::new(1);
    let (a, b, mut c) = (random(6, 1), random(12, 2), vec![0.0; 8]);
    gemm::record(true);
    matmul(&ctx, MatMut::new(&mut c, 2, 4), Mat::new(&a, 2, 3), Mat::new(&b, 4, 3).t(), true);
    gemm::record(false);
    // Other tests of this process may have run products meanwhile.
    let shape = gemm::Shape { m: 2, n: 4, k: 3, layout: Layout::NT, accumulate: true, batch: 1 };
    assert!(gemm::take_recorded().contains(&shape));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any block of C has the bits that it has in the whole product, whatever the threads: the promise that pipelining rests on.
    #[test]
    fn bits_depend_on_row_column_and_depth_alone(
        m in 1_usize..120, n in 1_usize..120, k in 1_usize..1100, start in 0.0_f64..1.0, len in 0.0_f64..1.0, layout in 0_usize..4, isa in 0_usize..3, seed in 0_u64..1000,
    ) {
        let (isa, layout) = ([Isa::Portable, Isa::Avx2, Isa::Avx512][isa], LAYOUTS[layout]);
        let (a, b, mut whole) = (random(m * k, seed), random(k * n, seed + 1), vec![0.0; m * n]);
        matmul(&Compute::with_isa(2, isa), MatMut::new(&mut whole, m, n), mat_a(&a, m, k, layout), mat_b(&b, k, n, layout), false);
        let first = (start * m as f64) as usize;
        let rows = 1 + (len * (m - first) as f64) as usize;
        let rows = rows.min(m - first);
        let part_a: Vec<f32> = (0..rows * k)
            .map(|index| if matches!(layout, Layout::TN | Layout::TT) { a[index / rows * m + first + index % rows] } else { a[first * k + index] })
            .collect();
        let mut part = vec![0.0; rows * n];
        matmul(&Compute::with_isa(1, isa), MatMut::new(&mut part, rows, n), mat_a(&part_a, rows, k, layout), mat_b(&b, k, n, layout), false);
        prop_assert_eq!(&whole[first * n..(first + rows) * n], &part[..]);
        // The same for columns.
        let (first, cols) = (first.min(n - 1), rows.min(n - first.min(n - 1)));
        let part_b: Vec<f32> = (0..cols * k)
            .map(|index| if matches!(layout, Layout::NT | Layout::TT) { b[first * k + index] } else { b[index / cols * n + first + index % cols] })
            .collect();
        let mut part = vec![0.0; m * cols];
        matmul(&Compute::with_isa(1, isa), MatMut::new(&mut part, m, cols), mat_a(&a, m, k, layout), mat_b(&part_b, k, cols, layout), false);
        let expected: Vec<f32> = whole.chunks(n).flat_map(|row| row[first..first + cols].to_vec()).collect();
        prop_assert_eq!(expected, part);
    }
}
