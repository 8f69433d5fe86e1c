//! Gate, dispatch, experts, combine.

use lina_comm::{CommError, Direction, Leg, WorkKind};
use lina_kernels::{self as kernels, Mat, MatMut};

use super::{Moe, MoeShared, RouterLosses, Steps, exchange_counts, gate_input, receive};
use crate::batch::StepError;
use crate::config::AuxLoss;
use crate::experts::Experts;
use crate::params::Parameters;
use crate::pass::{Pass, grow, product_flops};
use crate::routing::Routes;

impl Moe {
    /// `y = x + experts(norm(x))`, both `[tokens, hidden]`.
    pub fn forward(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        parameters: &Parameters,
        x: &[f32],
        y: &mut [f32],
    ) -> Result<(), StepError> {
        self.route(pass, shared, &parameters.dense, x)?;
        let rows = self.plan.rows();
        if rows > shared.rows_limit {
            return Err(StepError::TooManyRows { layer: self.layer, rows, limit: shared.rows_limit });
        }
        grow(&mut self.inputs, rows * shared.shape.hidden);
        grow(&mut self.projected, rows * shared.shape.input_width);
        grow(&mut shared.ffn.hidden, rows * shared.shape.inner);
        self.returned.resize_with(self.plan.chunks.len(), Vec::new);
        y.copy_from_slice(x);
        let weights = &parameters.experts[pass.layout.layer_experts(self.layer)];
        let experts = Experts { compute: pass.compute, shape: shared.shape, weights };
        if pass.comm.ranks() == 1 {
            self.forward_here(pass, shared, &experts, y)?;
        } else {
            self.forward_exchanged(pass, shared, &experts, y)?;
        }
        Ok(())
    }

    /// Gate, counts of all ranks, and everything that follows from them.
    fn route(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        dense: &[f32],
        x: &[f32],
    ) -> Result<(), CommError> {
        let (config, places) = (pass.config, &pass.layout.layers[self.layer].feed_forward);
        let (tokens, hidden, experts, top_k) = (pass.tokens(), config.hidden, config.experts, config.top_k);
        pass.work(WorkKind::Router, Some(self.layer), product_flops(tokens, experts, hidden))?;
        self.norm.forward(pass, &places.norm, dense, x);
        let gate = Mat::new(&dense[places.gate().clone()], experts, hidden);
        let gate_input = gate_input(pass, self.layer, self.norm.output(tokens), &mut shared.gate_input);
        let gate_input = Mat::new(gate_input, tokens, hidden);
        let logits = &mut self.logits[..tokens * experts];
        kernels::matmul(pass.compute, MatMut::new(logits, tokens, experts), gate_input, gate.t(), false);
        let probabilities = &mut self.probabilities[..tokens * experts];
        let index = &mut self.expert_index[..tokens * top_k];
        let gate_weight = &mut self.gate_weight[..tokens * top_k];
        kernels::router_forward(pass.compute, logits, top_k, config.renormalise, probabilities, index, gate_weight);

        let chunks = if pass.comm.ranks() == 1 { 1 } else { pass.comm.moe_shape().chunks };
        self.plan.count(&shared.routes, index, chunks);
        if pass.comm.ranks() > 1 {
            exchange_counts(pass.comm, &mut shared.exchanges, &shared.routes, &mut self.plan, self.layer)?;
            pass.work(WorkKind::Permute, Some(self.layer), 0)?;
        }
        let index = &self.expert_index[..tokens * top_k];
        let capacity_factor = config.router.capacity_factor.filter(|_| pass.step.training);
        self.plan.place(&shared.routes, index, capacity_factor);
        self.measure_losses(pass, &shared.routes);
        Ok(())
    }

    /// This rank's share of the router losses, and the load-balancing loss's gradient.
    fn measure_losses(&mut self, pass: &Pass<'_>, routes: &Routes) {
        let config = pass.config;
        let (experts, top_k) = (config.experts, config.top_k);
        let assignments = pass.tokens() * top_k;
        let global_tokens = self.plan.global_tokens().max(1) as f64;
        self.losses = RouterLosses::default();
        self.balance_gradient.fill(0.0);
        if config.router.aux_loss != AuxLoss::None {
            let probabilities = &self.probabilities[..pass.tokens() * experts];
            self.probability_sums.fill(0.0);
            kernels::bias_grad(pass.compute, probabilities, &mut self.probability_sums);
            let coefficient = f64::from(config.router.aux_loss_coefficient) / pass.step.micro_batches();
            for (expert, gradient) in self.balance_gradient.iter_mut().enumerate() {
                let slope = self.plan.balance_slope(routes, config.router.aux_loss, expert);
                self.losses.balance += slope * f64::from(self.probability_sums[expert]);
                *gradient = (coefficient * slope) as f32;
            }
        }
        if config.router.z_loss_coefficient > 0.0 {
            let rows = self.logits.chunks_exact(experts).zip(self.probabilities.chunks_exact(experts));
            let choices = self.expert_index[..assignments].chunks_exact(top_k);
            self.losses.z = rows
                .zip(choices)
                .map(|((logits, probabilities), chosen)| {
                    // The likeliest expert's logit and probability give the log-sum-exp without another pass.
                    let likeliest = chosen[0] as usize;
                    let log_sum_exp = f64::from(logits[likeliest]) - f64::from(probabilities[likeliest]).ln();
                    log_sum_exp * log_sum_exp
                })
                .sum::<f64>()
                / global_tokens;
        }
    }

    fn forward_here(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        experts: &Experts<'_>,
        y: &mut [f32],
    ) -> Result<(), CommError> {
        let width = pass.config.hidden;
        let elements = self.plan.rows() * width;
        let chunk = &self.plan.chunks[0];
        let returned = &mut self.returned[0];
        grow(returned, elements);

        pass.work(WorkKind::Permute, Some(self.layer), 0)?;
        let normed = self.norm.output(pass.tokens());
        let inputs = &mut self.inputs[..elements];
        kernels::gather_rows(pass.compute, normed, width, &self.plan.token_of_row, inputs);
        shared.waiting.before_use(pass.comm, self.layer)?;
        pass.work(WorkKind::ExpertFfn, Some(self.layer), experts.shape.flops(chunk.received()))?;
        experts.forward(chunk, inputs, &mut self.projected, &mut shared.ffn.hidden, returned);
        shared.waiting.after_use(pass.comm, pass.layout, self.layer, Direction::Forward);
        pass.work(WorkKind::Permute, Some(self.layer), 0)?;
        let gate_weight = &self.gate_weight[..self.plan.position.len()];
        kernels::combine_rows(pass.compute, &returned[..elements], width, &self.plan.position, gate_weight, y);
        Ok(())
    }

    fn forward_exchanged(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        experts: &Experts<'_>,
        y: &mut [f32],
    ) -> Result<(), CommError> {
        let (width, top_k, tokens) = (pass.config.hidden, pass.config.top_k, pass.tokens());
        let MoeShared { exchanges, ffn, waiting, .. } = shared;
        let steps = Steps { direction: Direction::Forward, layer: self.layer, chunks: self.plan.chunks.len() };

        let mut dispatches = Vec::with_capacity(steps.chunks);
        for (number, chunk) in self.plan.chunks.iter().enumerate() {
            pass.work(WorkKind::Permute, Some(self.layer), 0)?;
            let kind = steps.kind(Leg::Dispatch, number);
            let mut exchange = exchanges.take(kind, width, &chunk.send_rows, &chunk.recv_rows, None);
            let index = &self.plan.token_of_row[chunk.sent.clone()];
            let send = &mut exchange.send[..index.len() * width];
            kernels::gather_rows(pass.compute, self.norm.output(tokens), width, index, send);
            dispatches.push(pass.comm.all_to_all(exchange)?);
        }

        let mut combines = Vec::with_capacity(steps.chunks);
        for (number, ticket) in dispatches.into_iter().enumerate() {
            let chunk = &self.plan.chunks[number];
            receive(pass, exchanges, ticket, self.layer, chunk, &mut self.inputs)?;
            waiting.before_use(pass.comm, self.layer)?;
            pass.work(WorkKind::ExpertFfn, Some(self.layer), experts.shape.flops(chunk.received()))?;
            let kind = steps.kind(Leg::Combine, number);
            let returned = &mut self.returned[number];
            let mut exchange = exchanges.take(kind, width, &chunk.recv_rows, &chunk.send_rows, Some(returned));
            experts.forward(chunk, &self.inputs, &mut self.projected, &mut ffn.hidden, &mut exchange.send);
            combines.push(pass.comm.all_to_all(exchange)?);
        }
        waiting.after_use(pass.comm, pass.layout, self.layer, steps.direction);

        for (number, ticket) in combines.into_iter().enumerate() {
            let exchange = pass.comm.wait(ticket)?;
            exchanges.put(exchange, Some(&mut self.returned[number]));
            pass.work(WorkKind::Permute, Some(self.layer), 0)?;
            let chunk = &self.plan.chunks[number];
            let choices = chunk.tokens.start * top_k..chunk.tokens.end * top_k;
            kernels::combine_rows(
                pass.compute,
                &self.returned[number][..chunk.sent.len() * width],
                width,
                &self.plan.position[choices.clone()],
                &self.gate_weight[choices],
                &mut y[chunk.tokens.start * width..chunk.tokens.end * width],
            );
        }
        Ok(())
    }
}
