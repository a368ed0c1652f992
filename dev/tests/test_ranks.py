"""train_gpt on several ranks, from outside: the same training under every layout and transport, checkpoints that any
layout resumes, evaluation and generation, traces, refusals, and runs whose ranks die or hang at random moments."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
import xml.etree.ElementTree
from pathlib import Path

import pytest

from program import TRAIN_GPT, run

ROOT = Path(__file__).resolve().parents[2]
MODEL = ("--model custom --layers 4 --channels 32 --heads 2 --context 32 --tokenizer bytes --packing contiguous "
         "--batch-tokens 256 --threads 1 --lr 3e-3").split()
LAYOUTS = {"one": [], "1f1b": ["--ranks", 4, "--schedule", "1f1b"], "interleaved": ["--ranks", 2, "--schedule", "interleaved"],
           "helix": ["--ranks", 3, "--schedule", "helix"]}
SCHEDULES = ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "helix"]
DEATHS = int(os.environ.get("HELIXTRAIN_DEATHS", 6))  # 40 and more were tried; each takes seconds

needs_mpi = pytest.mark.skipif(not shutil.which("mpirun") or b"MPI_Init" not in TRAIN_GPT.read_bytes(),
                               reason="train_gpt was built without MPI, or there is no mpirun (openmpi-bin)")


def run_mpi(ranks, *arguments, **options):
    return run(ranks, *arguments, program=ROOT / "scripts/run_mpi.sh", **options)


def train_flags(data, run_dir, *more):
    return ["train", *MODEL, "--data", data / "train_*.bin", "--run-dir", run_dir, *more]


def losses(run_dir):
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return {m["step"]: m["loss"] for m in map(json.loads, lines) if "loss" in m}


@pytest.fixture(scope="session")
def saved(data, tmp_path_factory):
    """A run of 3 steps of 8 under each layout."""
    runs = {}
    for name, flags in LAYOUTS.items():
        runs[name] = tmp_path_factory.mktemp(name)
        run(*train_flags(data, runs[name], "--steps", 8, "--stop-after", 3, *flags))
    return runs


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("reference")
    run(*train_flags(data, directory, "--steps", 8))
    return losses(directory)


@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("before", LAYOUTS)
def test_any_layout_resumes_any_other(saved, reference, data, tmp_path, before, after):
    shutil.copytree(saved[before], tmp_path / "run")
    run(*train_flags(data, tmp_path / "run", "--steps", 8, "--resume", *LAYOUTS[after]))
    found = losses(tmp_path / "run")
    assert found.keys() == reference.keys()
    for step, loss in found.items():
        assert abs(loss - reference[step]) <= 1e-6 * reference[step], f"step {step}"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_evaluation_and_generation(saved, data, schedule):
    def both(*flags):
        evaluated = run("eval", "--checkpoint", saved["helix"], "--data", data / "val_*.bin", "--val-tokens", 4000,
                        "--packing", "contiguous", "--threads", 1, *flags).stdout
        generated = run("generate", "--checkpoint", saved["helix"], "--temperature", 0, "--tokens", 50, "--prompt", "int ",
                        "--threads", 1, *flags).stdout
        return float(re.search(r"loss ([\d.]+)", evaluated)[1]), generated

    (loss, text), (wanted, wanted_text) = both("--ranks", 3, "--schedule", schedule), both()
    assert abs(loss - wanted) <= 1e-6 * wanted and text == wanted_text


@needs_mpi
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_threads_and_processes_have_the_same_bits(data, tmp_path, schedule):
    flags = ["--schedule", schedule, "--steps", 3, "--recompute", random.choice(["none", "without-attention", "full"])]
    run(*train_flags(data, tmp_path / "threads", "--ranks", 3, *flags))
    run_mpi(3, *train_flags(data, tmp_path / "processes", *flags))
    assert losses(tmp_path / "threads") == losses(tmp_path / "processes")
    for file in sorted((tmp_path / "threads/checkpoints/step-00000003").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "processes/checkpoints/step-00000003" / file.name).read_bytes(), file.name


@needs_mpi
def test_evaluation_and_generation_as_processes(saved, data):
    flags = ["--checkpoint", saved["one"], "--threads", 1, "--schedule", "helix"]
    one = run("eval", "--data", data / "val_*.bin", "--val-tokens", 4000, *flags).stdout
    assert run_mpi(2, "eval", "--data", data / "val_*.bin", "--val-tokens", 4000, *flags).stdout == one
    text = run("generate", "--temperature", 0, "--tokens", 30, *flags).stdout
    assert run_mpi(2, "generate", "--temperature", 0, "--tokens", 30, *flags).stdout.strip() == text.strip()


def test_verify_layout(data, tmp_path):
    done = run(*train_flags(data, tmp_path / "run", "--ranks", 4, "--schedule", "helix", "--verify-layout"))
    assert "relative differences" in done.stdout and "h.3.mlp.c_proj.bias" in done.stdout
    assert not (tmp_path / "run").exists()


def test_trace_of_all_ranks(data, tmp_path):
    file = tmp_path / "trace.json"
    run(*train_flags(data, tmp_path / "run", "--ranks", 3, "--schedule", "helix", "--steps", 2, "--trace", file))
    events = [e for e in json.loads(file.read_text())["traceEvents"] if e["ph"] == "X"]
    computed = [e for e in events if e["args"]["kind"] == "compute"]
    chunks, layers, steps = 8, 4, 2
    assert len(computed) == steps * chunks * (6 * layers + 3)  # embedding twice, the head once
    assert {e["pid"] for e in computed} == {0, 1, 2}
    by_rank = {}
    for e in sorted(computed, key=lambda e: e["ts"]):
        last = by_rank.get(e["pid"])
        assert last is None or e["ts"] >= last["ts"] + last["dur"] - 1e-3
        by_rank[e["pid"]] = e
    assert xml.etree.ElementTree.parse(str(file) + ".svg").getroot().tag.endswith("svg")


def test_step_lines_and_metrics_show_the_bubble(data, tmp_path):
    done = run(*train_flags(data, tmp_path / "run", "--ranks", 2, "--schedule", "zb-h1", "--steps", 2))
    assert done.stdout.count("| bubble ") == 2 and done.stdout.count("step 1/2") == 1
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        assert 0 <= json.loads(line)["bubble"] < 1


@pytest.mark.parametrize("flags, environment, words", [
    (["--ranks", 2], {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMI_RANK": "0", "PMI_SIZE": "2"},
     ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]),
    (["--ranks", 2, "--schedule", "zigzag"], {}, ["zigzag", "gpipe|1f1b"]),
    (["--ranks", 2, "--schedule", "helix", "--chunk-tokens", 16], {}, ["slices", "gpipe"]),
    (["--ranks", 2, "--folds", 0], {}, ["--folds 0"]),
    (["--verify-layout"], {}, ["--ranks 2"]),
])
def test_refusals(data, tmp_path, flags, environment, words):
    done = run(*train_flags(data, tmp_path / "run", *flags), check=2, env={**os.environ, **environment})
    for word in words:
        assert word in done.stderr


@needs_mpi
def test_refusals_under_a_launcher(data, tmp_path):
    done = run_mpi(2, *train_flags(data, tmp_path / "run", "--ranks", 3), check=2)
    assert done.stderr.count("--ranks 3: Open MPI has started 2 processes") == 1 and "use --ranks 2" in done.stderr
    assert "one process" in run_mpi(2, "plan", "--model", "tiny", check=2).stderr


def test_a_rank_that_cannot_start_ends_all(data, tmp_path):
    done = run(*train_flags(data, tmp_path / "run", "--ranks", 3, "--init-from", data), check=None)
    assert done.returncode in (2, 3, 4) and done.stderr.count("train_gpt: ") == 1


def test_sigterm_saves_a_checkpoint_that_resumes(data, tmp_path):
    flags = train_flags(data, tmp_path / "run", "--ranks", 3, "--schedule", "helix", "--steps", 100000)
    process = subprocess.Popen([TRAIN_GPT, *map(str, flags)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    step = max(losses(tmp_path / "run"))
    run(*train_flags(data, tmp_path / "run", "--steps", 100000, "--stop-after", step + 2, "--resume"))


def wait_for_step(run_dir, step):
    for _ in range(600):
        if (run_dir / "metrics.jsonl").exists() and max(losses(run_dir), default=0) >= step:
            return
        time.sleep(0.05)
    raise AssertionError("the run did not get so far")


def processes_of(run_dir):
    """[(rank, pid)] of the trainers of a run."""
    found = []
    for directory in Path("/proc").iterdir():
        try:
            if directory.name.isdigit() and str(run_dir) in (directory / "cmdline").read_text() and \
                    "train_gpt" in os.readlink(directory / "exe"):
                environment = (directory / "environ").read_bytes().decode(errors="replace")
                found.append((int(re.search(r"OMPI_COMM_WORLD_RANK=(\d+)", environment)[1]), int(directory.name)))
        except (OSError, TypeError):
            continue
    return sorted(found)


# The line that names the cause: rank, op, layer, chunk and peer.
OP = r"(?:(?:embed|head)(?: backward)?|(?:pre|attention|post)(?: backward| weight gradients)? layer \d+) chunk \d+"
MESSAGE = r"(?:[XY]|d[XY]|activation|gradient)(?: layer \d+)? chunk \d+ from rank (\d)"
BUSY = "(?:start-up|the data of a step|the sum of gradients|the optimizer|saving a checkpoint|the end of its ops)"
SEEN = f"in {OP}|in {BUSY}|waiting for {MESSAGE}|waiting for all ranks: {BUSY}"
WAITS = rf"rank (\d) waits for {MESSAGE}|no rank waits for it yet(?:, the first would be rank (\d))?"
CAUSE = rf"train_gpt: rank (\d) (has died|has not answered for 1\d s), last seen (?:{SEEN}); (?:{WAITS})"


def check_cause(line, kind, rank, ranks, layers=4, chunks=8):
    found = re.fullmatch(CAUSE, line)
    assert found, line
    named, how, wanted, waiting, missed, first = found.groups()
    assert int(named) == rank and how.startswith("has died" if kind == signal.SIGKILL else "has not answered"), line
    assert waiting is None or int(missed) == rank, line
    assert {int(peer) for peer in (wanted, waiting, first) if peer} <= set(range(ranks)) - {rank}, line
    assert all(int(layer) < layers for layer in re.findall(r"layer (\d+)", line)), line
    assert all(int(chunk) < chunks for chunk in re.findall(r"chunk (\d+)", line)), line


@needs_mpi
@pytest.mark.parametrize("number", range(DEATHS))
def test_rank_dies_or_stops(data, tmp_path, number):
    kind = [signal.SIGKILL, signal.SIGSTOP][number % 3 == 2]
    ranks, schedule = random.choice([2, 3, 4]), random.choice(SCHEDULES)
    flags = train_flags(data, tmp_path / "run", "--schedule", schedule, "--steps", 100000, "--checkpoint-every", 5)
    process = subprocess.Popen([ROOT / "scripts/run_mpi.sh", str(ranks), *map(str, flags)], text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for_step(tmp_path / "run", 6)
    time.sleep(random.uniform(0, 0.5))
    rank, pid = random.choice(processes_of(tmp_path / "run"))
    os.kill(pid, kind)
    start = time.time()
    try:  # 10 s, which is what users are promised, after the rank is gone, or silent for as long as it may be
        _, err = process.communicate(timeout=10 if kind == signal.SIGKILL else 20)
    finally:
        process.kill()
    causes = [line for line in err.splitlines() if line.startswith("train_gpt: ")]
    assert len(causes) == 1, f"{kind.name} of rank {rank} of {ranks}, {schedule}:\n{err}"
    check_cause(causes[0], kind, rank, ranks)
    assert process.returncode == (137 if kind == signal.SIGKILL else 20)
    print(kind.name, f"{time.time() - start:.1f} s:", causes[0])
    assert not processes_of(tmp_path / "run")
    step = max(losses(tmp_path / "run"))  # the checkpoint is whole, and any layout goes on from it
    run(*train_flags(data, tmp_path / "run", "--steps", 100000, "--stop-after", step + 1, "--resume"))
