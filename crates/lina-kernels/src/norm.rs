//! RMSNorm (Zhang & Sennrich 2019), over rows or over the heads inside them, and LayerNorm (Ba et al. 2016).

use crate::compute::{Compute, RowsMut, block_rows};
use crate::isa::multiversion;
use crate::layout::HeadLayout;
use crate::scratch;
use crate::vector::{dot, dot3, fma, sum};

/// Rows whose weight gradients are summed before they join the rest; part of the arithmetic.
const GRADIENT_ROWS: usize = 64;

/// y = x · weight / rms(x) per row, rms(x) = √(mean(x²) + eps).
///
/// `x`, `y`: `[rows, width]`; `weight`: `[width]`; `inv_rms`: `[rows]`, 1 / rms(x), for the backward pass.
pub fn rms_norm_forward(ctx: &Compute, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], inv_rms: &mut [f32]) {
    let layout = whole_rows(weight.len());
    head_rms_norm_forward(ctx, layout, x, weight, eps, y, inv_rms);
}

/// Backward of [`rms_norm_forward`]: `grad_x` (`[rows, width]`) and `grad_weight` (`[width]`) are added to.
pub fn rms_norm_backward(
    ctx: &Compute,
    x: &[f32],
    weight: &[f32],
    inv_rms: &[f32],
    grad_y: &[f32],
    grad_x: &mut [f32],
    grad_weight: &mut [f32],
) {
    let width = weight.len();
    let rows = whole_rows(width).rows(x.len());
    assert!(
        grad_y.len() == x.len() && grad_x.len() == x.len() && inv_rms.len() == rows && grad_weight.len() == width,
        "rms_norm_backward: shapes"
    );
    with_partials(ctx, rows, width, grad_weight, |partials| {
        ctx.parallel_rows(
            rows.div_ceil(GRADIENT_ROWS),
            1,
            (RowsMut::new(grad_x, GRADIENT_ROWS * width), partials),
            |block, (grad_x, partial)| {
                let range = elements(block.start, width, x.len());
                let inv_rms = &inv_rms[block.start * GRADIENT_ROWS..rows.min(block.end * GRADIENT_ROWS)];
                rms_backward_block(ctx.isa(), &x[range.clone()], weight, inv_rms, &grad_y[range], grad_x, partial);
            },
        );
    });
}

/// RMSNorm of every head of every row: the query and key norms of Qwen3 (`layout.head_dim` is the head size) and of OLMoE (one "head" as wide as the projection).
///
/// `x`, `y`: `[rows, row_stride]`, of which only the heads are read and written; `weight`: `[head_dim]`; `inv_rms`: `[rows, heads]`.
pub fn head_rms_norm_forward(
    ctx: &Compute,
    layout: HeadLayout,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    y: &mut [f32],
    inv_rms: &mut [f32],
) {
    let (rows, stride, heads) = (layout.rows(x.len()), layout.row_stride, layout.heads);
    assert!(
        weight.len() == layout.head_dim && y.len() == x.len() && inv_rms.len() == rows * heads,
        "rms_norm_forward: shapes"
    );
    let outputs = (RowsMut::new(y, stride), RowsMut::new(inv_rms, heads));
    ctx.parallel_rows(rows, block_rows(heads * layout.head_dim), outputs, |range, (y, inv_rms)| {
        head_rms_forward_block(
            ctx.isa(),
            layout,
            &x[range.start * stride..range.end * stride],
            weight,
            eps,
            y,
            inv_rms,
        );
    });
}

/// Backward of [`head_rms_norm_forward`], in place: the heads of `grad` (`[rows, row_stride]`) hold the gradient of y and receive that of x (overwritten).
/// `grad_weight` (`[head_dim]`) is added to.
pub fn head_rms_norm_backward(
    ctx: &Compute,
    layout: HeadLayout,
    x: &[f32],
    weight: &[f32],
    inv_rms: &[f32],
    grad: &mut [f32],
    grad_weight: &mut [f32],
) {
    let (rows, stride, heads) = (layout.rows(x.len()), layout.row_stride, layout.heads);
    let width = layout.head_dim;
    assert!(
        weight.len() == width && grad.len() == x.len() && inv_rms.len() == rows * heads && grad_weight.len() == width,
        "head_rms_norm_backward: shapes"
    );
    with_partials(ctx, rows, width, grad_weight, |partials| {
        ctx.parallel_rows(
            rows.div_ceil(GRADIENT_ROWS),
            1,
            (RowsMut::new(grad, GRADIENT_ROWS * stride), partials),
            |block, (grad, partial)| {
                let inv_rms =
                    &inv_rms[block.start * GRADIENT_ROWS * heads..rows.min(block.end * GRADIENT_ROWS) * heads];
                head_rms_backward_block(
                    ctx.isa(),
                    layout,
                    &x[elements(block.start, stride, x.len())],
                    weight,
                    inv_rms,
                    grad,
                    partial,
                );
            },
        );
    });
}

/// y = (x − mean(x)) / √(var(x) + eps) · weight + bias per row, with the biased variance.
///
/// `x`, `y`: `[rows, width]`; `weight`, `bias`: `[width]`; `mean`, `inv_std`: `[rows]`, for the backward pass.
pub fn layer_norm_forward(
    ctx: &Compute,
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    y: &mut [f32],
    mean: &mut [f32],
    inv_std: &mut [f32],
) {
    let width = weight.len();
    let rows = whole_rows(width).rows(x.len());
    assert!(
        bias.len() == width && y.len() == x.len() && mean.len() == rows && inv_std.len() == rows,
        "layer_norm_forward: shapes"
    );
    let outputs = (RowsMut::new(y, width), RowsMut::new(mean, 1), RowsMut::new(inv_std, 1));
    ctx.parallel_rows(rows, block_rows(width), outputs, |range, (y, mean, inv_std)| {
        layer_forward_block(ctx.isa(), &x[range.start * width..range.end * width], weight, bias, eps, y, mean, inv_std);
    });
}

/// Backward of [`layer_norm_forward`]: `grad_x` (`[rows, width]`), `grad_weight` and `grad_bias` (`[width]`) are added to.
pub fn layer_norm_backward(
    ctx: &Compute,
    x: &[f32],
    weight: &[f32],
    mean: &[f32],
    inv_std: &[f32],
    grad_y: &[f32],
    grad_x: &mut [f32],
    grad_weight: &mut [f32],
    grad_bias: &mut [f32],
) {
    let width = weight.len();
    let rows = whole_rows(width).rows(x.len());
    let vectors = grad_weight.len() == width && grad_bias.len() == width && mean.len() == rows && inv_std.len() == rows;
    assert!(vectors && grad_y.len() == x.len() && grad_x.len() == x.len(), "layer_norm_backward: shapes");
    with_partials(ctx, rows, width, grad_bias, |bias_partials| {
        with_partials(ctx, rows, width, grad_weight, |weight_partials| {
            let outputs = (RowsMut::new(grad_x, GRADIENT_ROWS * width), weight_partials, bias_partials);
            ctx.parallel_rows(
                rows.div_ceil(GRADIENT_ROWS),
                1,
                outputs,
                |block, (grad_x, weight_partial, bias_partial)| {
                    let range = elements(block.start, width, x.len());
                    let rows = block.start * GRADIENT_ROWS..rows.min(block.end * GRADIENT_ROWS);
                    let (mean, inv_std) = (&mean[rows.clone()], &inv_std[rows]);
                    layer_backward_block(
                        ctx.isa(),
                        &x[range.clone()],
                        weight,
                        mean,
                        inv_std,
                        &grad_y[range],
                        grad_x,
                        weight_partial,
                        bias_partial,
                    );
                },
            );
        });
    });
}

/// `total[j] += sum over rows of grad_y[i][j]`: the gradient of a bias. `grad_y`: `[rows, width]`, `width` the length of `grad_bias`, which is added to.
pub fn bias_grad(ctx: &Compute, grad_y: &[f32], grad_bias: &mut [f32]) {
    let width = grad_bias.len();
    let rows = whole_rows(width).rows(grad_y.len());
    with_partials(ctx, rows, width, grad_bias, |partials| {
        ctx.parallel_rows(rows.div_ceil(GRADIENT_ROWS), 1, partials, |block, partial| {
            column_sums(ctx.isa(), &grad_y[elements(block.start, width, grad_y.len())], partial);
        });
    });
}

fn whole_rows(width: usize) -> HeadLayout {
    HeadLayout { offset: 0, heads: 1, head_dim: width, row_stride: width }
}

/// The elements of a gradient block, in rows of `width`.
fn elements(block: usize, width: usize, len: usize) -> std::ops::Range<usize> {
    block * GRADIENT_ROWS * width..len.min((block + 1) * GRADIENT_ROWS * width)
}

/// Gives `fill` a zeroed row of `width` per block of [`GRADIENT_ROWS`] rows, then adds those rows to `total` in order.
fn with_partials(ctx: &Compute, rows: usize, width: usize, total: &mut [f32], fill: impl FnOnce(RowsMut<'_, f32>)) {
    scratch::with_f32(rows.div_ceil(GRADIENT_ROWS) * width, |partials| {
        partials.fill(0.0);
        fill(RowsMut::new(partials, width));
        column_sums(ctx.isa(), partials, total);
    });
}

#[inline(always)]
fn rms_backward_row<const FMA: bool>(
    x: &[f32],
    weight: &[f32],
    inv_rms: f32,
    grad_y: &[f32],
    grad_weight: &mut [f32],
) -> f32 {
    let width = x.len();
    let (weight, grad_y, grad_weight) = (&weight[..width], &grad_y[..width], &mut grad_weight[..width]);
    for i in 0..width {
        grad_weight[i] = fma::<FMA>(grad_y[i], x[i] * inv_rms, grad_weight[i]);
    }
    dot3::<FMA>(x, weight, grad_y) * inv_rms * inv_rms * inv_rms / width as f32
}

multiversion! {
    fn head_rms_forward_block(layout: HeadLayout, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], inv_rms: &mut [f32]) {
        let width = layout.head_dim;
        let rows = x.chunks_exact(layout.row_stride).zip(y.chunks_exact_mut(layout.row_stride)).zip(inv_rms.chunks_exact_mut(layout.heads.max(1)));
        for ((x, y), inv_rms) in rows {
            let (x, y) = (&x[layout.columns()], &mut y[layout.columns()]);
            for ((x, y), inv_rms) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(inv_rms) {
                let inverse = 1.0 / (dot::<FMA>(x, x) / width as f32 + eps).sqrt();
                *inv_rms = inverse;
                for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                    *y = x * inverse * weight;
                }
            }
        }
    }

    fn rms_backward_block(x: &[f32], weight: &[f32], inv_rms: &[f32], grad_y: &[f32], grad_x: &mut [f32], grad_weight: &mut [f32]) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(grad_y.chunks_exact(width)).zip(grad_x.chunks_exact_mut(width)).zip(inv_rms);
        for (((x, grad_y), grad_x), &inv_rms) in rows {
            let along = rms_backward_row::<FMA>(x, weight, inv_rms, grad_y, grad_weight);
            for (((grad_x, x), weight), grad_y) in grad_x.iter_mut().zip(x).zip(weight).zip(grad_y) {
                *grad_x += fma::<FMA>(grad_y * weight, inv_rms, -(x * along));
            }
        }
    }

    fn head_rms_backward_block(layout: HeadLayout, x: &[f32], weight: &[f32], inv_rms: &[f32], grad: &mut [f32], grad_weight: &mut [f32]) {
        let width = layout.head_dim;
        let rows = x.chunks_exact(layout.row_stride).zip(grad.chunks_exact_mut(layout.row_stride)).zip(inv_rms.chunks_exact(layout.heads.max(1)));
        for ((x, grad), inv_rms) in rows {
            let (x, grad) = (&x[layout.columns()], &mut grad[layout.columns()]);
            for ((x, grad), &inv_rms) in x.chunks_exact(width).zip(grad.chunks_exact_mut(width)).zip(inv_rms) {
                let along = rms_backward_row::<FMA>(x, weight, inv_rms, grad, grad_weight);
                for ((grad, x), weight) in grad.iter_mut().zip(x).zip(weight) {
                    *grad = fma::<FMA>(*grad * weight, inv_rms, -(x * along));
                }
            }
        }
    }

    fn layer_forward_block(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32], mean: &mut [f32], inv_std: &mut [f32]) {
        let width = weight.len();
        for (((x, y), mean), inv_std) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(mean).zip(inv_std) {
            let center = sum(x) / width as f32;
            for (y, x) in y.iter_mut().zip(x) {
                *y = x - center;
            }
            let inverse = 1.0 / (dot::<FMA>(y, y) / width as f32 + eps).sqrt();
            (*mean, *inv_std) = (center, inverse);
            for ((y, weight), bias) in y.iter_mut().zip(weight).zip(bias) {
                *y = fma::<FMA>(*y * inverse, *weight, *bias);
            }
        }
    }

    fn layer_backward_block(
        x: &[f32], weight: &[f32], mean: &[f32], inv_std: &[f32], grad_y: &[f32], grad_x: &mut [f32], grad_weight: &mut [f32], grad_bias: &mut [f32],
    ) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(grad_y.chunks_exact(width)).zip(grad_x.chunks_exact_mut(width)).zip(mean).zip(inv_std);
        for ((((x, grad_y), grad_x), &mean), &inv_std) in rows {
            for ((((grad_weight, grad_bias), grad_y), x), _) in grad_weight.iter_mut().zip(grad_bias.iter_mut()).zip(grad_y).zip(x).zip(weight) {
                *grad_weight = fma::<FMA>(*grad_y, (x - mean) * inv_std, *grad_weight);
                *grad_bias += grad_y;
            }
            let total = dot::<FMA>(grad_y, weight);
            let along = (dot3::<FMA>(x, weight, grad_y) - mean * total) * inv_std / width as f32;
            let total = total / width as f32;
            for (((grad_x, x), weight), grad_y) in grad_x.iter_mut().zip(x).zip(weight).zip(grad_y) {
                let normalised = (x - mean) * inv_std;
                *grad_x += inv_std * (fma::<FMA>(*grad_y, *weight, -total) - normalised * along);
            }
        }
    }

    fn column_sums(rows: &[f32], total: &mut [f32]) {
        for row in rows.chunks_exact(total.len().max(1)) {
            for (total, value) in total.iter_mut().zip(row) {
                *total += value;
            }
        }
    }
}
