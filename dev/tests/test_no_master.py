"""Training in bf16 without master weights, from outside: memory, layouts, resuming, the loss that it reaches, refusals."""
import filecmp
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import program

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dev" / "reference"))
from tensor_file import read_tensors  # noqa: E402

MODEL = "--model tiny --layers 4 --channels 32 --heads 2 --context 32 --packing contiguous --batch-tokens 256".split()
PARAMETERS = 63104  # with the padding of the vocabulary, and of every tensor to a multiple of 64


def run(*arguments, **options):
    return program.run(*arguments, program=ROOT / "build/cpu-bf16/train_gpt", **options)


def train(data, run_dir, *more, **options):
    return run("train", *MODEL, "--threads", 1, "--data", data / "train_*.bin", "--val-data", data / "val_*.bin",
               "--val-tokens", 16384, "--lr", 3e-3, "--run-dir", run_dir, *more, **options)


def last_loss(run_dir):
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]


def stored_weights(run_dir, step):
    """The bits of all weights in a checkpoint, which are fp32; of LayerNorm's weights, those of what is kept: less 1."""
    kept = []
    for path in (run_dir / f"checkpoints/step-{step:08d}").glob("model*.safetensors"):
        for name, values in read_tensors(path).items():
            assert values.dtype == np.float32
            kept.append((values - (1 if re.search(r"ln_\w+\.weight$", name) else 0)).astype(np.float32).ravel())
    return np.concatenate(kept).view(np.uint32)


def same_checkpoints(one, other, step):
    directory = f"checkpoints/step-{step:08d}"
    files = [path.name for path in (one / directory).glob("*.safetensors")]
    return len(files) >= 2 and all(filecmp.cmp(one / directory / file, other / directory / file, shallow=False) for file in files)


def bytes_of(text):
    number, unit = text.split()
    return float(number) * 1024 ** ["B", "KiB", "MiB", "GiB"].index(unit)


# ----------------------------------------------------------------------------------------------------------------------


def test_dry_run_shows_four_bytes_a_parameter_less():
    def memory(*more):
        table = run("train", *MODEL, "--dry-run", *more).stdout
        return {kind: bytes_of(size) for kind, size in re.findall(r"^  (\w+(?: weights)?) +([\d.]+ [KMG]?i?B)$", table, re.M)}

    with_master, without = memory(), memory("--no-master")
    assert without["master weights"] == 0
    assert abs(with_master["master weights"] - 4 * PARAMETERS) <= 4096
    assert abs(with_master["total"] - without["total"] - 4 * PARAMETERS) <= 0.011 * 2**20  # printed to 0.01 MiB
    assert all(without[kind] == with_master[kind] for kind in ("weights", "gradients", "moments", "activations", "workspace"))


@pytest.mark.parametrize("layout", [[], ["--ranks", 2, "--schedule", "helix"]])
def test_stopping_and_resuming_changes_no_bit(data, tmp_path, layout):
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["--no-master", "--steps", 30, *layout]
    started = train(data, one, *common).stdout
    assert "no master weights: the optimizer rounds stochastically" in started
    train(data, two, *common, "--stop-after", 13)
    train(data, two, *common, "--resume")
    assert same_checkpoints(one, two, 30)
    assert np.all(stored_weights(one, 30) & 0xffff == 0)  # numbers of bf16


def test_checkpoints_serve_runs_with_and_without_master_weights(data, tmp_path):
    """Master weights are rounded to nearest: the first loss after the change is that of the weights in bf16, which both
    runs have."""
    losses = {}
    for first, then in ([], ["--no-master"]), (["--no-master"], []):
        directory = tmp_path / f"run{len(first)}"
        train(data, directory, "--steps", 8, "--stop-after", 4, *first)
        halves = np.any(stored_weights(directory, 4) & 0xffff)
        assert halves == (not first)
        done = train(data, directory, "--steps", 8, "--resume", *then)
        assert f"no-master has changed from {str(bool(first)).lower()} to {str(bool(then)).lower()}" in done.stderr
        assert np.any(stored_weights(directory, 8) & 0xffff) == (not then)
        losses[len(first)] = [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()[1:]]
        straight = tmp_path / f"straight{len(first)}"
        train(data, straight, "--steps", 8, *first)
        step = [json.loads(line)["loss"] for line in (straight / "metrics.jsonl").read_text().splitlines()[1:]]
        assert losses[len(first)][:5] == step[:5]  # the forward pass of step 5 has the same weights
        assert losses[len(first)][7] == pytest.approx(step[7], abs=0.02)


@pytest.mark.parametrize("schedule, ranks", [("1f1b", 2), ("1f1b", 4), ("zb-h1", 4), ("helix", 2), ("helix", 4)])
def test_layouts_agree(data, tmp_path, schedule, ranks):
    """Both sides round by the same random numbers, so that a weight rounds to another bf16 only if its values before
    differ, and as often as they differ by a part of the distance between two bf16, which is 2^-8 to 2^-7 of it. Stages of
    whole layers differ by 1e-7 in one gradient here: no weight flips. Helix may run products of bf16 elsewhere: gradients
    differ by 2e-3, one weight in a hundred flips, and matrices are 1e-3 apart. Other random numbers on another rank would
    make that 4e-3."""
    done = train(data, tmp_path / "run", "--no-master", "--ranks", ranks, "--schedule", schedule, "--verify-layout")
    found = {name: float(weight) for name, weight in
             re.findall(r"^  (\S+) +gradient .*weight (\S+) \(at most", done.stdout, re.M)}
    assert len(found) == 2 + 12 * 4 + 2
    matrices = {name: error for name, error in found.items() if re.search(r"w[tp]e|attn.*weight|mlp.*weight", name)}
    print(f"worst {max(found.values()):.1e}, of matrices {max(matrices.values()):.1e}; bounds 1e-02, 2e-03")
    assert max(found.values()) <= 1e-2 and max(matrices.values()) <= 2e-3


def test_reaches_the_loss_of_master_weights(data, tmp_path):
    """With a learning rate at which rounding to nearest would lose most updates: it moves a weight of 0.02 by 2e-5 at
    most, where two bf16 are 1.2e-4 apart."""
    common = ["--steps", 300, "--lr", 2e-4, "--lr-schedule", "constant", "--init-from"]
    train(data, tmp_path / "begin", "--steps", 20)
    begin = tmp_path / "begin/checkpoints/step-00000020"
    results = {}
    for name, flags in ("master", []), ("none", ["--no-master"]):
        train(data, tmp_path / name, *common, begin, *flags)
        results[name] = last_loss(tmp_path / name)
    print(f"validation loss {last_loss(tmp_path / 'begin'):.4f}, then {results}")
    assert results["master"] < last_loss(tmp_path / "begin") - 0.2
    assert abs(results["none"] - results["master"]) < 0.01


@pytest.mark.parametrize("command", ["train", "plan", "rehearse"])
def test_other_precisions_refuse_it(command):
    words = ["--no-master true", "fp32", "make PRECISION=bf16"]
    done = program.run(command, "--model", "tiny", "--no-master", *(["--dry-run"] if command == "train" else []), check=2)
    assert all(word in done.stderr for word in words), done.stderr


def test_plans_for_clusters_have_their_precision(tmp_path):
    """A program in fp32 plans for a cluster that trains in bf16."""
    def planned(*more, **options):
        return program.run("plan", "--cluster", "h20x64", "--model", "helixpipe:1.3b", "--chunks", 8, "--schedule", "1f1b",
                           "--json", *more, **options)

    with_master, without = (json.loads(planned("--schedule", "auto", *more).stdout)["plans"] for more in ([], ["--no-master"]))
    for one in with_master:
        other = next(plan for plan in without if plan["schedule"] == one["schedule"])
        if one["recompute"] != other["recompute"] or not one["fits"]:
            continue
        assert other["bytes"]["model"] * 18 == pytest.approx(one["bytes"]["model"] * 14, rel=1e-6)  # 2 + 4 + 3 x 4 bytes
        assert other["update_ms"] < one["update_ms"]
    fp32 = tmp_path / "fp32.toml"
    fp32.write_text((ROOT / "dev/clusters/h20x64.toml").read_text().replace('precision = "bf16"', 'precision = "fp32"'))
    assert 'precision = "fp32"' in fp32.read_text()
    done = program.run("plan", "--cluster", fp32, "--model", "helixpipe:1.3b", "--chunks", 8, "--no-master", check=2)
    assert "--no-master: the cluster fp32 trains in fp32" in done.stderr
