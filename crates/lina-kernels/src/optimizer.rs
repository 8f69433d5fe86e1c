//! AdamW (Loshchilov & Hutter 2019), one pass over parameters, gradients and both moments.

use crate::compute::{Compute, RowsMut, block_rows};
use crate::isa::multiversion;

/// The scalars of one step, as PyTorch's `AdamW` names them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f32,
    /// 1 − beta1^step, step counted from 1.
    pub bias_correction1: f32,
    /// 1 − beta2^step.
    pub bias_correction2: f32,
    /// Every gradient is multiplied by this first (clipping, averaging).
    pub grad_scale: f32,
}

/// Updates `params` and the moments `m` and `v` in place from `grads`; all have one length.
pub fn adamw_step(ctx: &Compute, params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32], step: &AdamWStep) {
    let len = params.len();
    assert!(grads.len() == len && m.len() == len && v.len() == len, "adamw_step: shapes");
    let outputs = (RowsMut::new(params, 1), RowsMut::new(m, 1), RowsMut::new(v, 1));
    ctx.parallel_rows(len, block_rows(1), outputs, |range, (params, m, v)| {
        adamw_block(ctx.isa(), params, &grads[range], m, v, *step)
    });
}

multiversion! {
    fn adamw_block(params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32], step: AdamWStep) {
        let keep = 1.0 - step.learning_rate * step.weight_decay;
        let rate = step.learning_rate / step.bias_correction1;
        let inv_root_correction = 1.0 / step.bias_correction2.sqrt();
        for (((param, grad), m), v) in params.iter_mut().zip(grads).zip(m).zip(v) {
            let grad = grad * step.grad_scale;
            *m = step.beta1 * *m + (1.0 - step.beta1) * grad;
            *v = step.beta2 * *v + (1.0 - step.beta2) * grad * grad;
            *param = *param * keep - rate * *m / (v.sqrt() * inv_root_correction + step.epsilon);
        }
    }
}
