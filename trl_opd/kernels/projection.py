# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Heads and their GEMMs: fp32 logits from operands of any dtype, and the two adjoints.

Shapes: N rows (tokens), H hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Head:
    """A head: logits = softcap · tanh(scale · (h Wᵀ + b) / softcap), without the softcap if it is `None`."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None


def logit_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


class Projector:
    """`h Wᵀ` and its two adjoints with fp32 results, from operands of the compute dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype):
        self.low_precision = compute_dtype in (torch.bfloat16, torch.float16)
        self.out_dtype = logit_dtype(compute_dtype)
        self.compute_dtype = compute_dtype
        weight = weight.detach().to(compute_dtype)
        # cuBLAS multiplies half operands into an fp32 result; elsewhere the rounded operands are widened first
        self.native = self.low_precision and weight.is_cuda
        self.weight = weight if self.native or not self.low_precision else weight.float()
        self.bias = None if bias is None else bias.detach().to(self.out_dtype)
        # fp16 gradients of a token mean underflow
        self.grad_weight = weight.float() if self.native and compute_dtype == torch.float16 else self.weight
        self.native_grad = self.native and compute_dtype == torch.bfloat16

    def operand(self, hidden: Tensor) -> Tensor:
        hidden = hidden.detach().to(self.compute_dtype)
        return hidden if self.native or not self.low_precision else hidden.float()

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        if self.native:
            torch.mm(self.operand(hidden), self.weight.t(), out_dtype=torch.float32, out=out)
        else:
            torch.mm(self.operand(hidden), self.weight.t(), out=out)
        if self.bias is not None:
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
        """`grad` (n, V) before the row weights; adds to `grad_weight` and writes `grad_hidden` in fp32."""
        operand = self.operand(hidden)
        if self.native:
            # The cast has to read the gradient anyway, so the weights are multiplied there
            dtype = torch.bfloat16 if self.native_grad else torch.float32
            out = torch.empty_like(grad, dtype=dtype)
            grad = out.copy_(grad) if weights is None else torch.mul(grad, weights[:, None], out=out)
            operand, weights = operand.to(dtype), None
        if grad_hidden is not None:
            if self.native_grad:
                torch.mm(grad, self.grad_weight, out_dtype=torch.float32, out=grad_hidden)
            else:
                torch.mm(grad, self.grad_weight, out=grad_hidden)
            if weights is not None:
                grad_hidden *= weights[:, None]
        if grad_weight is not None:
            if weights is not None:
                operand = operand * weights[:, None]
            if self.native_grad:
                torch.addmm(grad_weight, grad.t(), operand, out_dtype=torch.float32, out=grad_weight)
            else:
                grad_weight.addmm_(grad.t(), operand)


def shape_logits(logits: Tensor, scale: float, softcap: float | None, temperature: float) -> Tensor | None:
    """Scale, softcap and temperature in place. Returns the slope ∂z/∂(raw logit) where it is not constant."""
    if softcap is None:
        if scale != temperature:
            logits *= scale / temperature
        return None
    logits.mul_(scale / softcap).tanh_()
    slope = logits.square().neg_().add_(1).mul_(scale / temperature)
    logits *= softcap / temperature
    return slope
