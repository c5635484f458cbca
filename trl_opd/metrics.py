# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Metrics of the distillation, as sums that are reduced once per log line: exact token means over all processes."""

import torch
from accelerate import Accelerator
from torch import Tensor


class TokenMetrics:
    """
    Sums over loss tokens, kept on the device until they are logged, so that a micro-batch costs no synchronisation.

    Means are over all loss tokens since the last log, whatever the micro-batching, the accumulation or the number of
    processes. A metric that no process has seen is left out.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add the entries of `values` where `mask` holds (same shape)."""
        mask = mask.to(values.device)
        total = (
            torch.where(mask, values.detach(), 0.0).double().sum()
            if values.device.type != "mps"
            else (torch.where(mask, values.detach(), 0.0).sum())
        )
        self.add_sum(name, total, mask.sum())

    def add_sum(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Add a sum over `count` items."""
        total = total.detach()
        pair = torch.stack([total, torch.as_tensor(count, dtype=total.dtype, device=total.device)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def compute(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """Reduce over the processes and forget. All processes must call it together, with the same names."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name].to(accelerator.device) for name in names])
        self._sums = {}
        sums = accelerator.reduce(sums, reduction="sum").tolist()
        return {name: [total / count] for name, (total, count) in zip(names, sums, strict=True) if count}
