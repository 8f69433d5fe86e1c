//! The way back: combine, experts, dispatch, gate.

use lina_comm::{Direction, GradientRegion, Leg, WeightGradients, WorkKind};
use lina_cuda::{self as cuda, Addend, DType, Mat, MatMut, SliceMut, matmul};

use super::{Moe, MoeShared, apply_jitter, gate_input, has_jitter, receive};
use crate::batch::StepError;
use crate::config::AuxLoss;
use crate::cuda::experts::Experts;
use crate::cuda::parameters::{DeviceGradients, DeviceWeights};
use crate::cuda::pass::{BackwardStream, Pass};
use crate::moe::Steps;
use crate::pass::product_flops;

impl Moe {
    /// Takes the stream's gradient back through the layer; finishes and hands over the gradients of its experts, gate
    /// and norm. `cover` is other work that has to be done, and is done while the combine is on the wire.
    pub fn backward(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        weights: &DeviceWeights,
        gradients: &mut DeviceGradients,
        stream: &mut BackwardStream<'_>,
        cover: impl FnOnce(&mut Pass<'_>, &mut DeviceGradients) -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        let (rows, shape, gpu) = (self.plan.rows(), shared.shape, pass.gpu);
        gpu.grow(&mut shared.grad_outputs, rows * shape.hidden)?;
        gpu.grow(&mut shared.ffn.hidden, rows * shape.inner)?;
        gpu.grow(&mut shared.ffn.grad_hidden, rows * shape.inner)?;
        gpu.grow(&mut shared.ffn.grad_projected, rows * shape.input_width)?;
        if pass.comm.ranks() == 1 {
            cover(pass, gradients)?;
            self.backward_here(pass, shared, weights, gradients, stream)?;
        } else {
            self.backward_exchanged(pass, shared, weights, gradients, stream, cover)?;
        }
        pass.work(WorkKind::Router, Some(self.layer), 0)?;
        let places = &pass.layout.layers[self.layer].feed_forward;
        self.norm.backward(pass, &places.norm, weights, &mut gradients.dense, stream)?;
        pass.reduce_dense(&mut gradients.dense, &places.slice)?;
        Ok(())
    }

    /// The rank's experts of this layer.
    fn experts<'a>(&self, pass: &Pass<'a>, shared: &MoeShared, weights: &'a DeviceWeights) -> Experts<'a> {
        let weights = weights.experts(pass.layout.layer_experts(self.layer));
        Experts { gpu: pass.gpu, shape: shared.shape, weights }
    }

    fn backward_here(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        weights: &DeviceWeights,
        gradients: &mut DeviceGradients,
        stream: &mut BackwardStream<'_>,
    ) -> Result<(), StepError> {
        let (gpu, width, choices) = (pass.gpu, pass.config.hidden, pass.tokens() * pass.config.top_k);
        let elements = self.plan.rows() * width;
        let experts = self.experts(pass, shared, weights);
        gpu.grow(&mut shared.grad_inputs, elements)?;

        pass.work(WorkKind::Permute, Some(self.layer), 0)?;
        cuda::combine_backward(
            gpu,
            stream.grad.as_slice(),
            width,
            self.returned[0].slice(0..elements),
            self.position.slice(0..choices),
            self.gate_weight.slice(0..choices),
            shared.grad_outputs.slice_mut(0..elements),
            shared.grad_gate_weight.slice_mut(0..choices),
        )?;
        self.route_backward(pass, shared, weights, gradients, stream.grad_normed.reborrow())?;

        let chunk = &self.plan.chunks[0];
        pass.work(WorkKind::ExpertFfn, Some(self.layer), shared.shape.flops(chunk.received()))?;
        let MoeShared { ffn, grad_outputs, grad_inputs, .. } = shared;
        experts.backward(chunk, self.projected.whole_mut(), grad_outputs.whole(), ffn, grad_inputs.whole_mut())?;
        self.weight_gradients(pass, shared, &experts, gradients)?;

        pass.work(WorkKind::Permute, Some(self.layer), 0)?;
        let grad_inputs = shared.grad_inputs.slice(0..elements);
        let position = self.position.slice(0..choices);
        cuda::gather_backward(gpu, grad_inputs, width, position, stream.grad_normed.reborrow())?;
        Ok(())
    }

    fn backward_exchanged(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        weights: &DeviceWeights,
        gradients: &mut DeviceGradients,
        stream: &mut BackwardStream<'_>,
        cover: impl FnOnce(&mut Pass<'_>, &mut DeviceGradients) -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        let (gpu, dtype, experts) = (pass.gpu, pass.dtype, self.experts(pass, shared, weights));
        let (width, top_k) = (pass.config.hidden, pass.config.top_k);
        let order = pass.comm.moe_shape().weight_gradients;
        let steps = Steps { direction: Direction::Backward, layer: self.layer, chunks: self.plan.chunks.len() };

        let mut combines = Vec::with_capacity(steps.chunks);
        for (number, chunk) in self.plan.chunks.iter().enumerate() {
            pass.work(WorkKind::Permute, Some(self.layer), 0)?;
            let kind = steps.kind(Leg::Combine, number);
            let mut exchange = shared.exchanges.take(gpu, kind, width, &chunk.send_rows, &chunk.recv_rows, None)?;
            let elements = chunk.sent.len() * width;
            let choices = chunk.tokens.start * top_k..chunk.tokens.end * top_k;
            cuda::combine_backward(
                gpu,
                stream.grad.as_slice().slice(chunk.tokens.start * width..chunk.tokens.end * width),
                width,
                self.returned[number].slice(0..elements),
                self.position.slice(choices.clone()),
                self.gate_weight.slice(choices.clone()),
                exchange.send.slice_mut(0..elements),
                shared.grad_gate_weight.slice_mut(choices),
            )?;
            combines.push(pass.comm.all_to_all_on_device(exchange)?);
        }

        // Needs nothing of what is on the wire.
        self.route_backward(pass, shared, weights, gradients, stream.grad_normed.reborrow())?;
        cover(pass, gradients)?;

        let mut dispatches = Vec::with_capacity(steps.chunks);
        for (number, ticket) in combines.into_iter().enumerate() {
            let chunk = &self.plan.chunks[number];
            let mut grad_outputs = std::mem::replace(&mut shared.grad_outputs, gpu.uninit(0, dtype)?);
            let received = receive(pass, shared, ticket, self.layer, &chunk.blocks, grad_outputs.whole_mut());
            shared.grad_outputs = grad_outputs;
            received?;
            pass.work(WorkKind::ExpertFfn, Some(self.layer), shared.shape.flops(chunk.received()))?;
            let kind = steps.kind(Leg::Dispatch, number);
            let mut exchange = shared.exchanges.take(gpu, kind, width, &chunk.recv_rows, &chunk.send_rows, None)?;
            let MoeShared { ffn, grad_outputs, .. } = &mut *shared;
            let grad_inputs = exchange.send.whole_mut();
            experts.backward(chunk, self.projected.whole_mut(), grad_outputs.whole(), ffn, grad_inputs)?;
            if number + 1 == steps.chunks && order == WeightGradients::BeforeSend {
                self.weight_gradients(pass, shared, &experts, gradients)?;
            }
            dispatches.push(pass.comm.all_to_all_on_device(exchange)?);
        }
        if order == WeightGradients::AfterSend {
            self.weight_gradients(pass, shared, &experts, gradients)?;
        }

        for (number, ticket) in dispatches.into_iter().enumerate() {
            let exchange = pass.comm.wait_on_device(ticket)?;
            pass.work(WorkKind::Permute, Some(self.layer), 0)?;
            let chunk = &self.plan.chunks[number];
            let grad_rows = exchange.recv.slice(0..chunk.sent.len() * width);
            let position = self.position.slice(chunk.tokens.start * top_k..chunk.tokens.end * top_k);
            let tokens = chunk.tokens.start * width..chunk.tokens.end * width;
            cuda::gather_backward(gpu, grad_rows, width, position, stream.grad_normed.slice_mut(tokens))?;
            shared.exchanges.put(exchange, None);
        }
        Ok(())
    }

    /// Backward of the gate, its losses included: overwrites `grad_normed` with its part of the gradient.
    fn route_backward(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        weights: &DeviceWeights,
        gradients: &mut DeviceGradients,
        mut grad_normed: SliceMut<'_>,
    ) -> Result<(), StepError> {
        let (config, gpu, tokens) = (pass.config, pass.gpu, pass.tokens());
        let (hidden, experts, top_k) = (config.hidden, config.experts, config.top_k);
        pass.work(WorkKind::Router, Some(self.layer), 2 * product_flops(tokens, experts, hidden))?;
        let router = &config.router;
        let balance = (router.aux_loss != AuxLoss::None).then(|| self.balance_gradient.whole());
        let losses = self.plan.global_tokens().max(1) as f64 * pass.step.micro_batches();
        cuda::router_backward(
            gpu,
            self.probabilities.slice(0..tokens * experts),
            self.expert_index.slice(0..tokens * top_k),
            self.gate_weight.slice(0..tokens * top_k),
            top_k,
            config.renormalise,
            shared.grad_gate_weight.slice(0..tokens * top_k),
            balance,
            (f64::from(router.z_loss_coefficient) / losses) as f32,
            self.logits.slice(0..tokens * experts),
            shared.grad_logits.slice_mut(0..tokens * experts),
        )?;
        let MoeShared { grad_logits, grad_logits_copy, gate_input: with_jitter, .. } = shared;
        let grad_logits = if pass.dtype == DType::F32 {
            grad_logits.slice(0..tokens * experts)
        } else {
            cuda::cast(gpu, grad_logits.slice(0..tokens * experts), grad_logits_copy.slice_mut(0..tokens * experts))?;
            grad_logits_copy.slice(0..tokens * experts)
        };
        let gate = pass.layout.layers[self.layer].feed_forward.gate();
        let input = gate_input(pass, self.layer, self.norm.output(tokens), with_jitter)?;
        let gradient = gradients.dense.device_range_mut(gate.clone());
        pass.weight_gradient(gradient, grad_logits, experts, input, hidden)?;
        let gate = Mat::new(weights.matrix(gate), experts, hidden);
        let grad_input = MatMut::new(grad_normed.reborrow(), tokens, hidden);
        matmul(gpu, grad_input, Mat::new(grad_logits, tokens, experts), gate, Addend::None)?;
        if has_jitter(pass) {
            apply_jitter(pass, self.layer, grad_normed)?;
        }
        Ok(())
    }

    /// Weight gradients of the rank's experts; hands over those that have replicas elsewhere. Every rank takes part
    /// for every such expert, in the order of experts, so that all count the same operations.
    fn weight_gradients(
        &self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        experts: &Experts<'_>,
        gradients: &mut DeviceGradients,
    ) -> Result<(), StepError> {
        pass.work(WorkKind::ExpertWeightGradient, Some(self.layer), shared.shape.flops(self.plan.rows()))?;
        experts.weight_gradients(
            &self.plan.slot_rows,
            self.inputs.whole(),
            shared.grad_outputs.whole(),
            &shared.ffn,
            gradients.experts.device_range_mut(pass.layout.layer_experts(self.layer)),
            pass.accumulate,
        )?;
        for (expert, group) in shared.groups.iter().enumerate() {
            let Some(group) = *group else { continue };
            let block = pass.layout.expert_block(self.layer, expert);
            pass.comm.reduce_gradient(GradientRegion {
                group,
                elements: pass.layout.expert_elements(),
                local: block.map(|block| (&mut gradients.experts, block)),
            })?;
        }
        Ok(())
    }
}
