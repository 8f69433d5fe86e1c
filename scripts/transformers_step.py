"""Measures a training step of a MoE model in transformers on one GPU: what lina's step on a GPU is compared with.

Model and step are those of a lina configuration, whose sections [model] and [train] are read. Weights and tokens are
random. Parameters, gradients and AdamW's moments are bfloat16, which is less work than float32 masters and moments;
the experts run as grouped matrix products, attention is PyTorch's, measured with each of its kernels for training,
AdamW is PyTorch's fused one. A step is forward, backward, clipping if the configuration says so, the optimizer and
zero_grad; its time is from the end of the step before to its own end, by CUDA events.

    python3 scripts/transformers_step.py examples/gpu-step.toml
    python3 scripts/transformers_step.py examples/gpu-step.toml --compile --json
"""

import argparse
import itertools
import json
import statistics
import sys
import tomllib

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

# The name in transformers of every key of [model], by family where they differ.
NAMES = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "top_k": "num_experts_per_tok",
    "max_positions": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "aux_loss_coefficient": "router_aux_loss_coef",
}
FAMILY_NAMES = {
    "mixtral": {"head_dim": "head_dim", "experts": "num_local_experts", "expert_hidden": "intermediate_size"},
    "qwen3_moe": {
        "head_dim": "head_dim",
        "experts": "num_experts",
        "expert_hidden": "moe_intermediate_size",
        "renormalise": "norm_topk_prob",
        "dense_layers": "mlp_only_layers",
        "dense_hidden": "intermediate_size",
    },
    "olmoe": {
        "experts": "num_experts",
        "expert_hidden": "intermediate_size",
        "renormalise": "norm_topk_prob",
        "clip_qkv": "clip_qkv",
    },
}
MODEL_DEFAULTS = {"vocab": 256, "top_k": 2, "max_positions": 2048}
TRAIN_DEFAULTS = {
    "sequence_tokens": 128,
    "batch_sequences": 16,
    "micro_batches": 1,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "clip_norm": 1.0,
}


def model_config(model):
    """The configuration in transformers of a section [model] with a kind and sizes."""
    kind = model.get("kind")
    if kind not in FAMILY_NAMES:
        raise SystemExit(f"transformers_step: `kind` is {kind!r}, expected one of {', '.join(FAMILY_NAMES)}")
    model = {**MODEL_DEFAULTS, "kv_heads": model["heads"], **model}
    del model["kind"]
    aux_loss = model.pop("aux_loss", "switch")
    if aux_loss not in ("none", "switch"):
        raise SystemExit(f"transformers_step: `aux_loss` is {aux_loss!r}, expected none or switch")
    keys = {"output_router_logits": aux_loss == "switch"}
    if "rope_theta" in model:
        keys["rope_parameters"] = {"rope_type": "default", "rope_theta": model.pop("rope_theta")}
    names = {**NAMES, **FAMILY_NAMES[kind]}
    for key, value in model.items():
        if key not in names:
            raise SystemExit(f"transformers_step: `{key}` is set, which {kind} in transformers does not have")
        keys[names[key]] = value
    return AutoConfig.for_model(kind, use_cache=False, **keys)


class Step:
    """A model with its optimizer, and a batch that every step repeats."""

    def __init__(self, config, train, device, compiled):
        torch.manual_seed(1)
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
            )
        self.model.train()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": train["weight_decay"]},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        betas = train["beta1"], train["beta2"]
        self.optimizer = torch.optim.AdamW(
            groups, lr=train["learning_rate"], betas=betas, eps=train["epsilon"], fused=True
        )
        self.forward = torch.compile(self.model) if compiled else self.model
        self.clip_norm = train["clip_norm"]
        tokens = (train["batch_sequences"], train["sequence_tokens"])
        ids = torch.randint(config.vocab_size, tokens, device=device)
        self.micro_batches = ids.chunk(train["micro_batches"])

    def run(self):
        """One step; its loss stays on the device."""
        total = 0.0
        for ids in self.micro_batches:
            loss = self.forward(input_ids=ids, labels=ids).loss / len(self.micro_batches)
            loss.backward()
            total = total + loss.detach()
        if self.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def measure(config, train, attention, compiled, options):
    """The medians of one kernel of attention."""
    torch.cuda.reset_peak_memory_stats()
    step = Step(config, train, "cuda", compiled)
    with sdpa_kernel(ATTENTION[attention]):
        losses = [step.run() for _ in range(options.warmups)]
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(options.steps + 1)]
        events[0].record()
        for event in events[1:]:
            losses.append(step.run())
            event.record()
        torch.cuda.synchronize()
    step_ms = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
    tokens = train["batch_sequences"] * train["sequence_tokens"]
    return {
        "attention": attention,
        "compiled": compiled,
        "parameters": step.model.num_parameters(),
        "step_ms": step_ms,
        "step_ms_median": statistics.median(step_ms),
        "tokens_per_s": tokens / statistics.median(step_ms) * 1e3,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "loss_start": losses[0].item(),
        "loss": losses[-1].item(),
    }


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.toml", help="configuration of a lina run")
    parser.add_argument("--warmups", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, default=["flash", "cudnn"])
    parser.add_argument("--compile", action="store_true", help="measures with torch.compile besides")
    parser.add_argument("--check", action="store_true", help="trains a few steps on the processor instead")
    parser.add_argument("--json", action="store_true", help="prints one JSON object")
    return parser.parse_args()


def main():
    options = parse_arguments()
    with open(options.config, "rb") as file:
        document = tomllib.load(file)
    config = model_config(document["model"])
    train = {**TRAIN_DEFAULTS, **document.get("train", {})}
    if options.check:
        step = Step(config, train, "cpu", compiled=False)
        losses = [step.run().item() for _ in range(options.steps)]
        return print(f"{step.model.num_parameters()} parameters, losses {losses[0]:.3f} to {losses[-1]:.3f}")
    if not torch.cuda.is_available():
        raise SystemExit("transformers_step: no GPU, expected one that PyTorch can use")
    results = []
    for compiled in [False, True] if options.compile else [False]:
        for attention in options.attention:
            torch.compiler.reset()
            try:
                results.append(measure(config, train, attention, compiled, options))
            except RuntimeError as error:
                # PyTorch says so where a kernel does not take this model's heads.
                if "No available kernel" not in str(error):
                    raise
                print(f"transformers_step: attention {attention}: {error}", file=sys.stderr)
    if not results:
        raise SystemExit("transformers_step: no kernel of attention takes this model")
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps({**versions, "device": torch.cuda.get_device_name(), "steps": results}))
        return
    print(f"{results[0]['parameters']} parameters")
    print("attention  compiled    step ms   tokens/s  peak GiB  loss")
    for r in results:
        print(f"{r['attention']:9}  {'yes' if r['compiled'] else 'no':8}", end="")
        print(f" {r['step_ms_median']:10.2f} {r['tokens_per_s']:10.0f} {r['peak_memory_bytes'] / 2**30:9.2f}", end="")
        print(f"  {r['loss_start']:.3f} to {r['loss']:.3f}")


if __name__ == "__main__":
    main()
