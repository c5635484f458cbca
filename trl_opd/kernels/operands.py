# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
A call's tensors as the kernels want them: heads whole, all on the device of the student's head, only rows that count.

Everything here is differentiable, so that gradients come back with the placement and on the device of the inputs.
Shapes: N rows (tokens), H hidden, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from .projection import Head


@overload
def whole(parameter: Tensor, vocab_group: dist.ProcessGroup | None = None) -> Tensor: ...
@overload
def whole(parameter: None, vocab_group: dist.ProcessGroup | None = None) -> None: ...
def whole(parameter: Tensor | None, vocab_group: dist.ProcessGroup | None = None) -> Tensor | None:
    """
    The full tensor of an FSDP2 shard (`DTensor`), or this process's rows of it for a group; anything else as it is.

    Its gradient comes back as a `DTensor` of the same placement, averaged over the processes of its mesh as FSDP
    averages those of the other parameters. (`full_tensor()` by itself takes the processes' gradients to be equal, and
    keeps of each process's own tokens those for its own shard.)
    """
    if parameter is None or not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial, Shard

    sharded: Any = parameter
    if vocab_group is not None:
        if sharded.placements != (Shard(0),):
            raise ValueError(
                f"With vocab_group a DTensor must be sharded over its rows alone, got {sharded.placements}. Pass this "
                "process's rows of it."
            )
        return sharded.to_local()
    return sharded.full_tensor(grad_placements=[Partial("avg")] * sharded.device_mesh.ndim)


@overload
def move(x: Tensor, device: torch.device) -> Tensor: ...
@overload
def move(x: None, device: torch.device) -> None: ...
def move(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device)


@torch.no_grad()
def frozen_head(
    weight: Tensor, bias: Tensor | None, device: torch.device, vocab_group: dist.ProcessGroup | None = None
) -> Head:
    """A head that gets no gradient. One that needs neither gathering nor moving stays the parameter that it is."""
    return Head(move(whole(weight, vocab_group), device), move(whole(bias, vocab_group), device))


def gathered(
    gather: Callable[[], AbstractContextManager[None]], *parameters: Tensor | None
) -> AbstractContextManager[None]:
    """`gather()` if one of the parameters is empty, as those that ZeRO-3 has partitioned are; else nothing."""
    return gather() if any(p is not None and p.numel() == 0 for p in parameters) else nullcontext()


def check_head(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse a head that is not whole or does not fit the hidden states `(N, H)`."""
    for name, tensor, dims in ((f"{model}_weight", weight, 2), (f"{model}_bias", bias, 1)):
        if tensor is not None and tensor.dim() == 1 and tensor.numel() == 0:
            raise ValueError(
                f"{name} is empty, as parameters that ZeRO-3 has partitioned are outside their module. Pass "
                "gather=lambda: deepspeed.zero.GatheredParameters([...]) with the heads' parameters, and do not leave "
                "out the bias."
            )
        if tensor is not None and tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}.")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{model}_hidden must have the {weight.shape[1]} features that {model}_weight takes, got "
            f"{hidden.shape[-1]}. Hidden states and head must be of one model."
        )


def teacher_dtype(student_dtype: torch.dtype, hidden: Tensor, head: Head) -> torch.dtype:
    """The dtype in which a teacher's hidden states meet their head, beside a student whose dtype is known."""
    if student_dtype == torch.float64:
        return student_dtype
    dtype = operand_dtype(hidden, head.weight)
    return torch.float32 if dtype == torch.float64 else dtype


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which hidden states meet a head: autocast's where the head is, or the wider of the two."""
    if hidden.dtype == torch.float64:
        return torch.float64
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


@dataclass
class Rows:
    """The rows to project, and the device to do it on."""

    mask: Tensor  # (N,) bool, on the device
    index: Tensor | None  # of the rows, where their mask was; `None` is every row

    @overload
    def take(self, x: Tensor) -> Tensor: ...
    @overload
    def take(self, x: None) -> None: ...
    def take(self, x: Tensor | None) -> Tensor | None:
        """The rows of `x` (N, ...), selected where it is and then moved."""
        if x is None:
            return None
        if self.index is not None:
            x = x.index_select(0, self.index.to(x.device))
        return x.to(self.mask.device)

    def spread(self, x: Tensor) -> Tensor:
        """The inverse for `(n,)` values: `(N,)`, 0 on the rows that were left out."""
        return x if self.index is None else x.new_zeros(self.mask.shape).masked_scatter(self.mask, x)


def choose_rows(num_tokens: int, mask: Tensor | None, token_weights: Tensor | None, device: torch.device) -> Rows:
    """Those of the mask, else those whose weight is not 0, else all."""
    if mask is not None:
        rows = mask.bool()
    elif token_weights is not None:
        rows = token_weights != 0
    else:
        return Rows(torch.ones(num_tokens, dtype=torch.bool, device=device), None)
    return Rows(rows.to(device), rows.nonzero().squeeze(-1))
