"""How fast one MoE layer is in plain PyTorch, forward and backward: what lina's layer on a GPU is compared with.

A dropless layer in bfloat16: router, softmax, top-k with renormalised weights, rows sorted by expert, SwiGLU experts as
two grouped matrix products, a weighted sum of each token's rows. Gradients of all weights and of the input.
Element-wise work can be arranged in several ways, and which one is fastest depends on the sizes: all are measured
shortly, then the fastest one of forward and of forward with backward, which are reported. Times are medians by CUDA
events. Rates count the experts' matrix products only, 6 * tokens * top_k * hidden * expert_hidden operations forward
and three times as many with backward.

    python3 scripts/pytorch_moe_layer.py
    python3 scripts/pytorch_moe_layer.py --shape 2048,1024,64,8,16384 --compile --json
    python3 scripts/pytorch_moe_layer.py --check --device cpu

--compile measures every arrangement once more with its element-wise parts through torch.compile, reported apart.
--check compares output and gradients of every arrangement with float32 products, one expert after another.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

SHAPES = ["4096,14336,8,2,8192", "2048,1024,64,8,16384", "2048,768,128,8,16384", "768,3072,16,2,16384"]
CHECKED_SHAPE = "128,64,8,3,97"
TOLERANCE = 0.02

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


@dataclasses.dataclass(frozen=True)
class Shape:
    hidden: int
    expert_hidden: int
    experts: int
    top_k: int
    tokens: int

    @classmethod
    def parse(cls, text):
        return cls(*map(int, text.split(",")))

    def forward_flops(self):
        return 6 * self.tokens * self.top_k * self.hidden * self.expert_hidden


class Arrangement(NamedTuple):
    """A way to compute the layer; all have the same result but for rounding."""

    # Experts' matrices as [out, in], or as [in, out].
    weights: str
    # Rows are multiplied by their routing weight when they are summed, or before the second product.
    scaling: str
    # A token's rows are gathered and summed in two kernels, or in one by embedding_bag.
    summing: str
    # Rows are gathered by index_select or by indexing, which are kernels of their own.
    gathering: str
    compiled: bool

    @classmethod
    def all(cls, compiled):
        choices = itertools.product(["out-in", "in-out"], ["sum", "inner"], ["gather", "bag"], ["select", "index"])
        return [cls(*choice, compiled) for choice in choices]

    def name(self):
        return f"{self.weights} weights, scaled at {self.scaling}, summed by {self.summing}, {self.gathering}"


# Element-wise parts, each written so that torch.compile can make one kernel of it.


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_backward(gradient, gate_up):
    gate, up = gate_up.chunk(2, -1)
    sigmoid = torch.sigmoid(gate.float())
    silu = gate * sigmoid
    gate_gradient = gradient * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat([gate_gradient, gradient * silu], -1).to(gate_up.dtype)


def swiglu_backward_eager(gradient, gate_up):
    """As swiglu_backward, with the fewest passes over memory that kernels of their own allow."""
    gate, up = gate_up.chunk(2, -1)
    result = torch.empty_like(gate_up)
    gate_gradient, up_gradient = result.chunk(2, -1)
    torch.mul(gradient, F.silu(gate), out=up_gradient)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_gradient)
    return result


def scale(rows, weights):
    return rows * weights.unsqueeze(-1)


def scale_backward(gradient, rows, weights):
    return gradient * weights.unsqueeze(-1), (gradient * rows).sum(-1, dtype=torch.float32)


def select(rows, index):
    return rows.index_select(0, index)


def index(rows, index):
    return rows[index]


def gather_sum(gather, rows, position, weights):
    """Sum over each token's rows: rows [n, hidden], position and weights [tokens, top_k], weights may be None."""
    gathered = gather(rows, position.flatten()).view(*position.shape, -1)
    if weights is not None:
        gathered = gathered * weights.unsqueeze(-1)
    return gathered.sum(1)


def bag_sum(_gather, rows, position, weights):
    # What needs no gradient takes a path that keeps nothing for one.
    weights = None if weights is None else weights.detach()
    return F.embedding_bag(position, rows.detach(), mode="sum", per_sample_weights=weights)


def gather_scaled_backward(gather, gradient, rows, source, weights):
    """Backward of the weighted sum: gradients of rows and of weights in the rows' order."""
    return scale_backward(gather(gradient, source), rows, weights)


class Parts(NamedTuple):
    """The parts of an arrangement that are no matrix products."""

    gather: Callable
    swiglu: Callable
    swiglu_backward: Callable
    scale: Callable
    scale_backward: Callable
    sum: Callable
    gather_scaled_backward: Callable

    @classmethod
    def of(cls, arrangement):
        gather = {"select": select, "index": index}[arrangement.gathering]
        summing = {"gather": gather_sum, "bag": bag_sum}[arrangement.summing]
        backward = swiglu_backward if arrangement.compiled else swiglu_backward_eager
        parts = [swiglu, backward, scale, scale_backward, summing, gather_scaled_backward]
        if arrangement.compiled:
            # embedding_bag and a gather alone are kernels of their own either way.
            parts = [part if part is bag_sum else torch.compile(part, dynamic=False) for part in parts]
        *parts, summing, scaled_backward = parts
        return cls(gather, *parts, functools.partial(summing, gather), functools.partial(scaled_backward, gather))


class Permute(torch.autograd.Function):
    """Tokens' rows in the order of experts. Backward gathers and sums, which is faster than adding rows atomically."""

    @staticmethod
    def forward(ctx, x, source, position, parts):
        ctx.position, ctx.parts = position, parts
        return parts.gather(x, source)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.parts.sum(gradient.contiguous(), ctx.position, None), None, None, None


class SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, parts):
        ctx.save_for_backward(gate_up)
        ctx.parts = parts
        return parts.swiglu(gate_up)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.parts.swiglu_backward(gradient, *ctx.saved_tensors), None


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, parts):
        ctx.save_for_backward(rows, weights)
        ctx.parts = parts
        return parts.scale(rows, weights)

    @staticmethod
    def backward(ctx, gradient):
        rows, weights = ctx.saved_tensors
        row_gradient, weight_gradient = ctx.parts.scale_backward(gradient, rows, weights)
        return row_gradient, weight_gradient.to(weights.dtype), None


class Combine(torch.autograd.Function):
    """Sums of tokens' rows; with weights [tokens, top_k], weighted ones."""

    @staticmethod
    def forward(ctx, rows, weights, sorted_weights, source, position, parts):
        if weights is not None:
            ctx.save_for_backward(rows, sorted_weights)
        ctx.weighted, ctx.source, ctx.position, ctx.parts = weights is not None, source, position, parts
        return parts.sum(rows, position, weights)

    @staticmethod
    def backward(ctx, gradient):
        if not ctx.weighted:
            return ctx.parts.gather(gradient, ctx.source), None, None, None, None, None
        rows, sorted_weights = ctx.saved_tensors
        row_gradient, by_row = ctx.parts.gather_scaled_backward(gradient, rows, ctx.source, sorted_weights)
        weight_gradient = by_row.index_select(0, ctx.position.flatten()).view_as(ctx.position)
        return row_gradient, weight_gradient.to(sorted_weights.dtype), None, None, None, None


class SortedBy(NamedTuple):
    """Assignments in the order of experts."""

    sorted_experts: torch.Tensor
    order: torch.Tensor


def sort_assignments(experts, key_type, stable):
    """Narrow keys are sorted in fewer passes."""
    return SortedBy(*torch.sort(experts.flatten().to(key_type), stable=stable))


class Layer:
    """One MoE layer with random weights: `forward` is differentiable in `parameters`."""

    def __init__(self, shape, arrangement, device, sort=(torch.int16, True)):
        self.shape, self.arrangement, self.sort = shape, arrangement, sort
        self.parts = Parts.of(arrangement)
        generator = torch.Generator(device).manual_seed(1)

        def normal(*sizes, fan_in):
            values = torch.empty(*sizes, device=device, dtype=torch.bfloat16)
            return values.normal_(std=fan_in**-0.5, generator=generator)

        hidden, inner, experts = shape.hidden, shape.expert_hidden, shape.experts
        self.router = normal(experts, hidden, fan_in=hidden)
        # Drawn as [out, in] in either arrangement, so that all layers of a shape are the same.
        self.gate_up = normal(experts, 2 * inner, hidden, fan_in=hidden)
        self.down = normal(experts, hidden, inner, fan_in=inner)
        if arrangement.weights == "in-out":
            self.gate_up = self.gate_up.transpose(1, 2).contiguous()
            self.down = self.down.transpose(1, 2).contiguous()
        for parameter in self.parameters():
            parameter.requires_grad_()

    def parameters(self):
        return [self.router, self.gate_up, self.down]

    def in_out(self, weights):
        return weights.transpose(1, 2) if self.arrangement.weights == "out-in" else weights

    def forward(self, x):
        top_k = self.shape.top_k
        probabilities = F.linear(x, self.router).softmax(-1, dtype=torch.float32)
        weights, experts = probabilities.topk(top_k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        with torch.no_grad():
            sorted_experts, order = sort_assignments(experts, *self.sort)
            every_expert = torch.arange(self.shape.experts, device=x.device, dtype=sorted_experts.dtype)
            ends = torch.searchsorted(sorted_experts, every_expert, right=True, out_int32=True)
            source = order // top_k
            position = torch.empty_like(order)
            position[order] = torch.arange(order.numel(), device=x.device)
            position = position.view(-1, top_k)
        rows = Permute.apply(x, source, position, self.parts)
        inner = SwiGlu.apply(grouped_mm(rows, self.in_out(self.gate_up), offs=ends), self.parts)
        sum_weights, sorted_weights = None, None
        if self.arrangement.scaling == "inner":
            inner = Scale.apply(inner, weights.flatten().index_select(0, order), self.parts)
        else:
            sum_weights, sorted_weights = weights, weights.detach().flatten().index_select(0, order)
        rows = grouped_mm(inner, self.in_out(self.down), offs=ends)
        return Combine.apply(rows, sum_weights, sorted_weights, source, position, self.parts)


def random_input(shape, device):
    generator = torch.Generator(device).manual_seed(2)
    sizes = {"size": (shape.tokens, shape.hidden), "device": device, "dtype": torch.bfloat16}
    x, gradient = (torch.empty(**sizes).normal_(generator=generator) for _ in range(2))
    return x.requires_grad_(), gradient


def median_ms(run, warmups, repetitions):
    """Median time of `run` on the GPU, where nothing waits between the repetitions."""
    for _ in range(warmups):
        run()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repetitions)] for _ in range(2))
    torch.cuda.synchronize()
    for start, end in zip(starts, ends):
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends))


def fastest_sort(shape, options):
    """The keys of the fastest sort of random assignments, and the times of all."""
    experts = torch.randint(shape.experts, (shape.tokens, shape.top_k), device="cuda")
    times = {}
    # bytes hold any expert of up to 256.
    types = [torch.int64, torch.int32, torch.int16] + [torch.uint8] * (shape.experts <= 256)
    for sort in itertools.product(types, [False, True]):
        run = functools.partial(sort_assignments, experts, *sort)
        times[sort] = median_ms(run, options.warmups, options.repetitions)
    names = {f"{str(kind).removeprefix('torch.')}{' stable' * stable}": time for (kind, stable), time in times.items()}
    return min(times, key=times.get), names


def measure(shape, arrangement, sort, warmups, repetitions):
    """Medians of forward and of forward with backward, in ms."""
    layer = Layer(shape, arrangement, "cuda", sort)
    x, gradient = random_input(shape, "cuda")
    leaves = [x, *layer.parameters()]

    def forward():
        layer.forward(x)

    def forward_backward():
        for leaf in leaves:
            leaf.grad = None
        layer.forward(x).backward(gradient)

    return tuple(median_ms(run, warmups, repetitions) for run in (forward, forward_backward))


def measure_shape(shape, options):
    """A result for the fastest arrangement, and with --compile one more for the fastest compiled one."""
    sort, sorts = fastest_sort(shape, options)
    results = []
    for compiled in [False, True] if options.compile else [False]:
        # Forgets other shapes' code, of which only so much is kept.
        torch.compiler.reset()
        ways = [way for way in Arrangement.all(compiled) if way.name() in (options.arrangement or [way.name()])]
        short = {way: measure(shape, way, sort, 2, 5) for way in ways}
        forward_best, best = (min(short, key=lambda way: short[way][direction]) for direction in range(2))
        times = {way: measure(shape, way, sort, options.warmups, options.repetitions) for way in {forward_best, best}}
        forward_ms, forward_backward_ms = times[forward_best][0], times[best][1]
        results.append(
            {
                **dataclasses.asdict(shape),
                "compiled": compiled,
                "forward_ms": forward_ms,
                "forward_tflops": shape.forward_flops() / forward_ms / 1e9,
                "forward_backward_ms": forward_backward_ms,
                "forward_backward_tflops": 3 * shape.forward_flops() / forward_backward_ms / 1e9,
                "forward_arrangement": forward_best.name(),
                "arrangement": best.name(),
                "arrangements_ms": {way.name(): ms for way, (_, ms) in short.items()},
                "sorts_ms": sorts,
            }
        )
    return results


def plain(layer, x):
    """The layer in float32, one expert after another; differentiable in `x` and in the weights that it returns."""
    router, gate_up, down = (weights.detach().float().requires_grad_() for weights in layer.parameters())
    # The choice of experts is discrete: it has to be made with the same logits.
    logits = F.linear(x, layer.router.detach()).float()
    chosen = logits.softmax(-1).topk(layer.shape.top_k, -1).indices
    x = x.detach().float().requires_grad_()
    weights = F.linear(x, router).softmax(-1).gather(-1, chosen)
    weights = weights / weights.sum(-1, keepdim=True)
    output = torch.zeros_like(x)
    for expert in range(layer.shape.experts):
        tokens, slots = torch.where(chosen == expert)
        gate, up = (x[tokens] @ layer.in_out(gate_up)[expert]).chunk(2, -1)
        rows = (F.silu(gate) * up) @ layer.in_out(down)[expert]
        output = output.index_add(0, tokens, rows * weights[tokens, slots].unsqueeze(-1))
    return output, [x, router, gate_up, down]


def check(options):
    """Largest relative error of output and gradients, over all arrangements."""
    shape = Shape.parse(CHECKED_SHAPE)
    worst = 0.0
    for arrangement in Arrangement.all(False) + Arrangement.all(True) * options.compile:
        layer = Layer(shape, arrangement, options.device)
        x, gradient = random_input(shape, options.device)
        output = layer.forward(x)
        output.backward(gradient)
        expected, leaves = plain(layer, x)
        expected.backward(gradient.float())
        found = [output, x.grad, *(parameter.grad for parameter in layer.parameters())]
        for name, tensor, reference in zip(
            ["output", "x", "router", "gate_up", "down"], found, [expected, *(leaf.grad for leaf in leaves)]
        ):
            error = ((tensor.float() - reference).norm() / reference.norm()).item()
            worst = max(worst, error)
            if not error < TOLERANCE:
                raise SystemExit(f"pytorch_moe_layer: {arrangement}: {name} is off by {error:.1e}")
    print(f"output and gradients within {worst:.1e}")


def print_table(results):
    print(f"{'hidden':>6} {'inner':>6} {'experts':>7} {'top_k':>5} {'tokens':>6} {'compiled':>8}", end="")
    print(f" {'fwd ms':>8} {'TFLOP/s':>8} {'fwd+bwd ms':>10} {'TFLOP/s':>8}  arrangement")
    for r in results:
        print(f"{r['hidden']:6} {r['expert_hidden']:6} {r['experts']:7} {r['top_k']:5} {r['tokens']:6}", end="")
        print(f" {'yes' if r['compiled'] else 'no':>8} {r['forward_ms']:8.3f} {r['forward_tflops']:8.1f}", end="")
        print(f" {r['forward_backward_ms']:10.3f} {r['forward_backward_tflops']:8.1f}  {r['arrangement']}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        action="append",
        type=Shape.parse,
        metavar="HIDDEN,EXPERT_HIDDEN,EXPERTS,TOP_K,TOKENS",
        help="may be repeated [default: four shapes of known models]",
    )
    parser.add_argument("--warmups", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument(
        "--arrangement",
        nargs="+",
        choices=[way.name() for way in Arrangement.all(False)],
        metavar="NAME",
        help="tries only these, by the names that it prints [default: all]",
    )
    parser.add_argument("--compile", action="store_true", help="measures with torch.compile besides")
    parser.add_argument("--check", action="store_true", help="checks results instead of measuring")
    parser.add_argument("--device", default="cuda", help="of --check")
    parser.add_argument("--json", action="store_true", help="prints one JSON object")
    return parser.parse_args()


def main():
    options = parse_arguments()
    if options.check:
        return check(options)
    if not torch.cuda.is_available():
        raise SystemExit("pytorch_moe_layer: no GPU, expected one that PyTorch can use")
    shapes = options.shape or [Shape.parse(shape) for shape in SHAPES]
    results = [result for shape in shapes for result in measure_shape(shape, options)]
    if options.json:
        device = torch.cuda.get_device_name()
        print(json.dumps({"torch": torch.__version__, "device": device, "dtype": "bfloat16", "layers": results}))
    else:
        print_table(results)


if __name__ == "__main__":
    main()
