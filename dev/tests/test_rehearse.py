"""`train_gpt rehearse` from outside: the same ops and messages in the same order as the plan, never sooner than simulated;
JSON, traces, processes, refusals. How close it comes to the simulation is measured by dev/bench/rehearsal."""
import json
import re
import shutil

import pytest

from program import TRAIN_GPT, run

ROOT = TRAIN_GPT.parent
ROUNDING = 1e-3  # ms, of times that go through seconds since start-up


def flags(schedule, p, *more):
    name, _, folds = schedule.partition(" ")
    folds, _, pieces = folds.partition("/")
    return ["--model", "tiny", "--schedule", name, "--ranks", p, "--layers", 8, "--chunks", 6,
            *(["--folds", folds] if folds else []), *(["--row-pieces", pieces] if pieces else []), *more]


def call(command, *arguments, **options):
    return json.loads(run(command, *arguments, "--json", **options).stdout)


def name_of(op):
    return {key: value for key, value in op.items() if key not in ("start_ms", "end_ms")}


def check_against_plan(measured, planned):
    assert measured.keys() == planned.keys() | {"simulated_step_ms", "simulated_bubble", "all_step_ms"}
    for key in ("schedule", "ranks", "layers", "chunks", "peak_bytes"):
        assert measured[key] == planned[key]
    print(f"{measured['schedule']} p={measured['ranks']}: {measured['step_ms'] / measured['simulated_step_ms'] - 1:+.2%}")
    assert measured["step_ms"] >= measured["simulated_step_ms"] - ROUNDING
    assert min(measured["all_step_ms"]) >= measured["simulated_step_ms"] - ROUNDING
    assert measured["step_ms"] in measured["all_step_ms"]
    for ops, simulated in zip(measured["ops"], planned["ops"], strict=True):
        assert [name_of(op) for op in ops] == [name_of(op) for op in simulated]
        now = 0
        for op in ops:
            if op["kind"] == "compute":
                assert now <= op["start_ms"] <= op["end_ms"]
                now = op["end_ms"]
    sends, receives = ({(op["op"], op["pass"], op.get("layer"), op["chunk"], op.get("piece"), *sorted((rank, op["peer"]))): op
                        for rank, ops in enumerate(measured["ops"]) for op in ops if op["kind"] == kind}
                       for kind in ("send", "recv"))
    assert sends.keys() == receives.keys()
    assert all(receives[key]["end_ms"] >= send["start_ms"] for key, send in sends.items())


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "seq1f1b", "helix 1", "helix 2", "helix 1/3"])
def test_every_schedule(schedule, p):
    shape = flags(schedule, p, "--times", "1,2,1")
    measured, planned = call("rehearse", *shape, "--repeats", 3, "--time-scale", 0.5), call("plan", *shape)
    assert len(measured["all_step_ms"]) == 3
    assert measured["simulated_step_ms"] == pytest.approx(planned["step_ms"] / 2)
    assert measured["simulated_bubble"] == pytest.approx(planned["bubble"])
    check_against_plan(measured, planned)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "helix 1", "helix 1/4"])
def test_messages_take_the_time_of_the_links(schedule):
    shape = flags(schedule, 8, "--cluster", "h20x64")
    planned = call("plan", *shape)
    scale = 300 / planned["step_ms"]
    measured = call("rehearse", *shape, "--repeats", 1, "--time-scale", scale)
    assert measured["simulated_step_ms"] == pytest.approx(300)
    check_against_plan(measured, planned)
    for ops, simulated in zip(measured["ops"], planned["ops"], strict=True):
        for op, planned_op in zip(ops, simulated, strict=True):
            length = scale * (planned_op["end_ms"] - planned_op["start_ms"])
            if op["kind"] == "recv":
                assert length > 0 and op["end_ms"] - op["start_ms"] >= length - ROUNDING


def test_one_rank_and_the_table():
    text = run("rehearse", "--model", "tiny", "--chunks", 2, "--times", "0.2,0.3,0.1", "--repeats", 2).stdout
    assert "rehearsal of accumulate" in text and "a larger --time-scale helps" in text, text
    assert re.search(r"step +[\d.]+ ms measured, [\d.]+ ms simulated: \+", text), text


def test_trace(tmp_path):
    file = tmp_path / "trace.json"
    run("rehearse", *flags("helix 2", 4, "--times", "1,2,1", "--repeats", 1, "--trace", file))
    events = json.loads(file.read_text())["traceEvents"]
    assert {event["args"]["kind"] for event in events if event["ph"] == "X"} == {"compute", "send", "recv", "wait"}
    assert {event["pid"] for event in events} == {0, 1, 2, 3}
    assert "rehearsal of helix" in (tmp_path / "trace.json.svg").read_text()


@pytest.mark.skipif(not shutil.which("mpirun") or b"MPI_Init" not in TRAIN_GPT.read_bytes(),
                    reason="train_gpt was built without MPI, or there is no mpirun (openmpi-bin)")
@pytest.mark.parametrize("more", [["--times", "1,2,1"], ["--cluster", "h20x64", "--time-scale", 1000]])
def test_processes(more):
    shape = flags("1f1b", 4, *more)
    measured = call(4, "rehearse", *shape, "--repeats", 2, program=ROOT / "scripts/run_mpi.sh")
    planned = call("plan", *shape[:-2] if "--time-scale" in more else shape)
    check_against_plan(measured, planned)


@pytest.mark.parametrize("arguments, words", [
    (["--times", "1,2"], "--times 1,4,3"),
    (["--times", "1,4,3", "--cluster", "h20x64"], "use one of the two"),
    (["--cluster", "h20x46"], "h20x64"),
    (["--cluster", "h200x8", "--ranks", 4096], "h200x8 has 8 devices"),
    (["--time-scale", 0], "--time-scale"),
    (["--time-scale", "-1"], "--time-scale"),
    (["--repeats", 0], "--repeats"),
    (["--draw", "a.svg"], "other commands"),
    (["--schedule", "1f2b"], "use --schedule 1f1b"),
    (["--schedule", "auto", "--cluster", "h20x64"], "one schedule is rehearsed"),
    (["--chunks", 10**9], "a million"),
])
def test_refusals(arguments, words):
    assert words in run("rehearse", "--model", "tiny", "--ranks", 4, *arguments, check=2).stderr


def test_a_trace_that_cannot_be_written(tmp_path):
    done = run("rehearse", *flags("1f1b", 2, "--times", "0,1,0", "--repeats", 1), "--trace", tmp_path / "missing" / "a",
               check=21)
    assert "missing" in done.stderr
