//! Gate, dispatch, experts, combine.

use lina_comm::{Direction, Leg, WorkKind};
use lina_cuda::{self as cuda, Addend, CudaError, Mat, MatMut, Slice, SliceMut, matmul};

use super::{Moe, MoeShared, gate_input, receive};
use crate::batch::StepError;
use crate::config::AuxLoss;
use crate::cuda::experts::Experts;
use crate::cuda::parameters::DeviceWeights;
use crate::cuda::pass::Pass;
use crate::moe::{Steps, exchange_counts};
use crate::pass::product_flops;

impl Moe {
    /// `y = x + experts(norm(x))`, both `[tokens, hidden]`.
    pub fn forward(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        weights: &DeviceWeights,
        x: Slice<'_>,
        y: SliceMut<'_>,
    ) -> Result<(), StepError> {
        self.route(pass, shared, weights, x)?;
        let (rows, gpu) = (self.plan.rows(), pass.gpu);
        if rows > shared.rows_limit {
            return Err(StepError::TooManyRows { layer: self.layer, rows, limit: shared.rows_limit });
        }
        gpu.grow(&mut self.inputs, rows * shared.shape.hidden)?;
        gpu.grow(&mut self.projected, rows * shared.shape.input_width)?;
        gpu.grow(&mut shared.ffn.hidden, rows * shared.shape.inner)?;
        while self.returned.len() < self.plan.chunks.len() {
            self.returned.push(gpu.uninit(0, pass.dtype)?);
        }
        let weights = weights.experts(pass.layout.layer_experts(self.layer));
        let experts = Experts { gpu, shape: shared.shape, weights };
        if pass.comm.ranks() == 1 {
            self.forward_here(pass, shared, &experts, x, y)
        } else {
            self.forward_exchanged(pass, shared, &experts, x, y)
        }
    }

    /// Gate, counts of all ranks, and everything that follows from them.
    fn route(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        weights: &DeviceWeights,
        x: Slice<'_>,
    ) -> Result<(), StepError> {
        let (config, gpu) = (pass.config, pass.gpu);
        let places = &pass.layout.layers[self.layer].feed_forward;
        let (tokens, hidden, experts, top_k) = (pass.tokens(), config.hidden, config.experts, config.top_k);
        pass.work(WorkKind::Router, Some(self.layer), product_flops(tokens, experts, hidden))?;
        self.norm.forward(pass, &places.norm, weights, x)?;
        let gate = Mat::new(weights.matrix(places.gate()), experts, hidden);
        let input = gate_input(pass, self.layer, self.norm.output(tokens), &mut shared.gate_input)?;
        let logits = MatMut::new(self.logits.slice_mut(0..tokens * experts), tokens, experts);
        matmul(gpu, logits, Mat::new(input, tokens, hidden), gate.t(), Addend::None)?;
        cuda::router_forward(
            gpu,
            self.logits.slice(0..tokens * experts),
            top_k,
            config.renormalise,
            self.probabilities.slice_mut(0..tokens * experts),
            self.expert_index.slice_mut(0..tokens * top_k),
            self.gate_weight.slice_mut(0..tokens * top_k),
        )?;

        let chunks = if pass.comm.ranks() == 1 { 1 } else { pass.comm.moe_shape().chunks };
        self.count(pass, shared, chunks)?;
        if pass.comm.ranks() > 1 {
            exchange_counts(pass.comm, &mut shared.host_exchanges, &shared.routes, &mut self.plan, self.layer)?;
            pass.work(WorkKind::Permute, Some(self.layer), 0)?;
        }
        let capacity_factor = config.router.capacity_factor.filter(|_| pass.step.training);
        self.plan.place_counts(&shared.routes, capacity_factor);
        self.place_tokens(pass, shared, chunks)?;
        self.measure_losses(pass, shared)?;
        Ok(())
    }

    /// Counts this rank's assignments on the device, and waits for them.
    fn count(&mut self, pass: &Pass<'_>, shared: &mut MoeShared, chunks: usize) -> Result<(), CudaError> {
        let (config, gpu, tokens) = (pass.config, pass.gpu, pass.tokens());
        let len = (chunks + 1) * config.experts;
        gpu.grow(&mut shared.counts, len)?;
        let ranges: Vec<_> = (0..chunks).map(|chunk| lina_plan::chunk_range(tokens, chunks, chunk)).collect();
        let index = self.expert_index.slice(0..tokens * config.top_k);
        cuda::count_assignments(gpu, index, config.top_k, &ranges, config.experts, shared.counts.slice_mut(0..len))?;
        shared.counts_on_host.resize(len, 0);
        gpu.download(shared.counts.slice(0..len), &mut shared.counts_on_host)?;
        self.plan.take_counts(&shared.routes, tokens, chunks, &shared.counts_on_host);
        Ok(())
    }

    /// Gives every assignment its row, on the device.
    fn place_tokens(&mut self, pass: &Pass<'_>, shared: &mut MoeShared, chunks: usize) -> Result<(), CudaError> {
        let (config, gpu, tokens) = (pass.config, pass.gpu, pass.tokens());
        let bounds = chunks * config.experts;
        shared.bounds_on_host.clear();
        shared.bounds_on_host.extend_from_slice(&self.plan.row_starts);
        shared.bounds_on_host.extend_from_slice(&self.plan.row_ends);
        gpu.grow(&mut shared.row_bounds, 2 * bounds)?;
        gpu.upload(&shared.bounds_on_host, shared.row_bounds.slice_mut(0..2 * bounds))?;
        let ranges: Vec<_> = self.plan.chunks.iter().map(|chunk| chunk.tokens.clone()).collect();
        let starts: Vec<u32> = self.plan.chunks.iter().map(|chunk| chunk.sent.start as u32).collect();
        let sent = self.plan.chunks.last().map_or(0, |chunk| chunk.sent.end);
        cuda::place_rows(
            gpu,
            self.expert_index.slice(0..tokens * config.top_k),
            config.top_k,
            &ranges,
            config.experts,
            shared.row_bounds.slice(0..bounds),
            shared.row_bounds.slice(bounds..2 * bounds),
            &starts,
            self.position.slice_mut(0..tokens * config.top_k),
            self.token_of_row.slice_mut(0..sent),
        )
    }

    /// The load-balancing loss's gradient, and on the device the sums that the losses are computed from.
    fn measure_losses(&mut self, pass: &Pass<'_>, shared: &mut MoeShared) -> Result<(), CudaError> {
        let (config, gpu, tokens) = (pass.config, pass.gpu, pass.tokens());
        let (experts, router) = (config.experts, &config.router);
        let mut sums = shared.sums.slice_mut(self.number * (experts + 1)..(self.number + 1) * (experts + 1));
        let (probability_sums, z_sum) = sums.split_at_mut(experts);
        self.balance_slopes.clear();
        if router.aux_loss != AuxLoss::None {
            cuda::column_sums(gpu, self.probabilities.slice(0..tokens * experts), probability_sums)?;
            let coefficient = f64::from(router.aux_loss_coefficient) / pass.step.micro_batches();
            let slopes = (0..experts).map(|expert| self.plan.balance_slope(&shared.routes, router.aux_loss, expert));
            self.balance_slopes.extend(slopes);
            let gradient: Vec<f32> = self.balance_slopes.iter().map(|slope| (coefficient * slope) as f32).collect();
            gpu.upload(&gradient, self.balance_gradient.whole_mut())?;
        }
        if router.z_loss_coefficient > 0.0 {
            cuda::z_loss(gpu, self.logits.slice(0..tokens * experts), shared.z.slice_mut(0..tokens))?;
            cuda::sum_into(gpu, shared.z.slice(0..tokens), z_sum)?;
        }
        Ok(())
    }

    fn forward_here(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        experts: &Experts<'_>,
        x: Slice<'_>,
        y: SliceMut<'_>,
    ) -> Result<(), StepError> {
        let (gpu, width, choices) = (pass.gpu, pass.config.hidden, pass.tokens() * pass.config.top_k);
        let rows = self.plan.rows();
        let chunk = &self.plan.chunks[0];
        gpu.grow(&mut self.returned[0], rows * width)?;

        pass.work(WorkKind::Permute, Some(self.layer), 0)?;
        let inputs = self.inputs.slice_mut(0..rows * width);
        cuda::gather_rows(gpu, self.norm.output(pass.tokens()), width, self.token_of_row.slice(0..rows), inputs)?;
        pass.work(WorkKind::ExpertFfn, Some(self.layer), experts.shape.flops(chunk.received()))?;
        experts.forward(
            chunk,
            self.inputs.whole(),
            self.projected.whole_mut(),
            shared.ffn.hidden.whole_mut(),
            self.returned[0].whole_mut(),
        )?;
        pass.work(WorkKind::Permute, Some(self.layer), 0)?;
        cuda::combine_rows(
            gpu,
            self.returned[0].slice(0..rows * width),
            width,
            self.position.slice(0..choices),
            self.gate_weight.slice(0..choices),
            x,
            y,
        )?;
        Ok(())
    }

    fn forward_exchanged(
        &mut self,
        pass: &mut Pass<'_>,
        shared: &mut MoeShared,
        experts: &Experts<'_>,
        x: Slice<'_>,
        mut y: SliceMut<'_>,
    ) -> Result<(), StepError> {
        let gpu = pass.gpu;
        let (width, top_k, tokens) = (pass.config.hidden, pass.config.top_k, pass.tokens());
        let steps = Steps { direction: Direction::Forward, layer: self.layer, chunks: self.plan.chunks.len() };

        let mut dispatches = Vec::with_capacity(steps.chunks);
        for (number, chunk) in self.plan.chunks.iter().enumerate() {
            pass.work(WorkKind::Permute, Some(self.layer), 0)?;
            let kind = steps.kind(Leg::Dispatch, number);
            let mut exchange = shared.exchanges.take(gpu, kind, width, &chunk.send_rows, &chunk.recv_rows, None)?;
            let index = self.token_of_row.slice(chunk.sent.clone());
            let send = exchange.send.slice_mut(0..index.len() * width);
            cuda::gather_rows(gpu, self.norm.output(tokens), width, index, send)?;
            dispatches.push(pass.comm.all_to_all_on_device(exchange)?);
        }

        let mut combines = Vec::with_capacity(steps.chunks);
        for (number, ticket) in dispatches.into_iter().enumerate() {
            let chunk = &self.plan.chunks[number];
            receive(pass, shared, ticket, self.layer, &chunk.blocks, self.inputs.whole_mut())?;
            pass.work(WorkKind::ExpertFfn, Some(self.layer), experts.shape.flops(chunk.received()))?;
            let kind = steps.kind(Leg::Combine, number);
            let saved = Some(&mut self.returned[number]);
            let mut exchange = shared.exchanges.take(gpu, kind, width, &chunk.recv_rows, &chunk.send_rows, saved)?;
            experts.forward(
                chunk,
                self.inputs.whole(),
                self.projected.whole_mut(),
                shared.ffn.hidden.whole_mut(),
                exchange.send.whole_mut(),
            )?;
            combines.push(pass.comm.all_to_all_on_device(exchange)?);
        }

        for (number, ticket) in combines.into_iter().enumerate() {
            let exchange = pass.comm.wait_on_device(ticket)?;
            shared.exchanges.put(exchange, Some(&mut self.returned[number]));
            pass.work(WorkKind::Permute, Some(self.layer), 0)?;
            let chunk = &self.plan.chunks[number];
            let choices = chunk.tokens.start * top_k..chunk.tokens.end * top_k;
            let elements = chunk.tokens.start * width..chunk.tokens.end * width;
            cuda::combine_rows(
                gpu,
                self.returned[number].slice(0..chunk.sent.len() * width),
                width,
                self.position.slice(choices.clone()),
                self.gate_weight.slice(choices),
                x.slice(elements.clone()),
                y.slice_mut(elements),
            )?;
        }
        Ok(())
    }
}
