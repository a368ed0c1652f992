#!/bin/sh
# What `make run` does once ./train_gpt is built: a corpus from this machine's C/C++ headers and the project's sources,
# about a minute of training on two cores (STEPS=N for another length), text sampled from the result. All of it lies in
# runs/demo, which each run begins anew. Arguments go to `train_gpt train`.
set -eu
cd "$(dirname "$0")/.."
run=runs/demo
steps=${STEPS:-600}

say() { printf '\n== %s\n' "$*"; }

say "Corpus: one document per file, every 20th held out"
rm -rf "$run"
sources=$(find train_gpt.cu test_gpt.cu Makefile README.md llmc dev scripts data -type f -not -name '*.pyc')
headers=/usr/include
if [ "$(find $headers -type f 2>/dev/null | head -n 500 | wc -l)" -lt 500 ]; then
    echo "/usr/include has too few headers, so the corpus is the project's own sources."
    headers=
fi
# shellcheck disable=SC2086  # the list is split on purpose
./train_gpt tokenize $sources $headers --extensions h,hpp,hh,none --max-bytes 32000000 --holdout-every 20 --output "$run/data"

say "Training: tiny (4 layers, 192 channels, 4 heads, context 256, bytes), HelixPipe on two ranks"
./train_gpt train --model tiny --run-dir "$run" --data "$run/data/train_*.bin" --val-data "$run/data/val_*.bin" \
    --val-tokens 65536 --steps "$steps" --batch-tokens 2048 --lr 3e-3 --warmup $((steps / 20)) \
    --ranks 2 --schedule helix "$@"

say "A sample: ./train_gpt generate --checkpoint $run --prompt '#include <'"
./train_gpt generate --checkpoint "$run" --prompt '#include <' --tokens 400 --temperature 0.7 --top-k 40

say "Done. The loss of every step is in $run/metrics.jsonl; dev/plot.py draws it, dev/plot.py --help tells how."
