# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Metrics of the distillation, gathered on the device and reduced once per log line: exact over all processes."""

import functools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from .diagnostics.derived import KINDS
from .student import sampled_answer

if TYPE_CHECKING:
    from .config import OnPolicyDistillConfig
    from .student import MicroBatch, StudentOutput

Key = tuple[str, str]  # kind and name of a metric


class _Own(NamedTuple):
    """What one process has gathered. No key is twice in one of the parts."""

    parts: list[dict[Key, list[float]]]
    members: dict[tuple[str, int], list[bytes]]
    problem: str | None


class TokenMetrics:
    """
    Sums over loss tokens, kept on the device until they are logged, so that a micro-batch costs no synchronisation.

    Means are over all loss tokens since the last log, whatever the micro-batching, the accumulation or the number of
    processes, and so is what is derived from several sums (see `diagnostics.derived`). A metric that no process has
    seen is left out.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        self._members: dict[tuple[str, int], list[bytes]] = {}
        self.problem: str | None = None
        """What kept this process from measuring something; the main process warns of it at the next log."""

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add the entries of `values` where `mask` holds (same shape)."""
        self.add_all({name: values}, mask)

    def add_all(self, values: Mapping[str, Tensor], mask: Tensor, kind: str = "mean") -> None:
        """[`add`] for several metrics at once, whose values have one shape; of a `"geometric_mean"` their logs."""
        if not values:
            return
        first = next(iter(values.values()))
        mask = mask.to(first.device)
        stacked = torch.where(mask, torch.stack([x.detach() for x in values.values()]), 0.0)
        totals = stacked.flatten(1).sum(1, dtype=_sum_dtype(first))
        self.merge(kind, tuple(values), torch.stack([totals, mask.sum().to(totals.dtype).expand_as(totals)]))

    def add_sum(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Add a sum over `count` items."""
        total = total.detach()
        pair = torch.stack([total, torch.as_tensor(count, dtype=total.dtype, device=total.device)])
        self.merge("mean", (name,), pair[:, None])

    def merge(self, kind: str, names: Sequence[str], kept: Tensor) -> None:
        """Add what `kind` (of `KINDS`) keeps of the metrics `names`, `(S, len(names))`."""
        key = (kind, tuple(names))
        before = self._kept.get(key)
        self._kept[key] = kept if before is None else KINDS[kind].merge(before, kept.to(before.device))

    def add_members(self, name: str, index: int, digests: Iterable[bytes]) -> None:
        """Add members of set `index`, which is one over all processes; `name` is the share of those that differ."""
        self._members.setdefault((name, index), []).extend(digests)

    @property
    def _sums(self) -> dict[str, Tensor]:
        """Totals and counts, `(2,)`, of the means."""
        sums: dict[str, Tensor] = {}
        for (kind, names), kept in self._kept.items():
            for name, pair in zip(names, kept.unbind(1), strict=True) if kind == "mean" else ():
                sums[name] = sums[name] + pair if name in sums else pair
        return sums

    def compute(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """Reduce over the processes and forget. All processes must call it together."""
        own = _Own(_on_host(self._kept), self._members, self.problem)
        self._kept, self._members, self.problem = {}, {}, None
        everyone: list[_Own] = gather_object([own]) if accelerator.num_processes > 1 else [own]
        problems = [own.problem for own in everyone if own.problem is not None]
        if problems and accelerator.is_main_process:
            warnings.warn(problems[0], stacklevel=2)
        values = _reduce([part for own in everyone for part in own.parts])
        return {
            name: [value] for name, value in (values | _distinct_shares([own.members for own in everyone])).items()
        }


def _on_host(kept: Mapping[tuple[str, tuple[str, ...]], Tensor]) -> list[dict[Key, list[float]]]:
    """Everything that was gathered, by metric, with one transfer a device."""
    flat: dict[torch.device, list[float]] = {}
    for device in {matrix.device for matrix in kept.values()}:
        flat[device] = torch.cat([m.flatten() for m in kept.values() if m.device == device]).tolist()
    parts: list[dict[Key, list[float]]] = [{}]
    for (kind, names), matrix in kept.items():
        numbers, flat[matrix.device] = flat[matrix.device][: matrix.numel()], flat[matrix.device][matrix.numel() :]
        for i, name in enumerate(names):
            free = [part for part in parts if (kind, name) not in part]  # it may be measured with others, too
            if not free:
                free = [{}]
                parts += free
            free[0][kind, name] = numbers[i :: len(names)]
    return parts


def _reduce(parts: Sequence[Mapping[Key, list[float]]]) -> dict[str, float]:
    """The metrics' values, from what all processes have."""
    values: dict[str, float] = {}
    for kind, (merge, finish) in KINDS.items():
        sizes = {name: len(row) for part in parts for (k, name), row in part.items() if k == kind}
        if not sizes:
            continue
        empty = [-math.inf if kind == "max" else 0.0] * max(sizes.values())
        names = sorted(sizes)
        rows = [[part.get((kind, name), empty) for name in names] for part in parts]
        merged = functools.reduce(merge, torch.tensor(rows, dtype=torch.float64).transpose(1, 2))
        for name, kept in zip(names, merged.unbind(1), strict=True):
            values |= {name + suffix: value for suffix, value in finish(kept.tolist()).items()}
    return values


def _distinct_shares(everyone: Sequence[Mapping[tuple[str, int], list[bytes]]]) -> dict[str, float]:
    """The share of the members that differ from one another within their set."""
    together: dict[tuple[str, int], list[bytes]] = {}
    for members in everyone:
        for key, digests in members.items():
            together.setdefault(key, []).extend(digests)
    counts: dict[str, list[int]] = {}
    for (name, _), digests in together.items():
        distinct, total = counts.get(name, [0, 0])
        counts[name] = [distinct + len(set(digests)), total + len(digests)]
    return {name: distinct / total for name, (distinct, total) in counts.items() if total}


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
        weights = batch.token_weights
        metrics.add_all({"distill/token_weight": weights, "distill/weighted_share": (weights != 0).to(weights)}, mask)
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
    metrics.add_all({f"{prefix}/{name}": values for name, values in named.items() if values is not None}, mask)


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
    metrics.add_all({f"distill/{name}": value for name, value in values.items()}, mask)
    for teacher, rows in batch.rows_by_teacher.items():
        metrics.add_all({f"distill/{teacher}/{name}": value[rows] for name, value in values.items()}, mask[rows])
