# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""How the op behaves under autograd's modes and `torch.compile`."""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

P = ParamSpec("P")
R = TypeVar("R")
Gradients = tuple[Tensor | None, ...]
_SCALED_AT_ONCE = 1 << 20  # elements


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """
    Keep `torch.compile` out of a function: the graph breaks around it.

    As `torch.compiler.disable`, whose import of the compiler costs as much as that of torch: it waits until someone
    else has paid for it, before which nothing is compiled.
    """
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call


class _FirstOrder(torch.autograd.Function):
    """A gradient that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> Tensor:
        raise RuntimeError(
            "fused_linear_divergence has no second derivative: its gradient was differentiated again, under "
            "create_graph=True. A gradient penalty or Hessian of it needs full logits and trl_opd.losses."
        )


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """
    Make differentiating the gradients of an autograd function's `backward` an error.

    `once_differentiable` does so only where the upstream gradient needs a gradient itself, which that of a loss (1)
    does not: the second-order terms of `loss + penalty(gradient)` would be missing without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx: FunctionCtx, *upstream: Tensor | None) -> Gradients:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(None if g is None else _FirstOrder.apply(g.detach().requires_grad_()) for g in gradients)

    return wrapper


def _graph_is_kept() -> bool:
    """Whether the backward pass that runs now may be followed by another one of the same graph (`retain_graph`)."""
    ask: Callable[[], bool] | None = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def scaled(gradients: Gradients, scale: Tensor) -> Iterator[Tensor | None]:
    """
    The saved gradients times the loss's upstream gradient, which is not rounded to their dtype.

    A graph that is kept must find them unscaled the next time. One that is not gives them away: they are scaled in
    place, and autograd takes them for the parameters' gradients as they are, so the head's exists once.
    """
    kept = _graph_is_kept()
    for gradient in gradients:
        yield None if gradient is None else _times(gradient, scale, torch.empty_like(gradient) if kept else gradient)


def _times(gradient: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    scale = scale.detach().reshape(1)  # as a scalar tensor it would be rounded to the gradient's dtype
    if gradient.dtype == scale.dtype or not gradient.is_cpu or gradient.numel() <= _SCALED_AT_ONCE:
        return torch.mul(gradient, scale, out=out)
    # Of two dtypes the CPU makes a copy in the wider one first
    rows = max(1, _SCALED_AT_ONCE * gradient.shape[0] // gradient.numel())
    for source, target in zip(gradient.split(rows), out.split(rows), strict=True):
        torch.mul(source, scale, out=target)
    return out
