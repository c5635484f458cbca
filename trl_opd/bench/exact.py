# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
How far an implementation is from float64, on the first tokens of a problem.

No tensor of V × H in float64 exists: the heads are widened slice by slice, and the gradient of the head is compared
slice by slice. At most 64 tokens and 16.8 million logits are looked at.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .candidates import Implementation, Inputs, objective

_MAX_TOKENS = 64
_MAX_LOGITS = 1 << 24
_SLICE_BYTES = 64 << 20


@dataclass
class Reference:
    """The problem of the first tokens, its loss in float64, and the gradient of that in the student's logits."""

    inputs: Inputs
    loss: float
    logit_gradient: Tensor  # (n, V), float64


def _slices(weight: Tensor) -> Iterator[slice]:
    rows = max(1, _SLICE_BYTES // (8 * weight.shape[1]))
    return (slice(i, i + rows) for i in range(0, weight.shape[0], rows))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Float64 logits from operands of any dtype."""
    hidden = hidden.detach().double()
    return torch.cat([hidden @ weight[sl].detach().double().t() for sl in _slices(weight)], dim=-1)


def reference(x: Inputs, divergence: str) -> Reference:
    """The truth about the first tokens of a problem."""
    vocab = x.student_weight.shape[0]
    few = x.first(min(_MAX_TOKENS, max(1, _MAX_LOGITS // vocab), x.student_hidden.shape[0]))
    student = _logits(few.student_hidden, few.student_weight).requires_grad_()
    if few.topk is not None:
        loss = objective(student, few.topk, divergence)
    else:
        _, _, t, v = few.dense
        loss = objective(student, _logits(t, v), divergence)
    (gradient,) = torch.autograd.grad(loss, student)
    return Reference(few, loss.item(), gradient)


def errors(function: Implementation, truth: Reference, divergence: str) -> dict[str, float]:
    """
    An implementation's loss on the first tokens and its relative errors: of the loss, and of the gradients in hidden
    states and head as ‖difference‖ / ‖gradient‖.
    """
    x = truth.inputs
    x.forget_gradients()
    loss = function(x, divergence)
    loss.backward()
    found = {"loss": loss.item(), "loss_error": abs(loss.item() - truth.loss) / abs(truth.loss)}
    weight, hidden = x.student_weight.detach(), x.student_hidden.detach().double()
    exact = torch.zeros_like(hidden)
    difference = square = 0.0
    for sl in _slices(weight):
        g = truth.logit_gradient[:, sl]
        exact += g @ weight[sl].double()
        if x.student_weight.requires_grad:
            assert x.student_weight.grad is not None
            grad_weight = g.t() @ hidden
            square += grad_weight.square().sum().item()
            difference += grad_weight.sub_(x.student_weight.grad[sl]).square().sum().item()
    assert x.student_hidden.grad is not None
    found["hidden_error"] = ((x.student_hidden.grad.double() - exact).norm() / exact.norm()).item()
    if x.student_weight.requires_grad:
        found["head_error"] = (difference / square) ** 0.5
    x.forget_gradients()
    return found
