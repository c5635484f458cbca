# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Metrics of the distillation, as sums that are reduced once per log line: exact token means over all processes."""

from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from .student import sampled_answer

if TYPE_CHECKING:
    from .config import OnPolicyDistillConfig
    from .student import MicroBatch, StudentOutput


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
        self.add_sum(name, torch.where(mask, values.detach(), 0.0).sum(dtype=_sum_dtype(values)), mask.sum())

    def add_sum(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Add a sum over `count` items."""
        total = total.detach()
        pair = torch.stack([total, torch.as_tensor(count, dtype=total.dtype, device=total.device)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def compute(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """Reduce over the processes and forget. All processes must call it together."""
        names = sorted(self._sums)
        if accelerator.num_processes > 1:  # one process may have had no sample of some kind
            names = sorted(set(gather_object(names)))
        if not names:
            return {}
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        nothing = torch.zeros(2)
        sums = torch.stack([self._sums.get(name, nothing).to(accelerator.device, dtype) for name in names])
        self._sums = {}
        sums = accelerator.reduce(sums, reduction="sum").tolist()
        return {name: [total / count] for name, (total, count) in zip(names, sums, strict=True) if count}


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def add_metrics(
    metrics: TokenMetrics,
    batch: "MicroBatch",
    logps: Tensor,
    entropies: Tensor,
    args: "OnPolicyDistillConfig",
    accumulation: float,
) -> None:
    """
    Metrics of a micro-batch, all from what the objective has computed.

    Of several teachers, those of each are `distill/NAME/...`, and what only some of them tell is a mean over theirs.
    """
    _add_objective(metrics, batch, accumulation)
    output = batch.output
    if output is None:
        _add_sampled(metrics, batch, logps.detach(), entropies.detach(), args)
    elif not batch.parts:
        _add_tokens(metrics, "distill", output, batch.distill_mask, args.target)
    for name, rows, part in batch.parts:
        for prefix in ("distill", f"distill/{name}"):
            _add_tokens(metrics, prefix, part, batch.distill_mask[rows], args.target)
    _add_shares(metrics, batch)


def _add_objective(metrics: TokenMetrics, batch: "MicroBatch", accumulation: float) -> None:
    """
    `distill/loss`: the distillation term of the optimised loss, before its coefficient; a mean over optimizer steps.

    Of a policy gradient it is the surrogate at ratio 1, Σ weight · −A. Each process holds its share of a micro-batch's
    loss, scaled for gradient accumulation.
    """
    terms = [] if batch.direct is None else [batch.direct.detach()]
    if batch.advantages is not None:
        terms.append(-(batch.reduction * batch.advantages).sum())
    if terms:
        loss = torch.stack([term.to(_sum_dtype(term)) for term in terms]).sum()
        metrics.add_sum("distill/loss", loss * accumulation, 1.0)
    mask = batch.distill_mask
    if batch.token_weights is not None:
        metrics.add("distill/token_weight", batch.token_weights, mask)
        metrics.add("distill/weighted_share", (batch.token_weights != 0).float(), mask)
    if batch.factors is not None:
        metrics.add_sum("distill/sample_weight", batch.factors.sum().to(_sum_dtype(batch.factors)), len(batch.factors))
    if batch.importance is not None:
        metrics.add("distill/importance_weight", batch.importance, batch.loss_mask)


def _add_tokens(metrics: TokenMetrics, prefix: str, output: "StudentOutput", mask: Tensor, target: str) -> None:
    """Statistics of the student and the teacher; `divergence` is what is trained, where that is not the teacher's."""
    named = {
        "reverse_kl": output.reverse_kl,
        "forward_kl": output.forward_kl,
        "student_entropy": None if output.divergence is None else output.entropy,
        "teacher_entropy": output.teacher_entropy,
        "overlap": output.overlap,
        "divergence": None if target == "teacher" else output.divergence,
        "target_coef": output.target_coef,
    }
    if output.teacher_logprobs is not None and output.divergence is not None and output.log_probs is not None:
        named["teacher_student_gap"] = output.teacher_logprobs - output.log_probs
    for name, values in named.items():
        if values is not None:
            metrics.add(f"{prefix}/{name}", values, mask)


def _add_shares(metrics: TokenMetrics, batch: "MicroBatch") -> None:
    """`distill/NAME/share`: the share of the distilled tokens that each of several teachers has."""
    mask = batch.distill_mask
    for name, rows in batch.rows_by_teacher.items():
        metrics.add_sum(f"distill/{name}/share", mask[rows].sum().to(_sum_dtype(mask)), mask.sum())


def _add_sampled(
    metrics: TokenMetrics,
    batch: "MicroBatch",
    student_logprobs: Tensor,
    entropies: Tensor,
    args: "OnPolicyDistillConfig",
) -> None:
    """
    Metrics where the sampled tokens' log-probs are all that is known of the teacher.

    `distill/reverse_kl` is the estimate e^ℓ − ℓ − 1 (k3; unbiased on tokens that the student sampled, never negative)
    with ℓ = teacher − student log-prob.
    """
    assert batch.scores is not None
    mask = batch.distill_mask
    teacher_logprobs = sampled_answer(batch.scores, mask.shape)
    gap = (teacher_logprobs - student_logprobs).masked_fill(~mask, 0.0)
    values = {"teacher_student_gap": gap, "student_entropy": entropies}
    if args.target == "teacher" or args.target == "reward_tilt":  # of an affine combination ℓ lacks the normaliser
        values["reverse_kl"] = torch.expm1(gap) - gap
    for name, value in values.items():
        metrics.add(f"distill/{name}", value, mask)
        for teacher, rows in batch.rows_by_teacher.items():
            metrics.add(f"distill/{teacher}/{name}", value[rows], mask[rows])
