# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Heads and their GEMMs: fp32 logits from operands of any dtype, and the two adjoints.

Shapes: N rows (tokens), H hidden, V vocabulary.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

_PRODUCT_BYTES = 64 << 20  # of a product that has to be formed before it is added


@dataclass
class Head:
    """A head: logits = softcap · tanh(scale · (h Wᵀ + b) / softcap), without the softcap if it is `None`."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None


def logit_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def has_mixed_products(device: torch.device) -> bool:
    """Whether half operands can be multiplied into an fp32 result there; elsewhere they are widened first."""
    return device.type == "cuda" and torch.version.hip is None


@cache
def _adds_mixed_products(device: torch.device) -> bool:
    """Whether such a product can be added to an fp32 matrix: some releases want it in the operands' dtype."""
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(ones.float(), ones, ones, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def _add_mixed_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` in fp32 from half operands."""
    if _adds_mixed_products(total.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    rows = max(1, _PRODUCT_BYTES // (total.shape[1] * total.element_size()))
    for i in range(0, total.shape[0], rows):
        total[i : i + rows] += torch.mm(a[i : i + rows], b, out_dtype=total.dtype)


class Projector:
    """`h Wᵀ` and its two adjoints with fp32 results, from operands of the compute dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype):
        self.low_precision = compute_dtype in (torch.bfloat16, torch.float16)
        self.out_dtype = logit_dtype(compute_dtype)
        self.compute_dtype = compute_dtype
        weight = weight.detach().to(compute_dtype)
        self.native = self.low_precision and has_mixed_products(weight.device)
        self.weight = weight if self.native or not self.low_precision else weight.float()
        self.bias = None if bias is None else bias.detach().to(self.out_dtype)
        # Dtype in which logit gradients are multiplied; in fp16 those of a token mean would underflow
        self.grad_dtype = torch.bfloat16 if self.native and compute_dtype == torch.bfloat16 else self.out_dtype

    @cached_property
    def grad_weight(self) -> Tensor:
        return self.weight.to(self.grad_dtype)

    def operand(self, hidden: Tensor) -> Tensor:
        hidden = hidden.detach().to(self.compute_dtype)
        return hidden if self.native or not self.low_precision else hidden.float()

    def logits(self, hidden: Tensor, out: Tensor, add_bias: bool = True) -> Tensor:
        if self.native:
            torch.mm(self.operand(hidden), self.weight.t(), out_dtype=torch.float32, out=out)
        else:
            torch.mm(self.operand(hidden), self.weight.t(), out=out)
        if add_bias and self.bias is not None:
            out += self.bias
        return out

    def add_gradients(
        self,
        grad: Tensor,
        weights: Tensor | None,
        hidden: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
    ) -> None:
        """
        From the logits' gradient (n, V) in `grad_dtype`, before the row `weights` (n,) if there are any: writes
        `grad_hidden` and adds to `grad_weight`, both fp32.
        """
        operand = self.operand(hidden).to(self.grad_dtype)
        if grad_hidden is not None:
            if grad.dtype != grad_hidden.dtype:
                torch.mm(grad, self.grad_weight, out_dtype=grad_hidden.dtype, out=grad_hidden)
            else:
                torch.mm(grad, self.grad_weight, out=grad_hidden)
            if weights is not None:
                grad_hidden *= weights[:, None]
        if grad_weight is not None:
            if weights is not None:
                operand = operand * weights[:, None]
            if grad.dtype != grad_weight.dtype:
                _add_mixed_product(grad_weight, grad.t(), operand)
            else:
                grad_weight.addmm_(grad.t(), operand)


def shape_logits(
    logits: Tensor, scale: float, softcap: float | None, temperature: float | Tensor, need_slope: bool = True
) -> Tensor | None:
    """
    Scale, softcap and temperature (a number, or one of each row, `(n, 1)`) in place. Returns the slope
    ∂z/∂(raw logit) where a softcap makes it differ by entry.
    """
    if softcap is None:
        divide(logits, scale, temperature)
        return None
    logits.mul_(scale / softcap).tanh_()
    slope = divide(logits.square().neg_().add_(1), scale, temperature) if need_slope else None
    divide(logits, softcap, temperature)
    return slope


def divide(x: Tensor, scale: float, temperature: float | Tensor) -> Tensor:
    """`x` (n, V) times `scale / temperature` in place."""
    if isinstance(temperature, Tensor):
        # (`scale / temperature` of a tensor multiplies with a rounded reciprocal)
        return x.mul_((torch.full_like(temperature, scale) / temperature).to(x.dtype))
    return x if scale == temperature else x.mul_(scale / temperature)
