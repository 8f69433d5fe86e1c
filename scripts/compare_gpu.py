"""Compares lina on a GPU with PyTorch, in turns of one run on the same GPU.

A turn is a process of its own: `lina bench layer` and scripts/pytorch_moe_layer.py for MoE layers, `lina bench compute`
and scripts/transformers_step.py for a training step. Each round runs both, and every second round in the other order.
What counts is the median over the rounds of each turn's median; a ratio above 1 says that lina is faster. Of PyTorch
the fastest way counts: the first round looks for it, the others try what was fastest for any layer, or in the step.

    cargo build --release --features lina/cuda
    python3 scripts/compare_gpu.py
    python3 scripts/compare_gpu.py --lina target/release/lina --layers --shape 2048,1024,64,8,16384 --rounds 5
    python3 scripts/compare_gpu.py --step examples/gpu-step.toml --json

Needs torch, for the step transformers, and CUDA's libraries on LD_LIBRARY_PATH for lina.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
STEP = "examples/gpu-step.toml"
SHAPE = ["hidden", "expert_hidden", "experts", "top_k", "tokens"]
# A pass, and its keys in what lina and PyTorch print.
PASSES = {"forward": ("forward", "forward"), "forward+backward": ("step", "forward_backward")}
# Measured steps of each turn.
STEPS = 20


def printed_by(command):
    """The JSON object that a command prints."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise SystemExit(f"compare_gpu: cannot run {command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise SystemExit(f"compare_gpu: exit code {done.returncode} of: {' '.join(command)}")
    return json.loads(done.stdout)


def rounds_of(name, lina, pytorch, rounds):
    """What `lina()` and `pytorch(previous)` return in each round; `previous` are PyTorch's rounds before."""
    ours, peers = [], []
    for number in range(rounds):
        print(f"compare_gpu: {name}, round {number + 1} of {rounds}", file=sys.stderr)
        turns = [lambda: ours.append(lina()), lambda: peers.append(pytorch(peers))]
        for turn in turns if number % 2 == 0 else reversed(turns):
            turn()
    gpus = {run["gpu"] for run in ours} | {run["device"] for run in peers}
    if len(gpus) > 1:
        raise SystemExit(f"compare_gpu: measured on {' and '.join(sorted(gpus))}, expected one GPU")
    return ours, peers


def compared(lina_ms, pytorch_ms):
    """Medians over rounds, their ratio, and the rounds' ratios."""
    medians = statistics.median(lina_ms), statistics.median(pytorch_ms)
    return {
        "lina_ms": medians[0],
        "pytorch_ms": medians[1],
        "ratio": medians[1] / medians[0],
        "lina_ms_rounds": lina_ms,
        "pytorch_ms_rounds": pytorch_ms,
        "ratio_rounds": [theirs / ours for ours, theirs in zip(lina_ms, pytorch_ms)],
    }


def compare_layers(options):
    shapes = [argument for shape in options.shape for argument in ("--shape", shape)]

    def pytorch(previous):
        command = [sys.executable, str(SCRIPTS / "pytorch_moe_layer.py"), "--json", *shapes]
        found = previous[0]["layers"] if previous else []
        winners = {layer[key] for layer in found for key in ("arrangement", "forward_arrangement")}
        command += ["--arrangement", *sorted(winners)] if winners else []
        return printed_by(command + ["--compile"] * options.compile)

    command = [options.lina, "bench", "layer", "--json", "--quiet", *shapes]
    ours, peers = rounds_of("layers", lambda: printed_by(command), pytorch, options.rounds)

    def ms(run, shape, key):
        """The fastest of what a turn measured of a shape, compiled or not."""
        return min(layer[f"{key}_ms"] for layer in run["layers"] if [layer[size] for size in SHAPE] == shape)

    rows = []
    for layer in ours[0]["layers"]:
        shape = [layer[size] for size in SHAPE]
        for name, (our_key, peer_key) in PASSES.items():
            row = compared([ms(run, shape, our_key) for run in ours], [ms(run, shape, peer_key) for run in peers])
            # What a layer has to multiply does not depend on who does it.
            tflop = layer[f"{our_key}_tflops"] * layer[f"{our_key}_ms"]
            rates = {f"{who}_tflops": tflop / row[f"{who}_ms"] for who in ("lina", "pytorch")}
            rows.append({**dict(zip(SHAPE, shape)), "pass": name, **rates, **row})
    return {"gpu": ours[0]["gpu"], "dtype": ours[0]["dtype"], "torch": peers[0]["torch"], "layers": rows}


def compare_step(options):
    def pytorch(previous):
        command = [sys.executable, str(SCRIPTS / "transformers_step.py"), options.step, "--json", "--steps", str(STEPS)]
        fastest = [min(run["steps"], key=lambda step: step["step_ms_median"])["attention"] for run in previous[:1]]
        command += ["--attention", *fastest] if fastest else []
        return printed_by(command + ["--compile"] * options.compile)

    command = [options.lina, "bench", "compute", options.step, "--rounds", str(STEPS), "--json", "--quiet"]
    ours, peers = rounds_of("step", lambda: printed_by(command), pytorch, options.rounds)
    fastest = [min(run["steps"], key=lambda step: step["step_ms_median"]) for run in peers]
    row = compared([run["step_ms"] for run in ours], [step["step_ms_median"] for step in fastest])
    tokens = ours[0]["tokens"]
    rates = {f"{who}_tokens_per_s": tokens / row[f"{who}_ms"] * 1e3 for who in ("lina", "pytorch")}
    return {
        "gpu": ours[0]["gpu"],
        "config": options.step,
        "torch": peers[0]["torch"],
        "transformers": peers[0]["transformers"],
        "attention": fastest[0]["attention"],
        "compiled": fastest[0]["compiled"],
        "parameters": fastest[0]["parameters"],
        "tokens": tokens,
        **rates,
        **row,
        # Of lina's step, without a kernel running.
        "lina_gap_share": statistics.median(run["gap_share"] for run in ours),
    }


def ratio_text(row):
    return f"{row['ratio']:.2f}x [{min(row['ratio_rounds']):.2f}, {max(row['ratio_rounds']):.2f}]"


def print_layers(result):
    print(f"{result['gpu']}, {result['dtype']}; PyTorch {result['torch']}")
    print(f"{'layer':24} {'pass':16} {'lina ms':>8} {'TFLOP/s':>8} {'PyTorch ms':>10} {'TFLOP/s':>8}  ratio")
    for row in result["layers"]:
        shape = ",".join(str(row[size]) for size in SHAPE)
        print(f"{shape:24} {row['pass']:16} {row['lina_ms']:8.3f} {row['lina_tflops']:8.0f}", end="")
        print(f" {row['pytorch_ms']:10.3f} {row['pytorch_tflops']:8.0f}  {ratio_text(row)}")


def print_step(result):
    way = result["attention"] + ", compiled" * result["compiled"]
    print(f"{result['gpu']}; {result['config']}, {result['parameters']} parameters, {result['tokens']} tokens")
    print(f"{'':32} {'step ms':>8} {'tokens/s':>9}  ratio")
    print(f"{'lina':32} {result['lina_ms']:8.2f} {result['lina_tokens_per_s']:9.0f}  {ratio_text(result)}")
    peer = f"transformers {result['transformers']} ({way})"
    print(f"{peer:32} {result['pytorch_ms']:8.2f} {result['pytorch_tokens_per_s']:9.0f}")
    print(f"of lina's step {result['lina_gap_share'] * 100:.1f} % without a kernel, while each launch is timed")


def parse_arguments():
    target = os.environ.get("CARGO_TARGET_DIR", SCRIPTS.parent / "target")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lina", default=str(Path(target) / "release/lina"), metavar="PATH", help="the program")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", action="store_true", help="MoE layers [default, with the step]")
    parser.add_argument("--shape", action="append", default=[], metavar="HIDDEN,EXPERT_HIDDEN,EXPERTS,TOP_K,TOKENS")
    parser.add_argument("--step", nargs="?", const=STEP, metavar="CONFIG.toml", help=f"a training step [{STEP}]")
    parser.add_argument("--compile", action="store_true", help="PyTorch with torch.compile besides: takes minutes")
    parser.add_argument("--json", action="store_true", help="prints one JSON object")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected at least 1")
    if not (options.layers or options.step):
        options.layers, options.step = True, STEP
    return options


def main():
    options = parse_arguments()
    results = {}
    if options.layers:
        results["layers"] = compare_layers(options)
    if options.step:
        results["step"] = compare_step(options)
    if options.json:
        print(json.dumps({"rounds": options.rounds, **results}))
        return
    print(f"medians of {options.rounds} rounds; rounds' lowest and highest ratio in brackets")
    for name, print_result in [("layers", print_layers), ("step", print_step)]:
        if name in results:
            print()
            print_result(results[name])


if __name__ == "__main__":
    main()
