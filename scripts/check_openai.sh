#!/usr/bin/env bash
# Starts `lina serve` with a small model on a free port and puts the official `openai` client to it.
#
# usage: scripts/check_openai.sh LINA PYTHON     PYTHON must have the package openai
set -euo pipefail
cd "$(dirname "$0")/.."

log=$(mktemp)
"$1" serve crates/lina-model/tests/fixtures/hf/mixtral --port 0 --ranks 2 --verify-every 3 2>"$log" &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -f "$log"' EXIT
for _ in $(seq 100); do
    url=$(grep -o 'http://[0-9.:]*' "$log" | head -n 1) && break
    kill -0 "$server" || { cat "$log"; exit 1; }
    sleep 0.1
done
"$2" scripts/check_openai.py --base-url "$url" --no-chat
kill -INT "$server"
wait "$server"
