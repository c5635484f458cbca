# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Statistics of a token that are found out only if they are asked for by name: what gates and weightings are made of.

- `hellinger`: √(½ Σ (√s − √t)²), in [0, 1];
- `total_variation`: ½ Σ |s − t|, in [0, 1];
- `accepted` (with k): 1 if the student's likeliest entry is among the teacher's top k, else 0;
- `teacher_margin` (with k): the gap, in nats, between the teacher's best and its second best log-prob among the
  student's top k; of a top-k list, an entry that is not in it counts as the list's least likely;
- `teacher_rank`: rank of the target under the teacher, 1 is the best; of a list, the number of its entries plus 1
  where the target is not in it;
- `student_rank`: rank of the target under the student;
- `teacher_max_logprob`: the teacher's largest log-prob.

Entries that tie with the last of a top k belong to it, and have the best of their ranks. s is the student's, t the
teacher's distribution; of a target (see `members.AffineTarget`) it is the first teacher's. A list is taken for the
teacher's top K; where it names nothing, everything about the teacher is 0. All are detached.

Shapes: n rows, V what this process holds of the vocabulary, K support.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..losses import nearest_name
from .members import Member
from .rows import Rows
from .supports import Support
from .vocab_parallel import VocabShard

IN_TRITON = ("teacher_rank",)  # those that the Triton kernels find out


class Listed(NamedTuple):
    """A student's distribution, and what is known of a teacher."""

    student_logprobs: Tensor  # (n, V)
    ids: Tensor  # (n, K) global, below 0 is padding
    teacher_logprobs: Tensor  # (n, K), -inf at padding
    at_ids: Tensor  # (n, K), the student's log-probs
    shard: VocabShard

    @classmethod
    def of(cls, student_logprobs: Tensor, support: Support | None, shard: VocabShard) -> "Listed":
        if support is None:
            none = student_logprobs[:, :0]
            return cls(student_logprobs, none.long(), none, none, shard)
        return cls(student_logprobs, support.ids, support.teacher_logprobs, support.student_logprobs, shard)


def _magnitude(r: Rows) -> tuple[Tensor, Tensor]:
    """The larger of s and t, and log min/max: the differences that follow do not cancel near s = t."""
    rounding = r.mean_gap - r.reverse_kl  # of `gap`, one number a row
    return torch.maximum(r.student_probs, r.teacher_probs), (r.gap - rounding[:, None]).abs_().neg_()


def hellinger(r: Rows) -> Tensor:
    """√(½ Σ (√s − √t)²), with √s − √t as √max · expm1(½ log min/max) up to its sign."""
    larger, log_ratio = _magnitude(r)
    (total,) = r.shard.sum(log_ratio.mul_(0.5).expm1_().square_().mul_(larger).sum(-1))
    return total.mul(0.5).sqrt()


def total_variation(r: Rows) -> Tensor:
    """½ Σ |s − t|, with |s − t| as −max · expm1(log min/max)."""
    larger, log_ratio = _magnitude(r)
    (total,) = r.shard.sum(log_ratio.expm1_().mul_(larger).sum(-1))
    return total.mul(-0.5)


def accepted(r: Rows, k: int) -> Tensor:
    """1 where the student's likeliest entry is among the teacher's top k."""
    ((_, best),) = r.shard.top_k(r.student_logprobs, k=1)
    ((values, _),) = r.shard.top_k(r.teacher_logprobs, k=min(k, r.shard.total))
    (there,) = r.shard.sum(r.shard.at(r.teacher_logprobs, best))
    return (there >= values[:, -1:]).squeeze(-1).to(values.dtype)


def teacher_margin(r: Rows, k: int) -> Tensor:
    """The teacher's gap between its best and its second best among the student's top k."""
    ((_, ids),) = r.shard.top_k(r.student_logprobs, k=min(k, r.shard.total))
    (values,) = r.shard.sum(r.shard.at(r.teacher_logprobs, ids))
    return _margin(values)


def _margin(logprobs: Tensor) -> Tensor:
    if logprobs.shape[-1] < 2:
        return torch.zeros_like(logprobs[:, 0])
    best = logprobs.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def teacher_rank(r: Rows, target_ids: Tensor) -> Tensor:
    """Rank of the target under the teacher."""
    return _rank(r.teacher_logprobs, target_ids, r.shard)


def student_rank(r: Rows | Listed, target_ids: Tensor) -> Tensor:
    """Rank of the target under the student."""
    return _rank(r.student_logprobs, target_ids, r.shard)


def _rank(logprobs: Tensor, target_ids: Tensor, shard: VocabShard) -> Tensor:
    (there,) = shard.sum(shard.at(logprobs, target_ids[:, None]))
    (larger,) = shard.sum(_num_larger(logprobs, there).to(logprobs.dtype))
    return larger + torch.where(there.squeeze(-1).isnan(), torch.nan, 1.0)  # nothing is larger than a NaN


def _num_larger(x: Tensor, bound: Tensor) -> Tensor:
    """Entries of each row of `x` (n, V) above `bound` (n, 1)."""
    if x.device.type == "cpu":  # whose sum of booleans takes ten times as long as one of floats
        return torch.gt(x, bound, out=torch.empty_like(x)).sum(-1)
    return (x > bound).sum(-1)


def teacher_max_logprob(r: Rows) -> Tensor:
    """The teacher's largest log-prob."""
    (largest,) = r.shard.max(r.teacher_logprobs.amax(-1))
    return largest


def listed_accepted(known: Listed, k: int) -> Tensor:
    """[`accepted`], of a teacher's list."""
    ((best, _),) = known.shard.top_k(known.student_logprobs, k=1)
    top = known.teacher_logprobs.topk(k, dim=-1).indices  # padding is last, and at no entry
    return (known.at_ids.gather(-1, top) >= best).any(-1).to(best.dtype)


def listed_margin(known: Listed, k: int) -> Tensor:
    """[`teacher_margin`], of a teacher's list."""
    ((values, ids),) = known.shard.top_k(known.student_logprobs, k=min(k, known.shard.total))
    real = known.ids >= 0
    least = known.teacher_logprobs.masked_fill(~real, math.inf).amin(-1, keepdim=True)
    is_it = ids[:, :, None] == known.ids[:, None, :]  # (n, k, K), nowhere at padding
    at_ids = torch.where(is_it, known.teacher_logprobs[:, None, :], -math.inf).amax(-1)
    found = torch.where(is_it.any(-1), at_ids, least.expand_as(values))
    return _margin(torch.where(real.any(-1, keepdim=True), found, 0.0))


def listed_rank(known: Listed, target_ids: Tensor) -> Tensor:
    """[`teacher_rank`], of a teacher's list."""
    is_it = known.ids == target_ids[:, None]
    there = torch.where(is_it, known.teacher_logprobs, -math.inf).amax(-1, keepdim=True)
    larger = (known.teacher_logprobs > there).sum(-1)
    return torch.where((known.ids >= 0).any(-1), larger + 1, 0).to(known.teacher_logprobs.dtype)


def listed_max_logprob(known: Listed) -> Tensor:
    """[`teacher_max_logprob`], of a teacher's list."""
    largest = known.teacher_logprobs.amax(-1)
    return largest.masked_fill((known.ids < 0).all(-1), 0.0)


class _Statistic(NamedTuple):
    of_rows: Callable[..., Tensor]
    of_list: Callable[..., Tensor] | None  # where a teacher's list determines it
    at_target: bool = False
    least: int | None = None  # size that it takes, at least


STATISTICS: Mapping[str, _Statistic] = {
    "hellinger": _Statistic(hellinger, None),
    "total_variation": _Statistic(total_variation, None),
    "accepted": _Statistic(accepted, listed_accepted, least=1),
    "teacher_margin": _Statistic(teacher_margin, listed_margin, least=2),
    "teacher_rank": _Statistic(teacher_rank, listed_rank, at_target=True),
    "student_rank": _Statistic(student_rank, student_rank, at_target=True),
    "teacher_max_logprob": _Statistic(teacher_max_logprob, listed_max_logprob),
}


def further_statistics(
    wanted: Mapping[str, int | None], known: Rows | Listed, target_ids: Tensor | None
) -> dict[str, Tensor]:
    """The statistics asked for, `(n,)` each."""
    values = {}
    for name, size in wanted.items():
        statistic = STATISTICS[name]
        function = statistic.of_rows if isinstance(known, Rows) else statistic.of_list
        assert function is not None
        argument: list[Any] = [] if size is None else [size]
        values[name] = function(known, *([target_ids] if statistic.at_target else argument))
    return values


def check_statistics(
    statistics: Mapping[str, int | None] | None, members: Sequence[Member], has_targets: bool
) -> dict[str, int | None]:
    """
    The statistics to find out.

    Raises:
        ValueError: If a name is unknown, a size is missing or too many, or the teacher does not tell.
    """
    checked: dict[str, int | None] = {}
    for name, size in (statistics or {}).items():
        if name not in STATISTICS:
            raise ValueError(f"statistics must have known names, got {name!r}.{nearest_name(name, list(STATISTICS))}")
        statistic = STATISTICS[name]
        if statistic.least is None and size is not None:
            raise ValueError(f"statistics[{name!r}] must be None, got {size!r}. It has no size.")
        if statistic.least is not None and (
            isinstance(size, bool) or not isinstance(size, int) or size < statistic.least
        ):
            raise ValueError(
                f"statistics[{name!r}] must be a whole number of at least {statistic.least}, got {size!r}. It is the "
                "number of likeliest entries to look at."
            )
        if statistic.at_target and not has_targets:
            raise ValueError(f"statistics[{name!r}] needs target_ids, whose rank it is. Pass them.")
        _check_teachers(name, size, members)
        checked[name] = size
    return checked


def _check_teachers(name: str, size: int | None, members: Sequence[Member]) -> None:
    if not members and name != "student_rank":
        raise ValueError(f"statistics[{name!r}] needs a teacher, and this call has none.")
    for member in members:
        if member.topk is None:
            continue
        if STATISTICS[name].of_list is None:
            raise ValueError(
                f"statistics[{name!r}] needs a teacher that gives hidden states. A top-k list does not tell how the "
                "rest of its probability is spread. Use a local teacher, or leave the statistic out."
            )
        if name == "accepted" and size is not None and size > member.topk[0].shape[-1]:
            raise ValueError(
                f"statistics['accepted'] must be at most {member.topk[0].shape[-1]}, the length of the teacher's "
                f"list, got {size}. What comes after the list is not known. Ask for a longer list."
            )
