#!/bin/bash
# Draws the picture of dev/clusters/README.md and README.md: planned speed of all schedules against the length of sequences,
# for HelixPipe's 7B model on 64 H20. `scripts/draw_plans.sh FILE.png` writes it elsewhere.
set -eu
cd "$(dirname "$0")/.."
output=${1:-dev/clusters/7b-h20x64.png}
plans=$(mktemp -d)
trap 'rm -rf "$plans"' EXIT
for tokens in 32768 65536 98304 131072 196608 262144; do
    ./train_gpt plan --cluster h20x64 --model helixpipe:7b --context $tokens --chunk-tokens $tokens --chunks 16 --json >"$plans/$tokens.json"
done
build/venv/bin/python dev/plot.py --plans context "$plans"/*.json --output "$output"
