"""When the Triton backend is refused, with what words, and the package without its files."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import FP32, environment, needs_triton
from textbook import fused_arguments, make_sides

import trl_opd
from trl_opd import fused_linear_divergence

PACKAGE = Path(trl_opd.__file__).parent


def run(code: str, path: Path = PACKAGE.parent, **names: str) -> str:
    """The last line that a process of its own prints."""
    names = environment(CUDA_VISIBLE_DEVICES="", **names) | {"PYTHONPATH": str(path)}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=names, cwd=path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


CALL = """
import torch
from trl_opd import fused_linear_divergence
torch.manual_seed(0)
h, w, t = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9, 4)
def call(**kwargs):
    return fused_linear_divergence(h.requires_grad_(), w, h.detach(), t, **kwargs).loss
"""
REFUSED = CALL + "try: call(backend='triton')\nexcept ValueError as error: print(error)"


@needs_triton
def test_a_cpu_is_refused_unless_the_kernels_are_interpreted():
    message = run(REFUSED, TRITON_INTERPRET="0")
    assert message.startswith("backend='triton' cannot be used: it needs a CUDA device, and these tensors are on cpu")
    assert "TRITON_INTERPRET=1" in message and message.endswith("Use backend='auto' or 'torch'.")
    assert float(run(CALL + "print(call(backend='triton').item())", TRITON_INTERPRET="1")) > 0


@needs_triton
def test_auto_is_torch_on_a_cpu_and_imports_no_triton():
    code = CALL + "import sys; call(backend='auto').backward(); print('triton' in sys.modules)"
    assert run(code, TRITON_INTERPRET="1") == "False"


@needs_triton
@pytest.mark.parametrize("per_token_grad", [False, True])
def test_float64_is_refused(per_token_grad):
    arguments = fused_arguments(*make_sides())
    with pytest.raises(ValueError, match=r"'triton' cannot be used: its logits are float32, .* torch\.float64\. Use"):
        fused_linear_divergence(**arguments, backend="triton", per_token_grad=per_token_grad)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FP32])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels are not interpreted, and want tensors on it")
def test_half_operands_are_served(dtype):
    student, teacher = (side.to(dtype, grad=True) for side in make_sides(3, 9))
    out = fused_linear_divergence(**fused_arguments(student, teacher), backend="triton")
    out.loss.backward()
    assert out.divergence.dtype == FP32 and student.weight.grad.dtype == dtype


def copied_package(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "trl_opd", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "trl_opd" / "kernels"


EVERYTHING = """
import trl_opd
from trl_opd.losses import DIVERGENCES
ids = torch.tensor([[0, 1], [2, -1], [3, 4]])
for backend in ("auto", "torch"):
    for name in DIVERGENCES:
        for kwargs in ({}, {"per_token_grad": True}, {"support": "union_top_k", "support_size": 2}):
            own = {"divergence_kwargs": {"todi": 0.5, "reverse_kl": None}} if name == "convex_mix" else {}
            call(backend=backend, divergence=name, **own, **kwargs).backward()
    fused_linear_divergence(h, w, teacher_topk=(ids, torch.full((3, 2), -1.0)), backend=backend).loss.backward()
try: call(backend="triton")
except ValueError as error: print(trl_opd.__file__, error)
"""


def test_without_the_triton_files_everything_else_works(tmp_path):
    kernels = copied_package(tmp_path)
    files = list(kernels.glob("triton*.py"))
    assert len(files) >= 3
    for file in files:
        file.unlink()
    message = run(CALL + EVERYTHING, tmp_path)
    assert message.startswith(str(tmp_path))
    assert "backend='triton' cannot be used: it cannot be imported (" in message
    assert message.endswith("Use backend='auto' or 'torch'.")


def test_without_triton_itself_everything_else_works(tmp_path):
    """As on systems that it has no wheel for."""
    copied_package(tmp_path)
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')\n")
    message = run(CALL + EVERYTHING, tmp_path)
    assert message.startswith(str(tmp_path))
    assert "it cannot be imported (no triton here). Use backend='auto' or 'torch'." in message
