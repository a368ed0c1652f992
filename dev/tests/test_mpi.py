"""Ranks as processes under mpirun: the transport, and the one line that tells why a run has ended when a rank dies, is
stopped, hangs or throws."""
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "build/tests/mpi_check"
# Built for GPUs, played by the host under sanitizers: messages pass through the host's memory. Stacks of allocations
# have to reach beyond MPI's plug-ins, which are no longer loaded when leaks are looked for, to MPI itself.
ON_HOST = {"LSAN_OPTIONS": f"suppressions={ROOT}/dev/tests/mpi_leaks.txt:print_suppressions=0",
           "ASAN_OPTIONS": "fast_unwind_on_malloc=0"}

pytestmark = pytest.mark.skipif(not (shutil.which("mpirun") and PROGRAM.exists()), reason="needs MPI (openmpi-bin)")


def start(ranks, *arguments, **environment):
    return subprocess.Popen([ROOT / "scripts/run_mpi.sh", str(ranks), *map(str, arguments)], text=True,
                            env=os.environ | {"PROGRAM": str(PROGRAM)} | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process, within=60):
    try:
        out, err = process.communicate(timeout=within)
    finally:
        process.kill()
    return process.returncode, out, err


def pids(process, ranks):
    """By rank, as the ring prints them."""
    found = {}
    while len(found) < ranks:
        line = process.stderr.readline()
        assert line, "ended early"
        if match := re.fullmatch(r"rank (\d+) pid (\d+)\n", line):
            found[int(match[1])] = int(match[2])
    return found


def causes(err):
    return [line for line in err.splitlines() if line.startswith("train_gpt: ")]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_exchange(ranks):
    code, out, err = end(start(ranks, "exchange"))
    assert code == 0 and "exchange: all as promised" in out, err


@pytest.mark.parametrize("ranks", [2, 3])
def test_exchange_between_gpus(ranks):
    code, out, err = end(start(ranks, "exchange", PROGRAM=f"{PROGRAM}_on_host", **ON_HOST))
    assert code == 0 and "exchange: all as promised" in out, err


@pytest.mark.parametrize("program", ["mpi_check", "mpi_check_on_host"])
@pytest.mark.parametrize("mode, message", [("short", "a receive of 50 bytes, which is too short"),
                                           ("long", "a message of 50 bytes meets a receive of 100")])
def test_sizes_that_differ(program, mode, message):
    no_end_of_mpi = {"ASAN_OPTIONS": "detect_leaks=0"}  # which still holds its memory, and what it was given
    code, _, err = end(start(2, mode, PROGRAM=str(ROOT / "build/tests" / program), **no_end_of_mpi))
    assert code == 70 and message in err and not causes(err), err


@pytest.mark.parametrize("ranks, program", [(2, "mpi_layouts"), (3, "mpi_layouts"), (4, "mpi_layouts"),
                                            (8, "mpi_layouts"), (2, "mpi_layouts_on_host"), (3, "mpi_layouts_on_host")])
def test_layouts_of_all_axes(ranks, program):
    code, out, err = end(start(ranks, PROGRAM=str(ROOT / "build/tests" / program), **ON_HOST), within=300)
    print(out)
    assert code == 0 and re.search(r"^[1-9]\d* passed, 0 failed$", out, re.M), out + err


def test_launchers_that_disagree():
    code, _, err = end(start(2, "exchange", RANK="0", WORLD_SIZE="3"))
    assert code == 2 and "Open MPI says rank 1 of 2" in err and "torchrun says rank 0 of 3" in err, err
    alone = subprocess.run([PROGRAM, "exchange"], env=os.environ | {"RANK": "1", "WORLD_SIZE": "4"}, capture_output=True,
                           text=True, timeout=60)
    assert alone.returncode == 2, alone.stderr
    assert "torchrun says that this is rank 1 of 4, MPI says rank 0 of 1" in alone.stderr


def test_a_clean_end_is_silent():
    code, _, err = end(start(4, "end"))
    assert code == 0 and not causes(err), err


LAST_SEEN = r"last seen (in attention layer 3 chunk \d+|waiting for Y layer 3 chunk \d+ from rank \d)"


def who_waits(victim, ranks):
    return rf"(rank {(victim + 1) % ranks} waits for Y layer 3 chunk \d+ from rank {victim}|no rank waits for it yet)"


@pytest.mark.parametrize("victim", range(4))
def test_killed(victim):
    ring = start(4, "ring")
    os.kill(pids(ring, 4)[victim], signal.SIGKILL)
    code, _, err = end(ring, within=10)
    (cause,) = causes(err)
    assert re.fullmatch(rf"train_gpt: rank {victim} has died, {LAST_SEEN}; {who_waits(victim, 4)}", cause), cause
    assert code == 137


def test_stopped_and_hung():
    """Side by side, since each takes the ten seconds of the shortest limit."""
    rings = {victim: start(3, "ring") for victim in range(3)}
    hung = start(3, "hang", 2)
    for victim, ring in rings.items():
        os.kill(pids(ring, 3)[victim], signal.SIGSTOP)
    for victim, ring in rings.items():
        code, _, err = end(ring, within=20)
        (cause,) = causes(err)
        assert re.fullmatch(rf"train_gpt: rank {victim} has not answered for 1\d s, {LAST_SEEN}; {who_waits(victim, 3)}", cause), cause
        assert code == 20, err
    code, _, err = end(hung, within=20)
    (cause,) = causes(err)
    assert re.fullmatch(r"train_gpt: rank 2 has been in attention layer 3 chunk 2 for \d+ s \(limit \d+ s\); "
                        r"rank 0 waits for Y layer 3 chunk 2 from rank 2", cause), cause
    assert code == 20, err


def test_throw():
    code, _, err = end(start(4, "throw", 2))
    assert "mpi_check: rank 2 throws" in err and not causes(err) and code == 17, err


@pytest.mark.parametrize("saving", [0, 5])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_ranks_and_not_the_threads_of_mpi(sent, saving):
    """And mpirun, which kills a second after a SIGTERM of its own, leaves them the time to save."""
    job = start(3, "signal", saving)
    while job.stderr.readline() not in ("ready\n", ""):
        pass
    job.send_signal(sent)
    code, _, err = end(job)
    assert code == 75 and not causes(err), err


def test_job_killed_as_a_whole_blames_nobody():
    ring = start(4, "ring")
    for pid in pids(ring, 4).values():
        os.kill(pid, signal.SIGTERM)
    code, _, err = end(ring)
    assert code != 0 and not causes(err), err
