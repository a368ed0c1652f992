#!/bin/bash
# All that needs a GPU to be shown, in parts of a few minutes each:
#
#   dev/gpu_check.sh build        the programs of all parts, for this machine or to be carried to it
#   dev/gpu_check.sh tests        kernels against the CPU in fp64, the model against PyTorch, layouts against one rank,
#                                 NCCL from a GPU to itself
#   dev/gpu_check.sh sanitize     compute-sanitizer on our own kernels
#   dev/gpu_check.sh bench-short  speed of every kernel and of whole steps against PyTorch, sequences of 1024 tokens
#   dev/gpu_check.sh bench-long   the same for 32768 and 131072 tokens
#                                 (bench-short 2: the second of its cases alone; a case takes 3 to 6 minutes)
#
# Programs that are missing are built first, which takes minutes; PREBUILT=1 takes them as they are. DEPS=DIR names a
# directory of headers where no package can be installed (with cudnn_frontend.h in it, that of cuDNN's front end, too).
# CUDA's libraries may lie in Python's site-packages. Results are appended to $OUT/PART.txt (OUT=build/gpu_check) after
# every case, and the last line reads `N passed, N failed`. DEVICE=cuda-on-host tries the script without a GPU.
set -u
cd "$(dirname "$0")/.."
part=${1:-}
device=${DEVICE:-cuda}
out=${OUT:-build/gpu_check}
work=build/gpu_check_work
case $part in
build | tests | sanitize | bench-short | bench-long) ;;
*)
    echo "gpu_check.sh: which part? build, tests, sanitize, bench-short or bench-long" >&2
    exit 2 ;;
esac
mkdir -p "$out" "$work"
log=$out/$part.txt
touch "$log"
first_line=$(($(wc -l <"$log") + 1))

# Directories of CUDA's libraries and headers that Python packages have brought. Their libraries have names with a
# version only (libnccl.so.2), which the linker does not look for: it finds links of plain names to them in $work/lib.
packages=$(python3 - "$work/lib" <<'PYTHON'
import glob, os, re, site, sys
links = sys.argv[1]
os.makedirs(links, exist_ok=True)
roots = site.getsitepackages() + [site.getusersitepackages()]
found = [d for root in roots for d in sorted(glob.glob(os.path.join(root, "nvidia", "*"))) if os.path.isdir(d + "/lib")]
for library in (path for d in found for path in glob.glob(d + "/lib/lib*.so.*")):
    link = os.path.join(links, re.sub(r"\.so\..*", ".so", os.path.basename(library)))
    if not os.path.lexists(link):
        os.symlink(library, link)
print(" ".join(found))
PYTHON
)
for directory in $packages; do
    export LD_LIBRARY_PATH=$directory/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
done
build() {
    [ "${PREBUILT:-}" = 1 ] && return
    make -s -j"$(nproc)" MPI=no DEVICE="$device" CUDA_DIRS="$packages ${packages:+$PWD/$work}" "$@" || exit 1
}
programs() {  # of a part
    case $1 in
    tests)
        for precision in fp32 bf16; do
            build PRECISION=$precision "build/$device-$precision/test_gpt" "build/$device-$precision/train_gpt" \
                "build/tests/kernel_cases_$device-$precision" build/tests/kernel_cases_cpu-fp64
        done
        build "$nccl" ;;
    sanitize)
        for precision in fp32 bf16; do
            build PRECISION=$precision "build/tests/kernel_cases_$device-$precision"
        done ;;
    bench-*) build PRECISION=$speed "build/$device-$speed/train_gpt" "build/bench/gpu_kernels_$device-$speed" ;;
    esac
}
speed=$([ "$device" = cuda ] && echo bf16 || echo fp32)  # is measured in this precision
nccl=build/tests/nccl_self_$([ "$device" = cuda ] && echo cuda || echo test)

check() {  # name, command... Status 77: it cannot be checked here, and the last line says why
    local name=$1 start=$SECONDS status=0 said
    said=$(mktemp -p "$work")
    shift
    timeout 300 "$@" >"$said" 2>&1 </dev/null || status=$?
    case $status in
    77) echo "skipped  $name: $(tail -n 1 "$said")" ;;
    0)
        echo "passed  $name  $((SECONDS - start)) s"
        grep -E 'at most|worst|relative|bound|arrived' "$said" | tail -n 40 ;;
    *)
        echo "FAILED  $name  $((SECONDS - start)) s"
        tail -n 60 "$said" ;;
    esac | tee -a "$log" | grep -vE 'at most|worst|relative|bound|arrived'
    rm -f "$said"
}
beside() {  # the same beside others, at most $at_once of them
    while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do sleep 0.1; done
    check "$@" &
}
at_once=$(($(nproc) < 12 ? ($(nproc) + 2) / 3 : 4))

{
    date -u +%F
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
} | tee -a "$log"

case $part in
build)
    for each in tests sanitize bench-short; do programs $each; done
    exit ;;
tests)
    programs tests
    pytest=(python3 -m pytest -q -s -p no:cacheprovider dev/tests/test_reference.py)
    python3 -c 'import xdist' 2>/dev/null && pytest+=(-n "$((at_once * 2))")
    export HELIXTRAIN_TEST_GPT_FP32=build/$device-fp32/test_gpt HELIXTRAIN_TEST_GPT_BF16=build/$device-bf16/test_gpt
    check "NCCL from a rank to itself" "$nccl"
    cases=build/tests/kernel_cases_cpu-fp64
    beside "reference of the kernels" $cases "$work/kernels.reference"
    beside "reference of attention" $cases "$work/cudnn.reference" --only cudnn_attention
    wait
    for precision in fp32 bf16; do
        beside "kernels run, $precision" "build/tests/kernel_cases_$device-$precision" "$work/kernels.$precision"
    done
    beside "cuDNN's attention runs" "build/tests/kernel_cases_$device-bf16" "$work/cudnn.bf16" --only cudnn_attention
    wait
    for precision in fp32 bf16; do
        check "kernels against fp64, $precision" $cases compare "$work/kernels.reference" "$work/kernels.$precision"
    done
    [ -e "$work/cudnn.bf16" ] && check "cuDNN's attention against fp64" $cases compare "$work/cudnn.reference" "$work/cudnn.bf16"
    check "model against PyTorch, fp32" "${pytest[@]}" -k test_against_pytorch
    check "model against PyTorch's autocast, bf16" "${pytest[@]}" -k test_bf16_against_autocast
    check "loss curve of \`tiny\` against PyTorch's autocast, bf16" "${pytest[@]}" -k test_loss_curve
    check "token files" "build/$device-fp32/train_gpt" tokenize README.md llmc --output "$work/data" --holdout-every 0
    for precision in fp32 bf16; do
        for schedule in gpipe 1f1b interleaved zb-h1 zb-h2 helix; do
            for ranks in 2 4; do
                beside "$schedule, $ranks ranks on one GPU, $precision" "build/$device-$precision/train_gpt" train \
                    --data "$work/data/train*.bin" --model custom --tokenizer bytes --layers 5 --channels 64 --heads 4 \
                    --context 64 --batch-tokens 512 --chunk-tokens 64 --ranks $ranks --schedule $schedule \
                    --verify-layout --run-dir "$work/run-$schedule-$ranks-$precision"
            done
        done
    done
    wait ;;
sanitize)
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not here: nothing was checked" | tee -a "$log"
        exit 1
    fi
    programs sanitize
    for precision in fp32 bf16; do
        for tool in memcheck racecheck initcheck synccheck; do
            for op in copy_reduce encoder layernorm classifier adamw gelu attention; do
                beside "$tool, $op, $precision" compute-sanitizer --tool $tool --error-exitcode 1 \
                    "build/tests/kernel_cases_$device-$precision" "$work/$tool-$op-$precision" --only $op
            done
        done
    done
    wait ;;
bench-short | bench-long)
    if [ $part = bench-short ]; then
        cases=("gpt2:d12 64x1024" "gpt2:d48 16x1024") steps=10
    else
        cases=("7b, 8 layers 1x32768" "7b, 4 layers 1x131072" "7b, 8 layers 1x131072") steps=3
    fi
    if [ -n "${2:-}" ]; then
        [[ $2 =~ ^[1-9]$ && $2 -le ${#cases[@]} ]] ||
            { echo "gpu_check.sh: $part has cases 1 to ${#cases[@]}, not $2" >&2; exit 2; }
        cases=("${cases[$2 - 1]}")
    fi
    [ "$device" = cuda ] || cases=("small 2x8") steps=2
    programs $part
    [ "$part$device${2:-}" = bench-shortcuda ] && check "kernels of the 7B model at 8192 tokens" \
        "build/bench/gpu_kernels_cuda-$speed" --model helixpipe:7b --sequences 1 --length 8192 --json
    for name in "${cases[@]}"; do
        timeout -k 10 540 dev/bench/gpu_vs_torch --device "$device" --case "$name" --steps $steps --json 2>&1 |
            tee -a "$log" | grep tokens_per_second
        [ "${PIPESTATUS[0]}" = 0 ] && result="passed " || result="FAILED "
        echo "$result $name: measured against PyTorch and R" | tee -a "$log"
    done ;;
esac
find "$work" -mindepth 1 -maxdepth 1 ! -name lib -exec rm -rf {} +
passed=$(tail -n +"$first_line" "$log" | grep -c '^passed  ')
failed=$(tail -n +"$first_line" "$log" | grep -c '^FAILED  ')
echo "$passed passed, $failed failed" | tee -a "$log"
[ "$failed" = 0 ]
