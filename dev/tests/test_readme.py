"""Every command of README.md, in its order, in a copy of the tree; `make run` with few steps. Left out: `make test`,
which is what runs this. And the maps: every file has a line, includes go one way."""
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def documented_commands(text):
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line and line != "make test"]


COMMANDS = documented_commands((ROOT / "README.md").read_text())


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What a user has after cloning, with the program already built."""
    copy = tmp_path_factory.mktemp("helixtrain")
    shutil.copytree(ROOT, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build", "runs", ".git", "venv"))
    shutil.copytree(ROOT / "build/cpu-fp32", copy / "build/cpu-fp32")
    return copy


def test_readme_lists_its_two_commands_first():
    assert COMMANDS[0] == "make run" and "\nmake test\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_command(tree, command):
    done = subprocess.run(command, shell=True, cwd=tree, capture_output=True, text=True, timeout=900,
                          env={**os.environ, "STEPS": "24"})
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_headings_are_unique():
    headings = re.findall(r"^#+ (.*)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(set(headings))


def test_every_file_of_llmc_is_on_the_map():
    text = (ROOT / "llmc/README.md").read_text()
    named = set(re.findall(r"`([\w/]+\.(?:h|cuh))`", text))
    files = {path.name for path in (ROOT / "llmc").rglob("*") if path.suffix in (".h", ".cuh")}
    assert {Path(name).name for name in named} == files


def test_includes_go_one_way():
    """As llmc/README.md says: to a room itself, to those after it in the sentence, to the files beside them."""
    sentence = re.search(r"`train_gpt\.cu`(?:\s→\s`\w+`)+", (ROOT / "llmc/README.md").read_text())[0]
    rooms = [f"llmc/{name}" for name in re.findall(r"→\s`(\w+)`", sentence)] + ["llmc"]
    assert sorted(rooms) == sorted({"llmc", *(str(path.relative_to(ROOT)) for path in (ROOT / "llmc").iterdir()
                                              if path.is_dir())})

    def place(path):
        return next(i for i, room in enumerate(rooms) if path.startswith(room + "/"))

    backwards = [f"{path.relative_to(ROOT)} includes {included}" for path in (ROOT / "llmc").rglob("*")
                 if path.suffix in (".h", ".cuh", ".cpp")
                 for included in re.findall(r'#include "([^"]+)"', path.read_text())
                 if place(included) < place(str(path.relative_to(ROOT)))]
    assert not backwards


def test_every_program_and_header_of_dev_is_on_the_map():
    """A row names files of the directory in the heading above it."""
    named, directory = [], None
    for line in (ROOT / "dev/README.md").read_text().splitlines():
        if heading := re.match(r"### `([\w/.]+)/`", line):
            directory = ROOT / "dev" / heading[1]
        elif row := re.match(r"\| (`.*?`) \| ", line):
            named += [directory / name for name in re.findall(r"`(.*?)`", row[1])]
    files = [path for path in (ROOT / "dev").rglob("*")
             if path.suffix in (".cpp", ".cu", ".h", ".py", ".sh") or path.is_file() and os.access(path, os.X_OK)]
    assert sorted(named) == sorted(files)
