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
QUICK = ["reverse_kl, everything", "generalized_jsd, per token", "sparse, per token"]  # each kernel, each pass


def compile_all(cache: Path, capability: int, calls: list[str]) -> dict[str, list[dict]]:
    """By call: what is known of each kernel that the call launches; of all calls, if none is named."""
    if not has_nvidia():
        pytest.skip("this triton has no NVIDIA backend")
    names = environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache))
    command = [sys.executable, str(SCRIPT), str(capability), *calls]
    done = subprocess.run(command, env=names, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list[dict]]:
    return compile_all(tmp_path_factory.mktemp("triton"), 90, [])


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


def test_a_few_of_them(tmp_path):
    calls = compile_all(tmp_path, 90, QUICK)
    for kernels in calls.values():
        check(kernels)
    launched = {kernel["kernel"] for kernels in calls.values() for kernel in kernels}
    assert launched == {"dense_kernel", "partial_kernel", "softmax_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("name", served("triton"))
def test_every_divergence(compiled, name):
    (kernel,) = compiled[name]
    check([kernel])
    assert kernel["kernel"] == "dense_kernel"


@pytest.mark.slow
def test_every_way_of_launching_them(compiled):
    others = {name: kernels for name, kernels in compiled.items() if name not in served("triton")}
    assert len(others) >= 20
    for name, kernels in others.items():
        print(name)
        check(kernels)


@pytest.mark.slow
def test_on_ampere(tmp_path):
    for kernels in compile_all(tmp_path, 80, AMPERE).values():
        check(kernels)
