"""Models that have exactly the logits of a test: products with 1 round nothing."""

import torch
from torch import Tensor

from trl_opd import fused_linear_divergence
from trl_opd.kernels import FusedDivergence

FP64 = torch.float64


def logits_of(seed: int, rows: int = 5, size: int = 7) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def on_logits(student: Tensor, *teachers: Tensor, **told) -> tuple[FusedDivergence, Tensor]:
    """The result, and the gradient in the student's logits themselves."""
    eye = torch.eye(len(student), dtype=FP64)
    weight = student.T.contiguous().requires_grad_()
    out = fused_linear_divergence(
        eye, weight, [eye] * len(teachers), [t.T.contiguous() for t in teachers], chunk_bytes=2 * 4 * 7 * 8, **told
    )
    (gradient,) = torch.autograd.grad(out.loss, weight)
    return out, gradient.T
