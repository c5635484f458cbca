"""What the tests of several teachers share: three that differ in all they may, and the textbook's mixtures."""

from dataclasses import replace

import torch
from textbook import CASES, Side, divergence, make_sides
from torch import Tensor

from trl_opd import fused_linear_divergence
from trl_opd.kernels import FusedDivergence

FP32, FP64 = torch.float32, torch.float64
N, V, T = 7, 37, 0.8
WEIGHTS = [0.2, 0.5, 0.3]
MIXTURES = ("arithmetic", "geometric", "loss_sum")
TOKEN_WEIGHTS = torch.linspace(0, 2, N, dtype=FP64)  # the first row is left out
TARGETS = torch.arange(N) * 4


def make_teachers(student: tuple[float, float | None] = (1.2, 5.0)) -> tuple[Side, list[Side]]:
    """A student, and three teachers of other hidden sizes, scales, softcaps and numbers of padding rows."""
    first, second = make_sides(N, V, (6, 9), seed=0)
    third = make_sides(N, V + 3, (6, 5), seed=1)[1]
    fourth = make_sides(N, V + 1, (6, 7), seed=2)[1]
    first = replace(first, scale=student[0], softcap=student[1])
    return first, [replace(second, scale=1.3), replace(third, softcap=4.0), replace(fourth, bias=None)]


def arguments_of(student: Side, teachers: list[Side]) -> dict:
    """The sides as arguments of `fused_linear_divergence`."""
    return {
        "student_hidden": student.hidden,
        "student_weight": student.weight,
        "student_bias": student.bias,
        "student_logit_scale": student.scale,
        "student_softcap": student.softcap,
        "teacher_hidden": [t.hidden for t in teachers],
        "teacher_weight": [t.weight for t in teachers],
        "teacher_bias": [t.bias for t in teachers],
        "teacher_logit_scale": [t.scale for t in teachers],
        "teacher_softcap": [t.softcap for t in teachers],
    }


def ask(
    student: Side, teachers: list[Side], mixture: str, name: str = "reverse_kl", dtype: torch.dtype = FP64, **told
) -> tuple[FusedDivergence, list[Tensor]]:
    """The op's answer, and the gradient of its loss."""
    student, teachers = student.to(dtype, grad=True), [t.to(dtype) for t in teachers]
    told = {"divergence": name, "divergence_kwargs": CASES[name][1], "temperature": T, "mixture": mixture} | told
    out = fused_linear_divergence(**arguments_of(student, teachers) | told)
    return out, list(torch.autograd.grad(out.loss, student.leaves, retain_graph=True))


def probs_of(teachers: list[Side]) -> list[Tensor]:
    """Each one's probabilities of the shared entries, `(N, V)` in float64."""
    return [t.logits(T)[:, :V].softmax(-1) for t in teachers]


def mixed(probs: list[Tensor], weights: list, mixture: str) -> Tensor:
    """The teacher that a mixture of distributions is; weights are numbers or `(N, 1)`."""
    if mixture == "arithmetic":
        return sum(w * p for w, p in zip(weights, probs, strict=True))
    product = torch.stack([p**w for w, p in zip(weights, probs, strict=True)]).prod(0)
    return product / product.sum(-1, keepdim=True)


def value_of(name: str, s: Tensor, probs: list[Tensor], weights: list, mixture: str) -> Tensor:
    """The divergence of each token, `(N,)`."""
    if mixture == "loss_sum":
        flat = [w.squeeze(-1) if isinstance(w, Tensor) else w for w in weights]
        return sum(w * divergence(name, s, p) for w, p in zip(flat, probs, strict=True))
    return divergence(name, s, mixed(probs, weights, mixture))


def truth(
    student: Side, teachers: list[Side], mixture: str, name: str = "reverse_kl", weights: list | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Values and the gradient of their weighted sum, by autograd through dense float64 probabilities."""
    student = student.to(FP64, grad=True)
    s = student.logits(T)[:, :V].softmax(-1)
    value = value_of(name, s, probs_of(teachers), weights or WEIGHTS, mixture)
    return value.detach(), list(torch.autograd.grad((value * TOKEN_WEIGHTS).sum(), student.leaves))
