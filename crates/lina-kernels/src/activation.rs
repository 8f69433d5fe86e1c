//! The nonlinearities of expert networks: SwiGLU (Shazeer 2020) of three-matrix experts, ReLU and GELU of two-matrix experts.

use crate::compute::{Compute, RowsMut, block_rows};
use crate::isa::multiversion;
use crate::vector::{erf, exp, fma, sigmoid, tanh};

/// Nonlinearity of a two-matrix expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0).
    Relu,
    /// x · Φ(x), with the error function: Hugging Face's `gelu`.
    Gelu,
    /// GELU's tanh approximation: Hugging Face's `gelu_new` and `gelu_pytorch_tanh`.
    GeluTanh,
}

/// hidden = silu(gate) · up. `gate_up`: `[rows, 2 * features]`, gates first; `hidden`: `[rows, features]`, overwritten.
pub fn swiglu_forward(ctx: &Compute, gate_up: &[f32], features: usize, hidden: &mut [f32]) {
    assert!(
        gate_up.len() == 2 * hidden.len()
            && (features > 0 || hidden.is_empty())
            && hidden.len().is_multiple_of(features.max(1)),
        "swiglu_forward: shapes"
    );
    let rows = hidden.len() / features.max(1);
    ctx.parallel_rows(rows, block_rows(2 * features), RowsMut::new(hidden, features), |range, hidden| {
        swiglu_forward_block(
            ctx.isa(),
            &gate_up[2 * features * range.start..2 * features * range.end],
            features,
            hidden,
        );
    });
}

/// Backward of [`swiglu_forward`]. `grad_gate_up` (`[rows, 2 * features]`) is overwritten; `hidden_out`, if given, receives the forward result again (`[rows, features]`),
/// so that it need not be kept for the weight gradient of the next product.
pub fn swiglu_backward(
    ctx: &Compute,
    gate_up: &[f32],
    features: usize,
    grad_hidden: &[f32],
    grad_gate_up: &mut [f32],
    hidden_out: Option<&mut [f32]>,
) {
    let elements = grad_hidden.len();
    let outputs =
        grad_gate_up.len() == 2 * elements && hidden_out.as_ref().is_none_or(|hidden| hidden.len() == elements);
    assert!(
        outputs
            && gate_up.len() == 2 * elements
            && (features > 0 || elements == 0)
            && elements.is_multiple_of(features.max(1)),
        "swiglu_backward: shapes"
    );
    let outputs = (RowsMut::new(grad_gate_up, 2 * features), hidden_out.map(|hidden| RowsMut::new(hidden, features)));
    ctx.parallel_rows(
        elements / features.max(1),
        block_rows(2 * features),
        outputs,
        |range, (grad_gate_up, hidden)| {
            let gate_up = &gate_up[2 * features * range.start..2 * features * range.end];
            swiglu_backward_block(
                ctx.isa(),
                gate_up,
                features,
                &grad_hidden[features * range.start..features * range.end],
                grad_gate_up,
                hidden,
            );
        },
    );
}

/// y = activation(x), x = pre + bias. `pre` (`[rows, width]`) receives the bias in place where one is given (`[width]`), as the backward pass needs x;
/// `y` is overwritten.
pub fn activation_forward(ctx: &Compute, activation: Activation, pre: &mut [f32], bias: Option<&[f32]>, y: &mut [f32]) {
    assert_eq!(pre.len(), y.len(), "activation_forward: shapes");
    let width = bias.map_or(1, <[f32]>::len);
    let rows = rows_of(pre.len(), width);
    ctx.parallel_rows(rows, block_rows(width), (RowsMut::new(pre, width), RowsMut::new(y, width)), |_, (pre, y)| {
        if let Some(bias) = bias {
            add_bias_block(ctx.isa(), pre, bias);
        }
        activation_forward_block(ctx.isa(), activation, pre, y);
    });
}

/// Backward of [`activation_forward`]: `grad_pre` = `grad_y` · activation'(pre), with `pre` as the forward pass left it. All `[rows, width]`; overwritten.
pub fn activation_backward(ctx: &Compute, activation: Activation, pre: &[f32], grad_y: &[f32], grad_pre: &mut [f32]) {
    assert!(pre.len() == grad_y.len() && pre.len() == grad_pre.len(), "activation_backward: shapes");
    ctx.parallel_rows(pre.len(), block_rows(1), RowsMut::new(grad_pre, 1), |range, grad_pre| {
        activation_backward_block(ctx.isa(), activation, &pre[range.clone()], &grad_y[range], grad_pre);
    });
}

/// Adds `bias` (`[width]`) to every row of `x` (`[rows, width]`).
pub fn add_bias(ctx: &Compute, x: &mut [f32], bias: &[f32]) {
    let rows = rows_of(x.len(), bias.len());
    ctx.parallel_rows(rows, block_rows(bias.len()), RowsMut::new(x, bias.len()), |_, x| {
        add_bias_block(ctx.isa(), x, bias)
    });
}

fn rows_of(len: usize, width: usize) -> usize {
    assert!(if width == 0 { len == 0 } else { len.is_multiple_of(width) }, "{len} elements are not rows of {width}");
    len.checked_div(width).unwrap_or(0)
}

const INV_SQRT_2: f32 = std::f32::consts::FRAC_1_SQRT_2;
/// 1 / √(2π).
const INV_SQRT_2_PI: f32 = 0.398_942_3;
/// √(2/π) and the cubic coefficient of GELU's tanh approximation.
const TANH_SCALE: f32 = 0.797_884_6;
const TANH_CUBIC: f32 = 0.044_715;

multiversion! {
    fn swiglu_forward_block(gate_up: &[f32], features: usize, hidden: &mut [f32]) {
        for (gate_up, hidden) in gate_up.chunks_exact(2 * features).zip(hidden.chunks_exact_mut(features)) {
            let (gate, up) = gate_up.split_at(features);
            for ((hidden, gate), up) in hidden.iter_mut().zip(gate).zip(up) {
                *hidden = gate * sigmoid::<FMA>(*gate) * up;
            }
        }
    }

    fn swiglu_backward_block(
        gate_up: &[f32], features: usize, grad_hidden: &[f32], grad_gate_up: &mut [f32], hidden: Option<&mut [f32]>,
    ) {
        let mut hidden = hidden;
        let rows = gate_up.chunks_exact(2 * features).zip(grad_gate_up.chunks_exact_mut(2 * features)).zip(grad_hidden.chunks_exact(features));
        for (row, ((gate_up, grad_gate_up), grad_hidden)) in rows.enumerate() {
            let (gate, up) = gate_up.split_at(features);
            let (grad_gate, grad_up) = grad_gate_up.split_at_mut(features);
            let (up, grad_gate, grad_up, grad_hidden) = (&up[..features], &mut grad_gate[..features], &mut grad_up[..features], &grad_hidden[..features]);
            let mut differentiate = |i: usize| {
                let sigmoid = sigmoid::<FMA>(gate[i]);
                let silu = gate[i] * sigmoid;
                grad_up[i] = grad_hidden[i] * silu;
                grad_gate[i] = grad_hidden[i] * up[i] * fma::<FMA>(silu, 1.0 - sigmoid, sigmoid);
                silu * up[i]
            };
            match &mut hidden {
                Some(hidden) => {
                    let hidden = &mut hidden[row * features..(row + 1) * features];
                    hidden.iter_mut().enumerate().for_each(|(i, hidden)| *hidden = differentiate(i));
                }
                None => (0..features).for_each(|i| {
                    differentiate(i);
                }),
            }
        }
    }

    fn add_bias_block(x: &mut [f32], bias: &[f32]) {
        for row in x.chunks_exact_mut(bias.len().max(1)) {
            for (x, bias) in row.iter_mut().zip(bias) {
                *x += bias;
            }
        }
    }

    fn activation_forward_block(activation: Activation, pre: &[f32], y: &mut [f32]) {
        let pairs = y.iter_mut().zip(pre);
        match activation {
            Activation::Relu => pairs.for_each(|(y, x)| *y = if *x < 0.0 { 0.0 } else { *x }),
            Activation::Gelu => pairs.for_each(|(y, x)| *y = 0.5 * x * (1.0 + erf::<FMA>(x * INV_SQRT_2))),
            Activation::GeluTanh => pairs.for_each(|(y, x)| *y = 0.5 * x * (1.0 + tanh::<FMA>(TANH_SCALE * fma::<FMA>(TANH_CUBIC * x * x, *x, *x)))),
        }
    }

    fn activation_backward_block(activation: Activation, pre: &[f32], grad_y: &[f32], grad_pre: &mut [f32]) {
        let triples = grad_pre.iter_mut().zip(pre).zip(grad_y);
        match activation {
            Activation::Relu => triples.for_each(|((grad, x), grad_y)| *grad = if *x > 0.0 { *grad_y } else { 0.0 }),
            Activation::Gelu => triples.for_each(|((grad, x), grad_y)| {
                let cumulative = 0.5 * (1.0 + erf::<FMA>(x * INV_SQRT_2));
                let density = INV_SQRT_2_PI * exp::<FMA>(-0.5 * x * x);
                *grad = grad_y * fma::<FMA>(*x, density, cumulative);
            }),
            Activation::GeluTanh => triples.for_each(|((grad, x), grad_y)| {
                let tanh = tanh::<FMA>(TANH_SCALE * fma::<FMA>(TANH_CUBIC * x * x, *x, *x));
                let inner = TANH_SCALE * fma::<FMA>(3.0 * TANH_CUBIC * x, *x, 1.0);
                *grad = grad_y * 0.5 * fma::<FMA>(x * (1.0 - tanh * tanh), inner, 1.0 + tanh);
            }),
        }
    }
}
