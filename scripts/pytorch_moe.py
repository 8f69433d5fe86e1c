"""The job of examples/pytorch-job.toml in PyTorch: DDP for the dense parameters, all-to-all for the experts.

One process a rank, started by mpirun (only its rank variables are used; messages go over gloo). All ranks meet at the
file --store, which must not exist yet. Every measured step's time is that of the slowest rank. Rank 0 prints one JSON
object.

    mpirun -np 4 python scripts/pytorch_moe.py --store /tmp/store --data examples/data/synthetic.txt

scripts/compare_pytorch.sh runs it in turn with lina.
"""

import argparse
import json
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

LAYERS, HIDDEN, HEADS, VOCAB = 4, 256, 4, 256
EXPERTS, TOP_K, EXPERT_HIDDEN = 4, 2, 512
SEQUENCES, SEQUENCE_TOKENS = 8, 128  # of a rank
AUX_LOSS_COEFFICIENT = 0.02
LEARNING_RATE, WARMUP_STEPS = 1e-3, 20
BUCKET_MB = 25  # DDP's default


class AllToAllTimes:
    """How long this rank's all-to-alls take, in ms, from call to completion."""

    def __init__(self):
        self.forward, self.backward = [], []

    def clear(self):
        self.forward.clear()
        self.backward.clear()


TIMES = AllToAllTimes()


class AllToAll(torch.autograd.Function):
    """Rows to the ranks that they are for; in backward, their gradients the way back."""

    @staticmethod
    def forward(ctx, rows, send, receive):
        ctx.counts = send, receive
        return exchange(rows, send, receive, TIMES.forward)

    @staticmethod
    def backward(ctx, gradient):
        send, receive = ctx.counts
        return exchange(gradient, receive, send, TIMES.backward), None, None


def exchange(rows, send, receive, times):
    output = rows.new_empty(sum(receive), rows.shape[1])
    start = time.perf_counter()
    dist.all_to_all_single(output, rows.contiguous(), receive, send)
    times.append((time.perf_counter() - start) * 1e3)
    return output


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        half = HIDDEN // HEADS // 2
        angles = torch.outer(torch.arange(SEQUENCE_TOKENS), 10000.0 ** -(torch.arange(half) / half))
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], -1), persistent=False)

    def rotate(self, x):
        return x * self.cos + x.roll(x.shape[-1] // 2, -1) * self.sin

    def forward(self, x):
        qkv = self.qkv(x).view(SEQUENCES, SEQUENCE_TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(self.rotate(query), self.rotate(key), value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(SEQUENCES, SEQUENCE_TOKENS, HIDDEN))


class Expert(nn.Module):
    """The expert of this rank."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Linear(HIDDEN, 2 * EXPERT_HIDDEN, bias=False)
        self.down = nn.Linear(EXPERT_HIDDEN, HIDDEN, bias=False)

    def forward(self, rows):
        gate, up = self.gate_up(rows).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Experts(nn.Module):
    """A dropless MoE layer with an expert on each rank."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.expert = Expert()

    def forward(self, x):
        tokens = x.reshape(-1, HIDDEN)
        probabilities = self.router(tokens).softmax(-1)
        weights, chosen = probabilities.topk(TOP_K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts)
        send, receive = counts.tolist(), received.tolist()
        source = order // TOP_K
        rows = AllToAll.apply(tokens.index_select(0, source), send, receive)
        rows = AllToAll.apply(self.expert(rows), receive, send)
        rows = rows * weights.flatten().index_select(0, order).unsqueeze(-1)
        output = torch.zeros_like(tokens).index_add(0, source, rows)
        shares = counts / counts.sum()
        return output.view_as(x), EXPERTS * (shares * probabilities.mean(0)).sum()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.experts_norm = nn.RMSNorm(HIDDEN, 1e-5), nn.RMSNorm(HIDDEN, 1e-5)
        self.attention, self.experts = Attention(), Experts()

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        output, aux_loss = self.experts(self.experts_norm(x))
        return x + output, aux_loss


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, 1e-5)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, inputs, targets):
        x = self.embedding(inputs)
        aux_losses = 0.0
        for layer in self.layers:
            x, aux_loss = layer(x)
            aux_losses = aux_losses + aux_loss
        loss = F.cross_entropy(self.head(self.norm(x)).view(-1, VOCAB), targets.view(-1))
        return loss, loss + AUX_LOSS_COEFFICIENT * aux_losses


def initialise(model, rank):
    """The same dense weights everywhere, each rank its own expert's."""
    for name, parameter in sorted(model.named_parameters()):
        seed = sum(name.encode()) + (1000 * (rank + 1) if is_expert(name) else 0)
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(seed))


def is_expert(name):
    return ".expert." in name


def batch(data, step, rank, ranks):
    """This rank's sequences of a step, as inputs and targets."""
    first = (step * ranks + rank) * SEQUENCES
    starts = [(first + i) * SEQUENCE_TOKENS % (len(data) - SEQUENCE_TOKENS - 1) for i in range(SEQUENCES)]
    rows = torch.stack([data[start : start + SEQUENCE_TOKENS + 1] for start in starts])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="file at which the ranks meet")
    parser.add_argument("--data", required=True, help="text whose bytes are the tokens")
    parser.add_argument("--warmup-steps", type=int, default=24)
    parser.add_argument("--steps", type=int, default=12, help="measured steps")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    rank, ranks = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE"))
    if ranks != EXPERTS:
        raise SystemExit(f"pytorch_moe: {ranks} ranks, expected one for each of {EXPERTS} experts")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{arguments.store}", rank=rank, world_size=ranks)
    with open(arguments.data, "rb") as file:
        data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()

    model = Decoder()
    initialise(model, rank)
    expert_names = [name for name, _ in model.named_parameters() if is_expert(name)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, expert_names)
    expert_parameters = [parameter for name, parameter in model.named_parameters() if is_expert(name)]
    parallel = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def train(step):
        inputs, targets = batch(data, step, rank, ranks)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
        optimizer.zero_grad()
        loss, total = parallel(inputs, targets)
        total.backward()
        # An expert's gradient is the sum over all ranks' tokens already, of losses that are means over a rank's.
        for parameter in expert_parameters:
            parameter.grad /= ranks
        optimizer.step()
        return loss.item()

    flops = FlopCounterMode(display=False)
    with flops:
        loss_start = train(0)
    for step in range(1, arguments.warmup_steps):
        train(step)
    step_times, forward_times, backward_times = [], [], []
    for step in range(arguments.warmup_steps, arguments.warmup_steps + arguments.steps):
        TIMES.clear()
        start = time.perf_counter()
        loss = train(step)
        step_times.append((time.perf_counter() - start) * 1e3)
        forward_times.append(statistics.median(TIMES.forward))
        backward_times.append(statistics.median(TIMES.backward))

    slowest = torch.tensor(step_times)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    everywhere = torch.tensor([flops.get_total_flops(), sum(p.numel() for p in expert_parameters)], dtype=torch.float64)
    dist.all_reduce(everywhere)
    losses = torch.tensor([loss_start, loss])
    dist.all_reduce(losses)
    dense = sum(parameter.numel() for parameter in model.parameters()) - sum(p.numel() for p in expert_parameters)
    if rank == 0:
        result = {
            "torch": torch.__version__,
            "ranks": ranks,
            "parameters": dense + int(everywhere[1]),
            "step_gflop": everywhere[0].item() / 1e9,
            "loss_start": losses[0].item() / ranks,
            "loss": losses[1].item() / ranks,
            "step_ms": slowest.tolist(),
            "step_ms_median": statistics.median(slowest.tolist()),
            "forward_a2a_ms_median": statistics.median(forward_times),
            "backward_a2a_ms_median": statistics.median(backward_times),
        }
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
