"""dev/plot.py draws what metrics.jsonl holds, and says what it cannot read."""
import json
import pathlib
import struct
import subprocess
import sys

import matplotlib.image
import pytest

PLOT = pathlib.Path(__file__).parents[1] / "plot.py"


def plot(*args):
    return subprocess.run([sys.executable, PLOT, *map(str, args)], capture_output=True, text=True)


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    records = [{"step": 0, "val_loss": 5.5}]
    records += [{"step": step, "loss": 5 / step, "lr": 1e-3} for step in range(1, 40)]
    records += [{"step": 40, "loss": None, "val_loss": 1.0}]  # null: not finite
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def test_draws_a_png_with_curves(run, tmp_path):
    output = tmp_path / "loss.png"
    result = plot(run, "--output", output)
    assert result.returncode == 0, result.stderr
    data = output.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1080, 600)
    pixels = matplotlib.image.imread(output)[:, :, :3]
    blue = abs(pixels - [31 / 255, 119 / 255, 180 / 255]).max(axis=2) < 0.02  # matplotlib's first colour
    assert blue.sum() > 500


def test_several_runs_and_a_torn_line(run, tmp_path):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step":41,"lo')
    result = plot(run, run / "metrics.jsonl", "--output", tmp_path / "two.png", "--smoothing", "0")
    assert result.returncode == 0, result.stderr
    assert "metrics.jsonl:42 is not JSON" in result.stderr
    assert (tmp_path / "two.png").exists()


def test_errors_are_sentences(tmp_path):
    missing = plot(tmp_path / "nothing", "--output", tmp_path / "x.png")
    assert missing.returncode == 1 and "No such file" in missing.stderr and "Traceback" not in missing.stderr
    (tmp_path / "metrics.jsonl").write_text('{"step":1}\n')
    empty = plot(tmp_path, "--output", tmp_path / "x.png")
    assert empty.returncode == 1 and "no loss to draw" in empty.stderr
    assert plot(tmp_path, "--smoothing", "2").returncode == 2


def plans(path, context, speeds, cluster="four"):
    rows = [{"schedule": name, "fits": fits, "tokens_per_second": speed} for name, fits, speed in speeds]
    path.write_text(json.dumps({"cluster": cluster, "ranks": 4, "layers": 8, "chunks": 8, "context": context, "plans": rows}))
    return path


def test_plans_are_drawn_over_the_length_of_sequences(tmp_path):
    short = plans(tmp_path / "a.json", 1024, [("helix, folds 2", True, 90), ("helix, folds 1", True, 80), ("1f1b", True, 70)])
    long = plans(tmp_path / "b.json", 4096, [("helix, folds 2", True, 50), ("1f1b", False, 40)])
    result = plot(long, short, "--plans", "context", "--output", tmp_path / "plans.png")
    assert result.returncode == 0, result.stderr
    pixels = matplotlib.image.imread(tmp_path / "plans.png")[:, :, :3]
    blue = abs(pixels - [31 / 255, 119 / 255, 180 / 255]).max(axis=2) < 0.02  # the first curve: the fastest schedule
    assert blue.sum() > 500
    for wrong in (plans(tmp_path / "c.json", 2048, [], cluster="other"), tmp_path / "d.json"):
        (tmp_path / "d.json").write_text('{"plans": []}')
        refused = plot(short, wrong, "--plans", "context", "--output", tmp_path / "x.png")
        assert refused.returncode == 1 and "plot.py: " in refused.stderr and "Traceback" not in refused.stderr


def test_the_picture_of_planned_speed_is_drawn_by_its_script(tmp_path):
    root = PLOT.parents[1]
    subprocess.run([root / "scripts/draw_plans.sh", tmp_path / "plans.png"], check=True, capture_output=True)
    drawn, shown = (matplotlib.image.imread(path) for path in (tmp_path / "plans.png", root / "dev/clusters/7b-h20x64.png"))
    assert drawn.shape == shown.shape
    different = (abs(drawn - shown).max(axis=2) > 0.1).mean()  # fonts and versions of matplotlib may move a few pixels
    print(f"{100 * different:.2f} % of pixels differ, bound 3 %")
    assert different <= 0.03
