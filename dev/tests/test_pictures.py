"""The pictures and the output in the document about pipelines are what the program draws and prints today."""
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = ROOT / "llmc/pipeline"


def test_pictures_are_current(tmp_path):
    subprocess.run([ROOT / "scripts/draw_schedules.sh", tmp_path], check=True, timeout=60)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in (PIPELINE / "pictures").iterdir()}
    assert drawn.keys() == kept.keys()
    assert [name for name in drawn if drawn[name] != kept[name]] == [], "scripts/draw_schedules.sh makes them anew"


def test_pictures_are_shown_and_well_formed():
    shown = re.findall(r"\]\((pictures/[\w.-]+)\)", (PIPELINE / "README.md").read_text())
    assert sorted(shown) == sorted(f"pictures/{path.name}" for path in (PIPELINE / "pictures").iterdir())
    for name in shown:
        assert ElementTree.parse(PIPELINE / name).getroot().tag.endswith("svg")


def test_printed_output_is_current():
    """In what is shown, a line of dots stands for any lines, dots within a line for any text."""
    blocks = re.findall(r"^```\n\$ \./(train_gpt .*)\n((?:.*\n)+?)```", (PIPELINE / "README.md").read_text(), re.MULTILINE)
    assert len(blocks) == 3
    for command, shown in blocks:
        printed = subprocess.run([ROOT / "train_gpt", *command.split()[1:]], capture_output=True, text=True, timeout=60).stdout
        pattern = "".join(r"(?:.*\n)*" if line.strip() == "..." else ".*".join(map(re.escape, line.split("..."))) + "\n"
                          for line in shown.splitlines())
        assert re.search("^" + pattern, printed, re.MULTILINE), f"{command} prints\n{printed}"
