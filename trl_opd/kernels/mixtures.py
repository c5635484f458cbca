# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Several dense teachers as one, in the logits of a chunk of rows: what follows compares with that one as with any other.
And targets, which the student is led to instead of its teacher (at the end).

With final logits z_k (after scale, softcap and temperature), probabilities p_k = softmax(z_k) and weights w_k of sum 1
- `arithmetic` is t = Σ_k w_k p_k;
- `geometric` is t ∝ Π_k p_k^w_k, whose logits are Σ_k w_k z_k: the normalisers of the z_k are one number a row.

Teachers come one after another, each with its share of the weight so far. Where the next one's logits equal those so
far they stay as they are, to the bit: equal teachers in any number and of any weights are one teacher.

Shapes: n rows of the chunk, V what this process holds of the vocabulary, M teachers.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .members import AffineTarget, ContrastTarget
from .problem import Problem
from .projection import Projector, shape_logits
from .vocab_parallel import VocabShard

# Elementwise work goes by blocks of rows that stay in a cache: the CPU's second level, the GPU's last
_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 16 << 20}
_LOWEST = -1e30  # as `rows.normalize` has it: a finite logit of probability zero


def shares(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """
    From the float64 weights `(.., M)`: for each teacher, the share of those before it and its own, `(.., M)` each. In
    float32 the two add up to 1 to the bit (the larger is off by half a unit at most, where a tie goes to the even 1).
    """
    total = weights.cumsum(-1)
    rest = torch.zeros_like(total)
    rest[..., 1:] = total[..., :-1] / total[..., 1:]  # 1 − its own would lose a small one
    return rest.to(dtype), (weights / total).to(dtype)


class TeacherMixture:
    """
    Args:
        problem ([`Problem`]): The call, of several dense teachers.
        projectors (`Sequence[Projector]`): Their heads.
        dtype (`torch.dtype`): Of the logits.
    """

    def __init__(self, problem: Problem, projectors: Sequence[Projector], dtype: torch.dtype):
        assert problem.mixture_weights is not None
        self.p, self.projectors, self.shard = problem, projectors, problem.shard
        self.arithmetic = problem.mixture == "arithmetic"
        self.rest, self.own = shares(problem.mixture_weights, dtype)

    def logits(self, sl: slice, mixed: Tensor, other: Tensor) -> Tensor:
        """Form the final logits of the mixture for the rows `sl` in `mixed` (n, V); `other` is a second buffer."""
        norms: list[tuple[Tensor, Tensor]] = []  # of the mixture, by block: maximum and log Σ exp(z − maximum)
        for i, (member, projector) in enumerate(zip(self.p.members, self.projectors, strict=True)):
            assert member.hidden is not None
            new = projector.logits(member.hidden[sl], mixed if i == 0 else other)
            for j, block in enumerate(self._blocks(new)):
                self._finish(new[block], i, sl, block)
                if i == 0 and self.arithmetic:
                    norms.append(self._normaliser(new[block]))
                elif i > 0:
                    rest, own = (self._at(x, i, sl, block) for x in (self.rest, self.own))
                    if self.arithmetic:
                        self._add(mixed[block], new[block], rest, own, norms[j])
                    else:
                        mixed[block].lerp_(new[block], own)
        return mixed

    def _blocks(self, logits: Tensor) -> Iterator[slice]:
        rows, width = logits.shape
        size = rows  # many blocks would be many collectives
        if self.shard.group is None:
            bytes_ = _BLOCK_BYTES.get(logits.device.type, _BLOCK_BYTES["cuda"])
            size = max(1, bytes_ // (width * logits.element_size()))
        return (slice(i, min(i + size, rows)) for i in range(0, rows, size))

    def _at(self, x: Tensor, i: int, sl: slice, block: slice) -> Tensor:
        """Column i of `(1, M)` or `(N, M)` for a block of the rows `sl`, `(1, 1)` or `(n, 1)`."""
        return x[:, i : i + 1] if x.shape[0] == 1 else x[sl][block, i : i + 1]

    def _finish(self, logits: Tensor, i: int, sl: slice, block: slice) -> None:
        """Raw logits to final ones."""
        temperature = self.p.temperature_at(sl)
        temperature = temperature[block] if isinstance(temperature, Tensor) else temperature
        head = self.p.members[i].head
        assert head is not None
        shape_logits(logits, head.logit_scale, head.softcap, temperature, need_slope=False)
        if self.shard.group is not None and self.shard.empty:
            logits.fill_(_LOWEST)
        else:
            logits.clamp_(min=_LOWEST)

    def _normaliser(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        (maximum,) = self.shard.max(logits.amax(dim=-1, keepdim=True))
        (total,) = self.shard.sum((logits - maximum).exp_().sum(dim=-1, keepdim=True))
        return maximum, total.log_()

    def _add(self, mixed: Tensor, new: Tensor, rest: Tensor, own: Tensor, norm: tuple[Tensor, Tensor]) -> None:
        """`mixed` becomes log(rest · exp(mixed) + own · exp(new)), after `new` has got its normaliser."""
        maximum, log_total = norm
        new_maximum, new_log_total = self._normaliser(new)
        # Models may differ by a large constant: as one fp32 number it would be rounded by more than the logits
        shift = new_maximum.double() - maximum.double()
        first = shift.to(new.dtype)
        second = (shift - first + new_log_total.double() - log_total.double()).to(new.dtype)
        new.sub_(first).sub_(second)
        larger = torch.maximum(mixed, new)
        mixed.sub_(larger).exp_().mul_(rest)
        new.sub_(larger).exp_().mul_(own)
        mixed.add_(new).log_().add_(larger)


def affine_logits(target: AffineTarget, logits: Sequence[Tensor], sl: slice) -> Tensor:
    """
    Σ_k a_k z_k of the final logits `(n, V)` of the teachers and, last, the student, for the rows `sl`.

    As (Σ_k a_k) z_p + Σ_k a_k (z_k − z_p) with the largest coefficient's z_p: where the models agree, and the
    coefficients add up to 1, the target is that one model to the bit.
    """
    pivot = logits[target.pivot]
    coefs, total = (
        x.to(pivot.dtype) if x.shape[0] == 1 else x[sl].to(pivot.dtype) for x in (target.coefs, target.total)
    )
    out = pivot * total
    for k in target.present:
        out.addcmul_(logits[k] - pivot, coefs[:, k : k + 1])
    return out


def contrast_logits(
    target: ContrastTarget, logits: tuple[Tensor, Tensor], probs: tuple[Tensor, Tensor], shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """z_1 + w (z_1 − z_2) from final logits and probabilities `(n, V)` of the two teachers, and w `(n,)`."""
    (distance,) = shard.sum((probs[0] - probs[1]).abs_().sum(-1))
    coef = distance * target.scale + target.floor
    return (logits[0] - logits[1]).mul_(coef[:, None]).add_(logits[0]), coef
