"""Loads a folder in transformers and compares its logits with `expected.safetensors` in it.

usage: python check_transformers.py FOLDER ...

`expected.safetensors` holds `input_ids` [rows, tokens] and `logits` [rows, tokens, vocab].
`cargo run -p lina-model --example export -- KIND FOLDER` writes such a folder.
"""

import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4


def main() -> int:
    failures = 0
    for folder in sys.argv[1:]:
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        expected = load_file(f"{folder}/expected.safetensors")
        with torch.no_grad():
            logits = model.eval()(expected["input_ids"].long()).logits
        difference = (logits - expected["logits"]).abs().max().item()
        problems = {name: keys for name, keys in report.items() if keys}
        good = difference < TOLERANCE and not problems
        failures += not good
        print(f"{folder}: logits within {difference:.1e} {problems or ''} {'ok' if good else 'FAILED'}")
    return 1 if failures or len(sys.argv) < 2 else 0


if __name__ == "__main__":
    sys.exit(main())
