"""Every kernel on every device that needs no GPU: the CPU in fp32 and bf16, and CUDA kernels on the host (cuda_on_host)
under sanitizers with threads in several orders, against the CPU in fp64. And the mistakes that such a run must find."""
import os
import re
import subprocess
from pathlib import Path

import pytest

BUILT = Path(__file__).resolve().parents[2] / "build/tests"
ORDERS = ["ascending", "descending", "random:1", "random:2", "random:3"]
FAULTS = {
    "threads_that_end_before_a_barrier": "64 ended .the first is 64., 64 wait at __syncthreads",
    "threads_at_different_barriers": "divergent barrier: .* others of its block wait at __syncthreads",
    "lanes_that_miss_a_shuffle": "20 wait at __shfl_xor_sync",
    "lanes_at_different_instructions": "divergent warp: .* is at __(syncwarp|shfl_xor_sync)",
    "mask_of_some_lanes": "a mask that leaves lanes out in __shfl_xor_sync",
    "half_a_warp": "48 threads a block",
    "write_beyond_shared_memory": "heap-buffer-overflow",
    "write_beyond_device_memory": "heap-buffer-overflow",
    "access_that_is_not_aligned": "misaligned address",
    "shared_memory_never_written": "an output is -?nan",
    "output_never_written": "an output is -?nan",
    "barrier_left_out": "an output is -?nan",
    "warp_barrier_left_out": "an output is -?nan",
    "copy_not_waited_for": "an output is -?nan",
    "host_reads_device_memory": "use-after-poison",
    "host_writes_device_memory": "use-after-poison",
}


def run(program, *arguments, order="ascending"):
    environment = os.environ | {"CUDA_ON_HOST_ORDER": order}
    return subprocess.run([BUILT / program, *arguments], env=environment, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "reference"
    done = run("kernel_cases_cpu-fp64", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("device, order",
                         [(device, "") for device in ("cpu-fp32", "cpu-bf16")] +
                         [(f"cuda-on-host-{precision}", order) for precision in ("fp32", "bf16") for order in ORDERS])
def test_kernels(reference, tmp_path, device, order):
    done = run(f"kernel_cases_{device}", tmp_path / "outputs", order=order or "ascending")
    assert done.returncode == 0, done.stderr
    compared = run("kernel_cases_cpu-fp64", "compare", reference, tmp_path / "outputs")
    print(compared.stdout)
    assert compared.returncode == 0, compared.stdout
    assert re.search(r"^[1-9]\d* passed, 0 failed$", compared.stdout, re.M)


def test_comparison_can_fail(reference, tmp_path):
    """A changed number, a NaN, a missing record, a cut file."""
    outputs = reference.read_bytes()
    begin = outputs.index(b"\n", outputs.index(b"add_rows")) + 1  # of the first record's numbers
    changed = {"number": outputs[:begin] + b"\x42" * 8 + outputs[begin + 8:],
               "NaN": outputs[:begin] + b"\xff" * 8 + outputs[begin + 8:],
               "missing": outputs.replace(b"add_rows", b"mul_rows", 1),
               "cut": outputs[:-8]}
    for what, content in changed.items():
        (tmp_path / what).write_bytes(content)
        assert run("kernel_cases_cpu-fp64", "compare", reference, tmp_path / what).returncode != 0, what
    assert run("kernel_cases_cpu-fp64", "compare", reference, reference).returncode == 0


@pytest.mark.parametrize("order", ORDERS[:3])
@pytest.mark.parametrize("name", ["none", "right_product"])
def test_correct_kernels_pass(name, order):
    done = run("cuda_on_host_faults", name, order=order)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ORDERS[:3])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name, order):
    done = run("cuda_on_host_faults", name, order=order)
    assert done.returncode != 0
    assert re.search(FAULTS[name], done.stderr), done.stderr


def test_unknown_order_is_refused():
    done = run("cuda_on_host_faults", "none", order="random")
    assert done.returncode != 0
    assert "must be ascending, descending or random:SEED" in done.stderr
