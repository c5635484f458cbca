"""
What the tests of the backends share: a call of one of them beside dense float64 autograd (textbook.py).

Rows are short and blocks of the Triton kernels shorter, so that a row still spans several.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from textbook import CASES, Side, divergence, fused_arguments, make_sides
from torch import Tensor

import trl_opd
from trl_opd import fused_linear_divergence
from trl_opd.kernels import FusedDivergence
from trl_opd.kernels.rows import TORCH_ONLY

try:
    from trl_opd.kernels import triton_backend
except ImportError:  # no wheel for this system
    triton_backend = None

FP32, FP64 = torch.float32, torch.float64
BLOCK = 16
V = 37  # two blocks and a part of one
STATISTICS = (
    "forward_kl",
    "reverse_kl",
    "student_entropy",
    "teacher_entropy",
    "student_logprobs",
    "teacher_logprobs",
    "overlap",
    "student_logsumexp",
    "teacher_logsumexp",
    "overlap_advantage",
)

needs_triton = pytest.mark.skipif(triton_backend is None, reason="no triton for this system")
TRITON = pytest.param("triton", FP32, marks=needs_triton, id="triton")
SINGLE = [pytest.param("torch", FP32, id="torch-fp32"), TRITON]
BACKENDS = [pytest.param("torch", FP64, id="torch-fp64"), *SINGLE]


def device_of(backend: str) -> str:
    """The Triton kernels are interpreted where there is no CUDA device."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def served(backend: str) -> list[str]:
    """The divergences over the full vocabulary that a backend has."""
    return [name for name in CASES if backend != "triton" or name not in TORCH_ONLY]


def represented(sides: list[Side], dtype: torch.dtype) -> list[Side]:
    """The numbers that `dtype` has, in float64: what is left to err is the arithmetic."""
    return [side.to(dtype).to(FP64, grad=i == 0) for i, side in enumerate(sides)]


def environment(**names: str) -> dict[str, str]:
    """Of a process of its own that imports the same package."""
    return {**os.environ, "PYTHONPATH": str(Path(trl_opd.__file__).parents[1]), **names}


@dataclass
class Answer:
    """What a backend gave, in float64 on the CPU."""

    out: FusedDivergence
    loss: Tensor
    gradients: list[Tensor]

    def __getattr__(self, name: str) -> Tensor | None:
        value = getattr(self.out, name)
        return None if value is None else value.detach().cpu().double()


def ask(backend, dtype, student, teacher, name="reverse_kl", loss=None, frozen=False, **kwargs) -> Answer:
    """The op on copies of the two sides (no dense teacher if `None`), and the gradient of `loss(result)`."""
    if teacher is not None and kwargs.get("support", "full") == "full" and name not in served(backend):
        pytest.skip(f"{backend} has no {name} over the full vocabulary")
    device = device_of(backend)

    def there(x):
        if isinstance(x, tuple):
            return tuple(there(y) for y in x)
        if not isinstance(x, Tensor):
            return x
        return x.detach().to(device, dtype if x.dtype.is_floating_point else x.dtype)

    arguments = fused_arguments(student, student if teacher is None else teacher)
    if teacher is None:
        arguments = {key: x for key, x in arguments.items() if not key.startswith("teacher")}
    arguments = {key: there(x) for key, x in (arguments | kwargs).items()}
    leaves = [arguments["student_hidden"].requires_grad_()]
    if not frozen:
        leaves += [x.requires_grad_() for k in ("student_weight", "student_bias") if (x := arguments[k]) is not None]
    kind = {"divergence": name, "divergence_kwargs": CASES[name][1]} | (
        {key: kwargs[key] for key in ("divergence_kwargs",) if key in kwargs}
    )
    out = fused_linear_divergence(**arguments | kind, backend=backend)
    value = out.loss if loss is None else loss(out)
    gradients = torch.autograd.grad(value, leaves)
    assert all(g.dtype == dtype and g.device.type == device for g in gradients)
    return Answer(out, value.detach().cpu().double(), [g.cpu().double() for g in gradients])


def truth_of(student: Side, teacher: Side, name: str, temperature: float = 1.0, weights=None, frozen=False):
    """Value and gradients by autograd through dense float64 probabilities."""
    value = divergence(name, student.probs(temperature), teacher.probs(temperature))
    leaves = student.leaves[:1] if frozen else student.leaves
    weighted = value if weights is None else value * weights
    return value.detach(), torch.autograd.grad(weighted.sum(), leaves)


def assert_gradients(ours, theirs, dtype, bound=3e-6) -> None:
    """Equal up to `bound` of the whole tensor in float32, entry by entry in float64."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if dtype == FP64:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        else:
            assert torch.isfinite(a).all()
            assert (a - b).norm() <= bound * b.norm() + 1e-10, float((a - b).norm() / b.norm())


def assert_values(ours, theirs, dtype) -> None:
    bounds = {"rtol": 1e-10, "atol": 1e-12} if dtype == FP64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(ours, theirs, **bounds)


def pair(N: int = 3, size: int = V, dtype: torch.dtype = FP32, bias: bool = True, seed: int = 0) -> list[Side]:
    return represented(make_sides(N, size, H=(5, 7), bias=bias, seed=seed), dtype)


def one_row(student_logits: Tensor, teacher_logits: Tensor) -> list[Side]:
    """Sides of one token that have exactly these logits `(V,)`, infinite ones too: a product with 1 rounds nothing."""
    one = torch.ones(1, 1, dtype=FP64)
    return [Side(one.clone(), x[:, None].to(FP64)) for x in (student_logits, teacher_logits)]


def rows_of(student_logits: Tensor, teacher_logits: Tensor) -> list[Side]:
    """Sides that have exactly these finite logits `(N, V)`."""
    eye = torch.eye(len(student_logits), dtype=FP64)
    return [Side(eye.clone(), x.to(FP64).T.contiguous()) for x in (student_logits, teacher_logits)]
