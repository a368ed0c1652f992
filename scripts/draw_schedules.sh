#!/bin/sh
# Draws the pictures of llmc/pipeline/README.md anew, or into another directory: scripts/draw_schedules.sh [DIR].
# Four ranks, eight layers, eight chunks; attention takes 1.5 times as long as the rest of a layer.
set -eu
program=$(realpath "${TRAIN_GPT:-$(dirname "$0")/../train_gpt}")
pictures=${1:-$(dirname "$0")/../llmc/pipeline/pictures}
mkdir -p "$pictures"
cd "$pictures"

draw() {  # file, flags...
    file=$1
    shift
    "$program" plan --model tiny --ranks 4 --layers 8 --chunks 8 --times 1,6,3 --draw "$file" "$@"
}
draw 1f1b.svg --schedule 1f1b
draw zb-h1.svg --schedule zb-h1
draw interleaved.svg --schedule interleaved
draw helix-1.svg --schedule helix --folds 1 --spread-head on
draw helix-2.svg --schedule helix --folds 2 --spread-head on
