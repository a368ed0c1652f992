"""The commands of the program for GPUs, its GPU played by the host (cuda_on_host): what they keep on the device, and
bring there and back, makes the same numbers as the program for the CPU."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from program import TRAIN_GPT, run

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "build/cuda-on-host-fp32/train_gpt"
FLAGS = ["--model", "custom", "--layers", 2, "--channels", 16, "--heads", 2, "--context", 16, "--tokenizer", "bytes",
         "--threads", 1, "--batch-tokens", 48, "--chunk-tokens", 24, "--head-chunk", 24, "--val-tokens", 64, "--lr", 1e-2]


def train(program, data, directory, *more):
    run("train", *FLAGS, "--data", data / "train_*.bin", "--val-data", data / "val_*.bin", "--run-dir", directory, *more,
        program=program)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The same four steps on the CPU and on the GPU, the latter interrupted after two."""
    cpu, gpu = tmp_path_factory.mktemp("cpu"), tmp_path_factory.mktemp("gpu")
    train(TRAIN_GPT, data, cpu, "--steps", 4)
    train(CUDA, data, gpu, "--steps", 4, "--stop-after", 2)
    train(CUDA, data, gpu, "--steps", 4, "--resume")
    return cpu, gpu


def test_training_and_resuming(runs):
    cpu, gpu = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in runs]
    assert [m["step"] for m in gpu] == [m["step"] for m in cpu] == list(range(5))
    for ours, wanted in zip(gpu, cpu):
        for key in ("loss", "val_loss", "grad_norm"):
            if key in wanted:
                assert ours[key] == pytest.approx(wanted[key], rel=2e-5), (ours["step"], key)


def test_ranks_share_a_gpu(runs, data, tmp_path):
    alone = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    trace = tmp_path / "trace.json"
    shared = train(CUDA, data, tmp_path / "run", "--steps", 4, "--stop-after", 2, "--ranks", 2, "--schedule", "helix",
                   "--trace", trace)
    for ours, wanted in zip(shared[1:3], alone[1:3]):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    computed = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") == "compute"]
    assert {e["pid"] for e in computed} == {0, 1} and all(e["dur"] >= 0 for e in computed)


def test_evaluating_and_generating(runs, data):
    said = [[run(*command, "--checkpoint", runs[0], "--threads", 1, program=program).stdout for program in
             (TRAIN_GPT, CUDA)]
            for command in (("eval", "--data", data / "val_*.bin", "--val-tokens", 128),
                            ("generate", "--prompt", "int ", "--tokens", 12, "--temperature", 0))]
    numbers = [float(text.split("loss ")[1].split()[0]) for text in said[0]]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-4)
    assert said[1][0] == said[1][1] != ""


def test_speed_is_measured():
    """dev/bench/gpu_vs_torch, whose figures mean nothing here, runs to its end."""
    command = [sys.executable, ROOT / "dev/bench/gpu_vs_torch", "--device", "cuda-on-host", "--case", "small 2x8", "--steps",
               "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    metrics = {row["metric"] for row in rows}
    assert metrics >= {"TFLOP/s", "GB/s", "ceiling_tokens_per_second", "tokens_per_second"}
    assert rows[-1]["ratio"] > 0 and rows[-1]["percent_of_bound"] > 0
