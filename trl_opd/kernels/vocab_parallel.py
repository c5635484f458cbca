# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Heads whose rows are spread over processes: what this one holds, and the collectives that make row sums whole.

Every process works on its own columns of a block of logits; only row sums, the entries of a top-k support and (for the
adaptive KL, which needs an order over the whole vocabulary) the rows themselves travel. All processes take the same
steps on the same rows: what decides about a step is a whole sum, never a process's own part.

Shapes: n rows, V vocabulary, K support.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """
    The entries of the vocabulary that this process holds: the next `sizes[rank]`, in rank order.

    Without a group it holds them all, and every method returns what it was given at no cost.
    """

    sizes: tuple[int, ...]  # entries to compare, of each process
    group: dist.ProcessGroup | None = None
    rank: int = 0

    @property
    def total(self) -> int:
        """Entries to compare, of all processes together."""
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """Global id of this process's first entry."""
        return sum(self.sizes[: self.rank])

    @property
    def empty(self) -> bool:
        """Whether this process holds none of the entries. It then takes part with one whose probability is 0."""
        return self.sizes[self.rank] == 0

    @property
    def widths(self) -> list[int]:
        """Columns of each process's logits."""
        return [max(1, size) for size in self.sizes]

    def own(self, parameter: Tensor) -> Tensor:
        """The compared rows of this process's weight or bias: one of zeros where there are none."""
        size = self.sizes[self.rank]
        return parameter[:size] if size else parameter.new_zeros(1, *parameter.shape[1:])

    def local(self, ids: Tensor) -> Tensor:
        """Global ids as columns of this process; below 0 where another process holds the entry, and at padding."""
        if self.group is None:
            return ids
        columns = ids - self.offset
        return columns.masked_fill_(columns >= self.sizes[self.rank], -1)

    def at(self, x: Tensor, ids: Tensor) -> Tensor:
        """`x` (n, V) at global `ids` (n, K); 0 where another process holds the entry. Their `sum` is whole."""
        if self.group is None:
            return x.gather(-1, ids.clamp(min=0))
        columns = self.local(ids)
        return x.gather(-1, columns.clamp(min=0)).masked_fill_(columns < 0, 0.0)

    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums over the processes, in one collective. On one process: the parts."""
        return parts if self.group is None else self._reduce(parts, dist.ReduceOp.SUM)

    def max(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Maxima over the processes, in one collective. On one process: the parts."""
        return parts if self.group is None else self._reduce(parts, dist.ReduceOp.MAX)

    def _reduce(self, parts: tuple[Tensor, ...], op: dist.ReduceOp.RedOpType) -> tuple[Tensor, ...]:
        packed = torch.cat([part.reshape(-1) for part in parts])
        if packed.numel():
            dist.all_reduce(packed, op=op, group=self.group)
        whole = packed.split([part.numel() for part in parts])
        return tuple(x.view(part.shape) for x, part in zip(whole, parts, strict=True))

    def top_k(self, *logprobs: Tensor, k: int) -> list[tuple[Tensor, Tensor]]:
        """Values and global ids, `(n, k)`, of the largest entries of each row of each `(n, V)`, largest first."""
        if self.group is None:
            return [(top.values, top.indices) for top in (x.topk(k, dim=-1) for x in logprobs)]
        width = min(k, max(self.widths))
        mine = logprobs[0].new_full((2, len(logprobs), logprobs[0].shape[0], width), -torch.inf, dtype=torch.float64)
        for i, x in enumerate(logprobs):
            top = x.topk(min(width, x.shape[-1]), dim=-1)
            mine[0, i, :, : top.values.shape[-1]] = top.values
            mine[1, i, :, : top.values.shape[-1]] = top.indices + self.offset  # exact in float64
        everyone = [torch.empty_like(mine) for _ in self.sizes]
        dist.all_gather(everyone, mine, group=self.group)
        values, ids = torch.cat(everyone, dim=-1)
        # Stable, so that all processes break ties alike, and for the entry of the lower id
        values, order = values.sort(dim=-1, descending=True, stable=True)
        values, ids = values[..., :k].to(logprobs[0].dtype), ids.gather(-1, order[..., :k]).long()
        return list(zip(values, ids, strict=True))

    def by_rows(self, function: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        """
        `function` of whole rows, from `(n, V)` parts to `(n,)`: each process takes a share of the rows in full.

        The parts are transposed over the processes rather than gathered, so that no process holds more than its share.
        """
        if self.group is None:
            return function(*parts)
        n, width = parts[0].shape
        bounds = [n * i // len(self.sizes) for i in range(len(self.sizes) + 1)]
        shares = [end - start for start, end in pairwise(bounds)]
        mine = shares[self.rank]
        rows = []
        for part in parts:
            received = part.new_empty(mine * sum(self.widths))
            dist.all_to_all_single(
                received,
                part.reshape(-1),
                [mine * other for other in self.widths],
                [share * width for share in shares],
                group=self.group,
            )
            columns = received.split([mine * other for other in self.widths])
            rows.append(torch.cat([x.view(mine, -1) for x in columns], dim=-1) if mine else part.new_empty(0, 1))
        out = parts[0].new_zeros(n)
        out[bounds[self.rank] : bounds[self.rank + 1]] = function(*rows)
        return self.sum(out)[0]


def make_shard(
    group: dist.ProcessGroup | None,
    student_weight: Tensor,
    teacher_weights: Sequence[Tensor],
    vocab_size: int | None,
    must_agree: dict[str, int],
) -> VocabShard:
    """
    What this process holds of the heads, after one exchange of their sizes over the group.

    Args:
        group (`ProcessGroup` or `None`): The processes over which the heads' rows are spread.
        student_weight (`torch.Tensor`): This process's rows, shape `(V_s, H_s)`.
        teacher_weights (`Sequence[torch.Tensor]`): This process's rows of each dense teacher, shapes `(V_t, H_t)`.
        vocab_size (`int` or `None`): Compare the first `vocab_size` entries of the whole vocabulary only.
        must_agree (`dict[str, int]`): Other numbers that have to be the same on all processes, by name.

    Raises:
        ValueError: On all processes alike, if the shards of student and teacher do not line up, a process holds no
            rows at all, or a number of `must_agree` differs.
    """
    heads = [student_weight.shape[0], *(weight.shape[0] for weight in teacher_weights)]
    if group is None or dist.get_world_size(group) == 1:
        return VocabShard((min(heads if vocab_size is None else [*heads, vocab_size]),))
    numbers = [*must_agree.values(), *heads]
    mine = torch.tensor(numbers, dtype=torch.int64, device=student_weight.device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    columns = torch.stack(everyone).t().tolist()
    for name, values in zip(must_agree, columns, strict=False):
        if len(set(values)) > 1:
            raise ValueError(
                f"{name} must be the same on all processes of vocab_group, got {values}. They share every row, and "
                "each holds a part of the vocabulary."
            )
    students, *teachers = columns[len(must_agree) :]
    if 0 in students:
        raise ValueError(f"Every process of vocab_group must hold rows of the head, got {students} rows.")
    totals = [sum(rows) for rows in (students, *teachers)]
    total = min(totals if vocab_size is None else [*totals, vocab_size])
    held = _first(students, total)
    for rows in teachers:
        if _first(rows, total) != held:
            raise ValueError(
                f"The shards of student_weight and teacher_weight must hold the same rows of the first {total}, got "
                f"{students} and {rows} rows in rank order. Cut both heads at the same entries."
            )
    return VocabShard(tuple(held), group, dist.get_rank(group))


def _first(rows: list[int], total: int) -> list[int]:
    """How many of the first `total` entries each process holds."""
    before = [sum(rows[:i]) for i in range(len(rows))]
    return [min(max(total - start, 0), count) for start, count in zip(before, rows, strict=True)]
