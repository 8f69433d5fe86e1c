#!/usr/bin/env python3
"""Writes the text that examples/contention.toml trains on: sentences from a small grammar, from a seed.

The figures of that example depend on how its tokens are routed, so its text must not change when the sources do.

    python3 scripts/synthetic_text.py > examples/data/synthetic.txt
"""

import random

SUBJECTS = ["the scheduler", "a rank", "every expert", "the router", "one device", "the link", "a gradient", "the batch"]
VERBS = ["waits for", "sends", "splits", "reduces", "receives", "places", "measures", "overlaps"]
OBJECTS = ["its tokens", "the next layer", "a micro-op", "the all-to-all", "an allreduce", "two chunks", "the queue"]
TAILS = ["", " before the step ends", " while the wire is free", " in rank order", " and then goes on", " once more"]
BYTES = 64 * 1024


def clause() -> str:
    return " ".join(random.choice(words) for words in (SUBJECTS, VERBS, OBJECTS)) + random.choice(TAILS)


def main() -> None:
    random.seed(2023)
    written, number = 0, 0
    while written < BYTES:
        number += 1
        sentence = clause()
        if random.random() < 0.3:
            sentence += ", but " + clause()
        line = f"{number}. {sentence[0].upper()}{sentence[1:]}."
        print(line)
        written += len(line) + 1


if __name__ == "__main__":
    main()
