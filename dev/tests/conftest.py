"""What the black-box tests share."""
from pathlib import Path

import pytest

from program import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Token files of the project's own sources."""
    directory = tmp_path_factory.mktemp("tokens")
    run("tokenize", ROOT / "llmc", "--output", directory, "--holdout-every", 5)
    return directory
