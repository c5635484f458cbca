# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
A chunk of rows in PyTorch: statistics, and the gradient in the logits' place, a block of rows at a time.

Shapes: n rows of the chunk, V vocabulary, K support.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .members import ContrastTarget
from .mixtures import affine_logits, contrast_logits
from .problem import Problem, Upstream
from .projection import divide, shape_logits
from .rows import CORES, Normalized, Rows, logit_gradient, make_rows, normalize, row_dot
from .statistics import Listed, further_statistics
from .supports import (
    Support,
    dense_support,
    overlap_advantage,
    overlap_share,
    scatter_valid,
    select_ids,
    sparse_support,
    support_divergence,
)

_CPU_BLOCK_BYTES = 1 << 20  # elementwise work on the CPU goes by blocks of rows that stay in the cache


class TorchRows:
    """
    The rows of a problem.

    Args:
        problem ([`Problem`]): The call.
        stats (`torch.Tensor`): `(len(problem.stat_names), N)`, written row by row.
    """

    def __init__(self, problem: Problem, stats: Tensor):
        self.p, self.stats, self.dtype = problem, stats, stats.dtype
        self.row_of = {name: i for i, name in enumerate(problem.stat_names)}
        # Of each block: the student's top log-probs, its own at the teacher's top entries, and the teacher's
        self.tops: list[tuple[Tensor, Tensor, Tensor]] = []

    def run(
        self,
        logits: Tensor,
        teacher_logits: Sequence[Tensor],
        gradient: Tensor | None,
        sl: slice,
        upstream: Upstream | None,
    ) -> Tensor | None:
        """
        Statistics of the rows `sl` from the logits `(n, V)` of the student and the dense teachers, which are
        overwritten; if asked for, their gradient.

        Returns the weights of the rows where `gradient` still lacks them.
        """
        block = self._block_rows(logits)
        for i in range(0, logits.shape[0], block):
            rows = slice(i, min(i + block, logits.shape[0]))
            self._block(
                logits[rows],
                [x[rows] for x in teacher_logits],
                slice(sl.start + rows.start, sl.start + rows.stop),
                gradient is not None,
                upstream,
            )
        if self.tops:
            student_top, at_teacher_ids, teacher_top = (torch.cat(parts) for parts in zip(*self.tops, strict=True))
            self._set("overlap", sl, overlap_share(student_top, at_teacher_ids))
            self._set("overlap_advantage", sl, overlap_advantage(student_top, at_teacher_ids, teacher_top))
        weights = None if upstream is not None or self.p.weights is None else self.p.weights[sl].to(self.dtype)
        if gradient is None or gradient is logits:
            return weights
        # The cast has to read the gradient anyway, so the weights are multiplied there
        torch.mul(logits, 1.0 if weights is None else weights[:, None], out=gradient)
        return None

    def _block_rows(self, logits: Tensor) -> int:
        if logits.device.type != "cpu" or self.p.shard.group is not None:  # many blocks would be many collectives
            return logits.shape[0]
        return max(1, _CPU_BLOCK_BYTES // (logits.shape[1] * logits.element_size()))

    def _block(
        self, logits: Tensor, teacher_logits: Sequence[Tensor], sl: slice, need_grad: bool, upstream: Upstream | None
    ) -> None:
        """Statistics of the rows `sl`; the gradient of their divergence (or of `upstream`) overwrites `logits`."""
        p, temperature = self.p, self.p.temperature_at(sl)
        slope = shape_logits(logits, p.student_logit_scale, p.student_softcap, temperature)
        # A backward pass has no use for statistics that the divergence does not need
        wants_stats = upstream is None
        if teacher_logits:
            student = self._beside_teachers(logits, teacher_logits, sl, wants_stats)
        else:
            (student,) = normalize(p.shard, logits)
            support = None
            if p.topk is not None:
                support = sparse_support(student, p.topk[0][sl], p.topk[1][sl], p.shard)
            if wants_stats:
                self._further(Listed.of(student.logprobs, support, p.shard), sl)
            if support is not None:
                self._sparse(support, student, sl, logits, wants_stats)
        logprobs, probs = student.logprobs, student.probs
        entropy = -row_dot(probs, logprobs)
        self._set("student_entropy", sl, entropy)
        self._set("student_logsumexp", sl, student.logsumexp)
        if p.target_ids is not None:
            self._set("student_logprobs", sl, p.shard.at(logprobs, p.target_ids[sl, None]).squeeze(-1))
        if not need_grad:
            return
        if upstream is not None:
            self._apply_upstream(logits, probs, logprobs, entropy, sl, upstream)
        if slope is not None:
            logits *= slope
        else:
            divide(logits, p.student_logit_scale, temperature)

    def _beside_teachers(
        self, logits: Tensor, teacher_logits: Sequence[Tensor], sl: slice, wants_stats: bool
    ) -> Normalized:
        """The student's distribution from final logits, after it has been compared with what is aimed at."""
        p = self.p
        if not p.teacher_is_final:
            for member, z in zip(p.members, teacher_logits, strict=True):
                assert member.head is not None
                shape_logits(z, member.head.logit_scale, member.head.softcap, p.temperature_at(sl), need_slope=False)
        student, teacher = normalize(p.shard, logits, teacher_logits[0])
        if p.target is None:
            rows = make_rows(student, teacher, p.shard)
            self._teacher_stats(rows, student, teacher, sl, wants_stats)
            self._dense(rows, student, teacher, sl, logits)
            return student
        if wants_stats:
            self._teacher_stats(make_rows(student, teacher, p.shard), student, teacher, sl, wants_stats)
        self._towards_target(student, teacher, teacher_logits[1:], sl, logits)
        return student

    def _teacher_stats(
        self, rows: Rows, student: Normalized, teacher: Normalized, sl: slice, wants_stats: bool
    ) -> None:
        """What is said about the teacher, whatever is aimed at."""
        p = self.p
        self._set("forward_kl", sl, rows.forward_kl)
        self._set("reverse_kl", sl, rows.reverse_kl)
        self._set("teacher_entropy", sl, -row_dot(rows.teacher_probs, rows.teacher_logprobs))
        self._set("teacher_logsumexp", sl, teacher.logsumexp)
        if p.target_ids is not None:
            self._set("teacher_logprobs", sl, p.shard.at(rows.teacher_logprobs, p.target_ids[sl, None]).squeeze(-1))
        if not wants_stats:
            return
        if p.overlap_top_k:
            k = min(p.overlap_top_k, p.shard.total)
            (values, _), (teacher_values, ids) = p.shard.top_k(student.logprobs, teacher.logprobs, k=k)
            (found,) = p.shard.sum(p.shard.at(student.logprobs, ids))
            self.tops.append((values, found, teacher_values))
        self._further(rows, sl)

    def _further(self, known: Rows | Listed, sl: slice) -> None:
        for name, value in further_statistics(
            self.p.further, known, None if self.p.target_ids is None else self.p.target_ids[sl]
        ).items():
            self._set(name, sl, value)

    def _towards_target(
        self, student: Normalized, teacher: Normalized, others: Sequence[Tensor], sl: slice, grad: Tensor
    ) -> None:
        """Divergence from the target that the final logits of the first teacher, the others and the student make."""
        p = self.p
        if isinstance(p.target, ContrastTarget):
            (other,) = normalize(p.shard, *others)
            logits, coef = contrast_logits(
                p.target, (teacher.logits, other.logits), (teacher.probs, other.probs), p.shard
            )
        else:
            assert p.target is not None
            others = [x.clamp_(min=-1e30) for x in others]
            logits, coef = affine_logits(p.target, [teacher.logits, *others, student.logits], sl), None
        (target,) = normalize(p.shard, logits)
        self._dense(make_rows(student, target, p.shard), student, target, sl, grad)
        if coef is not None:
            self._set("target_coef", sl, coef)
            self.stats[self.row_of["divergence"], sl] /= coef
            grad /= coef[:, None]

    def _dense(self, rows: Rows, student: Normalized, teacher: Normalized, sl: slice, grad: Tensor) -> None:
        """Divergence and gradient of two distributions of the whole vocabulary."""
        p = self.p
        if p.support == "full":
            value, gradient = CORES[p.divergence](rows, **p.params)
            self._set("divergence", sl, value)
            logit_gradient(rows, gradient, out=grad)
            return
        ids = select_ids(student.logprobs, teacher.logprobs, p.support, p.support_size, p.shard)
        support = dense_support(student, teacher, ids, p.shard, complete=p.support_size >= p.shard.total)
        self._on_support(support, student.probs, sl, grad, stats=False)

    def _sparse(self, support: Support, student: Normalized, sl: slice, grad: Tensor, wants_stats: bool) -> None:
        p = self.p
        if p.overlap_top_k and wants_stats:
            k = min(p.overlap_top_k, support.ids.shape[1], p.shard.total)
            teacher_values, top = support.teacher_logprobs.topk(k, dim=-1)
            ((values, _),) = p.shard.top_k(student.logprobs, k=k)
            self.tops.append((values, support.student_logprobs.gather(-1, top), teacher_values))
        self._on_support(support, student.probs, sl, grad, stats=True)

    def _on_support(self, support: Support, student_probs: Tensor, sl: slice, grad: Tensor, stats: bool) -> None:
        result = support_divergence(support, self.p.divergence, self.p.params, self.p.tail)
        self._set("divergence", sl, result.value)
        if stats:
            self._set("forward_kl", sl, result.forward_kl)
            self._set("reverse_kl", sl, result.reverse_kl)
            self._set("teacher_entropy", sl, result.teacher_entropy)
        torch.mul(student_probs, result.outside.to(self.dtype)[:, None], out=grad)
        scatter_valid(grad, self.p.shard.local(support.ids), result.support_gradient.to(self.dtype))

    def _apply_upstream(
        self, grad: Tensor, probs: Tensor, logprobs: Tensor, entropy: Tensor, sl: slice, upstream: Upstream
    ) -> None:
        """Turn ∂D in `grad` into Σ of upstream × gradient over divergence, target's log-prob (δ_y − s) and entropy."""
        if self.p.has_teacher and upstream.divergence is not None:
            grad *= upstream.divergence[sl, None]
        else:
            grad.zero_()
        if upstream.logprobs is not None:
            assert self.p.target_ids is not None
            u = upstream.logprobs[sl, None]
            column = self.p.shard.local(self.p.target_ids[sl, None])
            here = u if self.p.shard.group is None else u.masked_fill(column < 0, 0.0)
            grad.addcmul_(probs, u, value=-1).scatter_add_(-1, column.clamp(min=0), here)
        if upstream.entropy is not None:
            (entropy,) = self.p.shard.sum(entropy)
            grad.addcmul_(probs, (logprobs + entropy[:, None]).mul_(upstream.entropy[sl, None]), value=-1)

    def _set(self, name: str, sl: slice, value: Tensor) -> None:
        # A student that puts mass where the teacher has none has an infinite KL; the rows carry it as 1e30
        self.stats[self.row_of[name], sl] = torch.where(value > 1e20, torch.inf, value).to(self.dtype)
