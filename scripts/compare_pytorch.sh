#!/usr/bin/env bash
# The job of examples/pytorch-job.toml in PyTorch and in lina, in turn on hosts of one kind (scripts/testbed.sh).
#
#   PYTHON=python3 scripts/compare_pytorch.sh [LINA-ARGUMENTS...]
#   PYTHON=python3 ROUNDS=5 scripts/compare_pytorch.sh --policies fair,lina-auto
#
# $PYTHON is an interpreter with torch. $ROUNDS (3) is how often each has its turn, $RATE (1gbit) the hosts' rate; the
# program is $LINA, as for the testbed, and its arguments are those of `lina bench train`. Prints what both compute, the
# medians over rounds of each turn's median step, and their ratios. Needs what the testbed needs.
set -euo pipefail

refuse() { echo "compare_pytorch: $*" >&2; exit 2; }

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
python=$(command -v "$python") || refuse "PYTHON is $python, which is not there, expected a Python with torch"
"$python" -c 'import torch' 2>/dev/null || refuse "$python has no torch; set PYTHON to one that has"
lina=${LINA:-${CARGO_TARGET_DIR:-target}/release/lina}
[ -x "$lina" ] || refuse "$lina is not there, expected it from: cargo build --release --features lina/mpi"
rounds=${ROUNDS:-3} rate=${RATE:-1gbit}
case $rounds in '' | *[!0-9]* | 0) refuse "ROUNDS is $rounds, expected a number from 1" ;; esac
job=examples/pytorch-job.toml

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$lina" bench compute $job --set cluster.engine=local --set cluster.ranks=1 --rounds 1 --json --quiet >"$folder/compute"
for round in $(seq 1 "$rounds"); do
    echo "compare_pytorch: round $round of $rounds" >&2
    LINA=$python MPIRUN_ARGUMENTS="${MPIRUN_ARGUMENTS:-} -x GLOO_SOCKET_IFNAME=eth0" \
        scripts/testbed.sh 4 "$rate" scripts/pytorch_moe.py \
        --store "$folder/store-$round" --data examples/data/synthetic.txt >"$folder/pytorch-$round"
    LINA=$lina scripts/testbed.sh 4 "$rate" bench train $job --json --quiet "$@" >"$folder/lina-$round"
done

"$python" - "$folder" "$rounds" "$rate" <<'END'
import json
import statistics
import sys

folder, rounds, rate = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def read(name):
    with open(f"{folder}/{name}") as file:
        return json.loads([line for line in file if line.startswith("{")][-1])


compute = read("compute")
turns = [(read(f"pytorch-{round}"), read(f"lina-{round}")) for round in range(1, rounds + 1)]
torch = turns[0][0]
float32_bytes = 4
parameters = dict(compute["memory"]["parts"])["parameters"] // float32_bytes
print(f"parameters: PyTorch {torch['parameters']:,}, lina {parameters:,}")
print(
    f"matrix products of a step: PyTorch {torch['step_gflop']:.1f} GFLOP, with attention's masked half; "
    f"lina {compute['products_gflop']:.1f} GFLOP, without"
)
print(f"4 hosts of {rate}, median over {rounds} rounds of each turn's median step, lowest and highest in brackets:")
rows = {f"PyTorch {torch['torch']}, DDP, gloo": [turn["step_ms_median"] for turn, _ in turns]}
for index, row in enumerate(turns[0][1]["policies"]):
    rows[f"lina, {row['policy']}"] = [lina["policies"][index]["step_ms_median"] for _, lina in turns]
baseline = statistics.median(next(iter(rows.values())))
for name, steps in rows.items():
    median = statistics.median(steps)
    print(f"  {name:32} {median:7.0f} ms [{min(steps):.0f}, {max(steps):.0f}]  {baseline / median:.2f}x")
forward, backward = (
    statistics.median(turn[f"{direction}_a2a_ms_median"] for turn, _ in turns) for direction in ("forward", "backward")
)
print(f"an all-to-all in PyTorch, until it returns: forward {forward:.1f} ms, backward {backward:.1f} ms")
END
