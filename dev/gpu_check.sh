#!/bin/bash
# All that needs a GPU to be shown, in parts of a few minutes each:
#
#   dev/gpu_check.sh tests      kernels against the CPU in fp64, the model against PyTorch, layouts against one rank, NCCL
#                               from a GPU to itself
#   dev/gpu_check.sh sanitize   compute-sanitizer on our own kernels
#
# Programs that are missing are built first (make -j; DEPS=DIR names a directory of headers where no package can be
# installed). CUDA's libraries may lie in Python's site-packages. Results are appended to $OUT/PART.txt (OUT=build/gpu_check)
# after every case, and the last line reads `N passed, N failed`. DEVICE=cuda-on-host tries the script without a GPU.
set -u
cd "$(dirname "$0")/.."
part=${1:-}
device=${DEVICE:-cuda}
out=${OUT:-build/gpu_check}
mkdir -p "$out"
log=$out/$part.txt
passed=0 failed=0

# Directories of CUDA's libraries and headers that Python packages have brought.
packages=$(python3 - <<'PYTHON'
import glob, os, site
roots = site.getsitepackages() + [site.getusersitepackages()]
print(" ".join(d for root in roots for d in glob.glob(os.path.join(root, "nvidia", "*")) if os.path.isdir(d + "/lib")))
PYTHON
)
for directory in $packages; do
    export LD_LIBRARY_PATH=$directory/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
done
build() { make -s -j"$(nproc)" MPI=no DEVICE="$device" CUDA_DIRS="$packages" "$@" || exit 1; }

check() {  # name, command... Status 77: it cannot be checked here, and the last line says why
    local name=$1 start=$SECONDS status=0
    shift
    timeout 300 "$@" >"$out/last.log" 2>&1 </dev/null || status=$?
    if [ $status = 77 ]; then
        echo "skipped  $name: $(tail -n 1 "$out/last.log")" | tee -a "$log"
    elif [ $status = 0 ]; then
        passed=$((passed + 1))
        echo "passed  $name  $((SECONDS - start)) s" | tee -a "$log"
        grep -E 'at most|worst|relative|bound|arrived' "$out/last.log" | tail -n 40 >>"$log"
    else
        failed=$((failed + 1))
        echo "FAILED  $name  $((SECONDS - start)) s" | tee -a "$log"
        tail -n 60 "$out/last.log" | tee -a "$log"
    fi
}

{
    date -u +%F
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
} | tee -a "$log"

case $part in
tests)
    for precision in fp32 bf16; do
        build PRECISION=$precision "build/$device-$precision/test_gpt" "build/$device-$precision/train_gpt" \
            "build/tests/kernel_cases_$device-$precision" build/tests/kernel_cases_cpu-fp64
    done
    nccl=build/tests/nccl_self_$([ "$device" = cuda ] && echo cuda || echo test)
    build "$nccl"
    check "NCCL from a rank to itself" "$nccl"
    check "reference of the kernels" build/tests/kernel_cases_cpu-fp64 "$out/kernels.reference"
    for precision in fp32 bf16; do
        cases=build/tests/kernel_cases_$device-$precision
        check "kernels run, $precision" "$cases" "$out/kernels.$precision"
        check "kernels against fp64, $precision" build/tests/kernel_cases_cpu-fp64 compare "$out/kernels.reference" \
            "$out/kernels.$precision"
    done
    export HELIXTRAIN_TEST_GPT_FP32=build/$device-fp32/test_gpt HELIXTRAIN_TEST_GPT_BF16=build/$device-bf16/test_gpt
    check "model against PyTorch, fp32" python3 -m pytest -q -p no:cacheprovider dev/tests/test_reference.py \
        -k test_against_pytorch
    check "model against PyTorch's autocast, bf16" python3 -m pytest -q -p no:cacheprovider \
        dev/tests/test_reference.py -k test_bf16_against_autocast
    check "loss curve of \`tiny\` against PyTorch's autocast, bf16" python3 -m pytest -q -p no:cacheprovider --runxfail \
        dev/tests/test_reference.py -k test_loss_curve
    for precision in fp32 bf16; do
        train=build/$device-$precision/train_gpt
        [ -d "$out/data" ] || check "token files" "$train" tokenize README.md llmc --output "$out/data" --holdout-every 0
        for schedule in gpipe 1f1b interleaved zb-h1 zb-h2 helix; do
            for ranks in 2 4; do
                check "$schedule, $ranks ranks on one GPU, $precision" "$train" train --data "$out/data/train*.bin" \
                    --model custom --tokenizer bytes --layers 5 --channels 64 --heads 4 --context 64 \
                    --batch-tokens 512 --chunk-tokens 64 --ranks $ranks --schedule $schedule --verify-layout \
                    --run-dir "$out/run"
            done
        done
    done
    rm -f "$out"/kernels.* ;;
sanitize)
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not here: nothing was checked" | tee -a "$log"
        exit 1
    fi
    for precision in fp32 bf16; do
        build PRECISION=$precision "build/tests/kernel_cases_$device-$precision"
        for tool in memcheck racecheck initcheck synccheck; do
            for op in copy_reduce encoder layernorm classifier adamw attention; do
                check "$tool, $op, $precision" compute-sanitizer --tool $tool --error-exitcode 1 \
                    "build/tests/kernel_cases_$device-$precision" "$out/outputs" --only $op
            done
        done
    done
    rm -f "$out/outputs" ;;
*)
    echo "gpu_check.sh: which part? tests or sanitize" >&2
    exit 2 ;;
esac
rm -rf "$out/last.log" "$out/run" "$out/data"
echo "$passed passed, $failed failed" | tee -a "$log"
[ $failed = 0 ]
