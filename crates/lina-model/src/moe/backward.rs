//! The way back: combine, experts, dispatch, gate.

use lina_comm::{CommError, Direction, GradientRegion, Leg, WeightGradients, WorkKind};
use lina_kernels::{self as kernels, Mat, MatMut};

use super::{Moe, MoeShared, Steps, gate_input, has_jitter, receive};
use crate::config::AuxLoss;
use crate::experts::Experts;
use crate::jitter;
use crate::params::Parameters;
use crate::pass::{BackwardStream, Pass, grow, product_flops};

impl Moe {
    /// Takes the stream's gradient back through the layer; finishes and hands over the gradients of its experts, gate
    /// and norm. `cover` is other work that has to be done, and is done while the combine is on the wire.
    pub fn backward(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        parameters: &mut Parameters,
        stream: &mut BackwardStream<'_>,
        cover: impl FnOnce(&mut Pass<'_>, &mut Parameters) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let (rows, shape) = (self.plan.rows(), shared.shape);
        grow(&mut shared.grad_outputs, rows * shape.hidden);
        grow(&mut shared.ffn.grad_hidden, rows * shape.inner);
        grow(&mut shared.ffn.grad_projected, rows * shape.input_width);
        if pass.comm.ranks() == 1 {
            cover(pass, parameters)?;
            self.backward_here(pass, shared, parameters, stream)?;
        } else {
            self.backward_exchanged(pass, shared, parameters, stream, cover)?;
        }
        pass.work(WorkKind::Router, Some(self.layer), 0)?;
        let places = &pass.layout.layers[self.layer].feed_forward;
        let Parameters { dense, dense_gradients, .. } = parameters;
        self.norm.backward(pass, &places.norm, dense, dense_gradients, stream);
        pass.reduce_dense(dense_gradients, &places.slice)
    }

    fn backward_here(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        parameters: &mut Parameters,
        stream: &mut BackwardStream<'_>,
    ) -> Result<(), CommError> {
        let width = pass.config.hidden;
        let elements = self.plan.rows() * width;
        grow(&mut shared.grad_inputs, elements);

        pass.work(WorkKind::Permute, Some(self.layer), 0)?;
        let choices = self.plan.position.len();
        kernels::combine_backward(
            pass.compute,
            stream.grad,
            width,
            &self.returned[0][..elements],
            &self.plan.position,
            &self.gate_weight[..choices],
            &mut shared.grad_outputs[..elements],
            &mut shared.grad_gate_weight[..choices],
        );
        self.route_backward(pass, shared, parameters, stream.grad_normed)?;

        let chunk = &self.plan.chunks[0];
        shared.waiting.before_use(pass.comm, self.layer)?;
        pass.work(WorkKind::ExpertFfn, Some(self.layer), shared.shape.flops(chunk.received()))?;
        let weights = &parameters.experts[pass.layout.layer_experts(self.layer)];
        let experts = Experts { compute: pass.compute, shape: shared.shape, weights };
        let MoeShared { ffn, grad_outputs, grad_inputs, .. } = shared;
        experts.backward(chunk, &mut self.projected, grad_outputs, ffn, grad_inputs);
        shared.waiting.after_use(pass.comm, pass.layout, self.layer, Direction::Backward);
        self.weight_gradients(pass, shared, parameters)?;

        pass.work(WorkKind::Permute, Some(self.layer), 0)?;
        let grad_inputs = &shared.grad_inputs[..elements];
        kernels::gather_backward(pass.compute, grad_inputs, width, &self.plan.position, stream.grad_normed);
        Ok(())
    }

    fn backward_exchanged(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        parameters: &mut Parameters,
        stream: &mut BackwardStream<'_>,
        cover: impl FnOnce(&mut Pass<'_>, &mut Parameters) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let (width, top_k) = (pass.config.hidden, pass.config.top_k);
        let order = pass.comm.moe_shape().weight_gradients;
        let steps = Steps { direction: Direction::Backward, layer: self.layer, chunks: self.plan.chunks.len() };

        let mut combines = Vec::with_capacity(steps.chunks);
        for (number, chunk) in self.plan.chunks.iter().enumerate() {
            pass.work(WorkKind::Permute, Some(self.layer), 0)?;
            let kind = steps.kind(Leg::Combine, number);
            let mut exchange = shared.exchanges.take(kind, width, &chunk.send_rows, &chunk.recv_rows, None);
            let elements = chunk.sent.len() * width;
            let choices = chunk.tokens.start * top_k..chunk.tokens.end * top_k;
            kernels::combine_backward(
                pass.compute,
                &stream.grad[chunk.tokens.start * width..chunk.tokens.end * width],
                width,
                &self.returned[number][..elements],
                &self.plan.position[choices.clone()],
                &self.gate_weight[choices.clone()],
                &mut exchange.send[..elements],
                &mut shared.grad_gate_weight[choices],
            );
            combines.push(pass.comm.all_to_all(exchange)?);
        }

        // Needs nothing of what is on the wire.
        self.route_backward(pass, shared, parameters, stream.grad_normed)?;
        cover(pass, parameters)?;

        let mut dispatches = Vec::with_capacity(steps.chunks);
        for (number, ticket) in combines.into_iter().enumerate() {
            let chunk = &self.plan.chunks[number];
            let MoeShared { exchanges, ffn, grad_outputs, shape, waiting, .. } = &mut *shared;
            receive(pass, exchanges, ticket, self.layer, chunk, grad_outputs)?;
            waiting.before_use(pass.comm, self.layer)?;
            pass.work(WorkKind::ExpertFfn, Some(self.layer), shape.flops(chunk.received()))?;
            let kind = steps.kind(Leg::Dispatch, number);
            let mut exchange = exchanges.take(kind, width, &chunk.recv_rows, &chunk.send_rows, None);
            let weights = &parameters.experts[pass.layout.layer_experts(self.layer)];
            let experts = Experts { compute: pass.compute, shape: *shape, weights };
            experts.backward(chunk, &mut self.projected, grad_outputs, ffn, &mut exchange.send);
            let last = number + 1 == steps.chunks;
            if last {
                waiting.after_use(pass.comm, pass.layout, self.layer, steps.direction);
            }
            if last && order == WeightGradients::BeforeSend {
                self.weight_gradients(pass, shared, parameters)?;
            }
            dispatches.push(pass.comm.all_to_all(exchange)?);
        }
        if order == WeightGradients::AfterSend {
            self.weight_gradients(pass, shared, parameters)?;
        }

        for (number, ticket) in dispatches.into_iter().enumerate() {
            let exchange = pass.comm.wait(ticket)?;
            pass.work(WorkKind::Permute, Some(self.layer), 0)?;
            let chunk = &self.plan.chunks[number];
            let grad_rows = &exchange.recv[..chunk.sent.len() * width];
            let position = &self.plan.position[chunk.tokens.start * top_k..chunk.tokens.end * top_k];
            let tokens = chunk.tokens.start * width..chunk.tokens.end * width;
            kernels::gather_backward(pass.compute, grad_rows, width, position, &mut stream.grad_normed[tokens]);
            shared.exchanges.put(exchange, None);
        }
        Ok(())
    }

    /// Backward of the gate, its losses included: overwrites `grad_normed` with its part of the gradient.
    fn route_backward(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        parameters: &mut Parameters,
        grad_normed: &mut [f32],
    ) -> Result<(), CommError> {
        let config = pass.config;
        let (tokens, hidden, experts, top_k) = (pass.tokens(), config.hidden, config.experts, config.top_k);
        pass.work(WorkKind::Router, Some(self.layer), 2 * product_flops(tokens, experts, hidden))?;
        let router = &config.router;
        let balance = (router.aux_loss != AuxLoss::None).then_some(self.balance_gradient.as_slice());
        let losses = self.plan.global_tokens().max(1) as f64 * pass.step.micro_batches();
        let grad_logits = &mut shared.grad_logits[..tokens * experts];
        kernels::router_backward(
            pass.compute,
            &self.probabilities[..tokens * experts],
            &self.expert_index[..tokens * top_k],
            &self.gate_weight[..tokens * top_k],
            top_k,
            config.renormalise,
            &shared.grad_gate_weight[..tokens * top_k],
            balance,
            (f64::from(router.z_loss_coefficient) / losses) as f32,
            &self.logits[..tokens * experts],
            grad_logits,
        );
        let gate = pass.layout.layers[self.layer].feed_forward.gate();
        let grad_logits = Mat::new(grad_logits, tokens, experts);
        let input = gate_input(pass, self.layer, self.norm.output(tokens), &mut shared.gate_input);
        let gate_gradient = MatMut::new(parameters.dense_gradients.range_mut(gate.clone()), experts, hidden);
        let input = Mat::new(input, tokens, hidden);
        kernels::matmul(pass.compute, gate_gradient, grad_logits.t(), input, pass.accumulate);
        let gate = Mat::new(&parameters.dense[gate.clone()], experts, hidden);
        kernels::matmul(pass.compute, MatMut::new(grad_normed, tokens, hidden), grad_logits, gate, false);
        if has_jitter(pass) {
            jitter::apply(pass.compute, grad_normed, hidden, router.jitter, &pass.step, self.layer);
        }
        Ok(())
    }

    /// Weight gradients of the rank's experts; hands over those that have replicas elsewhere. Every rank takes part
    /// for every such expert, in the order of experts, so that all count the same operations.
    fn weight_gradients(
        &self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        parameters: &mut Parameters,
    ) -> Result<(), CommError> {
        let layer_experts = pass.layout.layer_experts(self.layer);
        shared.waiting.before_gradients(pass.comm, self.layer)?;
        pass.work(WorkKind::ExpertWeightGradient, Some(self.layer), shared.shape.flops(self.plan.rows()))?;
        let Parameters { experts, expert_gradients, .. } = parameters;
        let experts = Experts { compute: pass.compute, shape: shared.shape, weights: &experts[layer_experts.clone()] };
        experts.weight_gradients(
            &self.plan.slot_rows,
            &self.inputs,
            &shared.grad_outputs,
            &shared.ffn,
            expert_gradients.range_mut(layer_experts),
            pass.accumulate,
        );
        shared.waiting.after_gradients(pass.comm, pass.layout, self.layer);
        for (expert, group) in shared.groups.iter().enumerate() {
            let Some(group) = *group else { continue };
            let block = pass.layout.expert_block(self.layer, expert);
            pass.comm.reduce_gradient(GradientRegion {
                group,
                elements: pass.layout.expert_elements(),
                local: block.map(|block| (&mut *expert_gradients, block)),
            })?;
        }
        Ok(())
    }
}
