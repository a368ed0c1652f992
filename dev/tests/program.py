"""Runs train_gpt from outside."""
import subprocess
from pathlib import Path

TRAIN_GPT = Path(__file__).resolve().parents[2] / "train_gpt"


def run(*arguments, check=0, program=TRAIN_GPT, **options):
    """`check` is the exit code that is expected, None for any."""
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, errors="replace", timeout=600,
                          **options)
    assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr}"
    return done
