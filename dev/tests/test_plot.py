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
