"""The Triton kernels compile for GPUs that need not be here, with the real launches' options, and spill nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from backends import environment, needs_triton, served

SCRIPT = Path(__file__).with_name("compiled_kernels.py")
AMPERE = ["generalized_jsd, everything", "sparse, per token"]


def has_nvidia() -> bool:
    from triton.backends import backends

    return "nvidia" in backends


pytestmark = needs_triton


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, dict[str, list[dict]]]:
    """By compute capability and call: what is known of each kernel that the call launches."""
    if not has_nvidia():
        pytest.skip("this triton has no NVIDIA backend")
    cache = tmp_path_factory.mktemp("triton")
    names = environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache))
    results = {}
    for capability, calls in ((90, []), (80, AMPERE)):
        command = [sys.executable, str(SCRIPT), str(capability), *calls]
        done = subprocess.run(command, env=names, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        results[capability] = json.loads(done.stdout.splitlines()[-1])
    return results


def check(kernels: list[dict]) -> None:
    assert kernels
    for kernel in kernels:
        assert "error" not in kernel, kernel["error"]
        # Two programs of 8 warps fit a multiprocessor's 65536 registers, and none keeps them in memory
        if "registers" in kernel:
            assert kernel["registers"] <= 128 and kernel["stack"] == kernel["local"] == 0, kernel
        # Rows are read 16 bytes at a time, though the vocabulary is of odd size
        assert kernel["wide loads"] >= 2, kernel
        assert kernel["f64"] == 0, kernel


@pytest.mark.parametrize("name", served("triton"))
def test_every_divergence(compiled, name):
    (kernel,) = compiled[90][name]
    check([kernel])
    assert kernel["kernel"] == "dense_kernel"


def test_every_way_of_launching_them(compiled):
    others = {name: kernels for name, kernels in compiled[90].items() if name not in served("triton")}
    assert len(others) >= 19
    launched = {kernel["kernel"] for kernels in others.values() for kernel in kernels if "error" not in kernel}
    for name, kernels in others.items():
        print(name)
        check(kernels)
    assert launched == {"dense_kernel", "partial_kernel", "softmax_kernel"}


@pytest.mark.parametrize("name", AMPERE)
def test_on_ampere(compiled, name):
    check(compiled[80][name])
