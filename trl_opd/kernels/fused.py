# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The fused linear divergence in chunked PyTorch: projection, divergence and gradient a few rows at a time.

Token chunks × the full vocabulary. For each chunk of rows the student's and the teacher's logits are formed in fp32,
turned in place into the gradient of the weighted divergence, and multiplied back into the gradients of the hidden
states and of the head: 4 GEMMs of 2·N·H·V operations in all (3 with a frozen head; 3 and 2 when the teacher gives only
top-k log-probs), none of them in the backward pass. No tensor of N × V elements exists.

With `per_token_grad` the per-token divergence, log-prob and entropy are differentiable instead; their upstream
gradients are known only in the backward pass, which projects again (6 GEMMs).

Shapes: N rows (tokens), H hidden, V vocabulary, K support.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .projection import Head, Projector, shape_logits
from .rows import CORES, log_softmax_rows, logit_gradient, make_rows, row_dot
from .supports import Support, gather_logprobs, rest_mass, scatter_valid, select_ids, support_divergence

STATS = (
    "divergence",
    "forward_kl",
    "reverse_kl",
    "student_entropy",
    "teacher_entropy",
    "student_logprobs",
    "teacher_logprobs",
    "overlap",
)
_CPU_BLOCK_BYTES = 1 << 20  # elementwise work on the CPU goes by blocks of rows that stay in the cache


@dataclass
class Problem:
    """Everything about a call that carries no gradient."""

    divergence: str
    params: dict[str, float]
    teacher_hidden: Tensor | None  # (N, H_t)
    teacher: Head | None
    student_logit_scale: float
    student_softcap: float | None
    temperature: float
    weights: Tensor | None  # (N,)
    target_ids: Tensor | None  # (N,)
    support: str
    support_size: int
    tail: str
    topk: tuple[Tensor, Tensor] | None  # (N, K) ids and log-probs
    overlap_top_k: int
    vocab_size: int
    compute_dtype: torch.dtype  # of the student's operands
    teacher_dtype: torch.dtype  # of the teacher's
    chunk_bytes: int
    grad_enabled: bool
    gather: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)

    @property
    def has_teacher(self) -> bool:
        return self.teacher is not None or self.topk is not None

    def num_rows(self, num_tokens: int, device: torch.device, dtype: torch.dtype) -> int:
        """Rows of a chunk, so that its logits and what is derived from them stay within `chunk_bytes`."""
        row = self.vocab_size * dtype.itemsize
        # On the CPU only the two logit buffers are as long as the chunk; elsewhere every temporary is
        buffers = (2 if self.teacher is not None else 1) if device.type == "cpu" else 8
        return max(1, min(num_tokens, self.chunk_bytes // (row * buffers)))


@dataclass
class _Upstream:
    """Gradients that reach the per-token outputs; `None` is zero."""

    divergence: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


class _Pass:
    """One walk over the chunks: statistics, and gradients if asked for."""

    def __init__(self, problem: Problem, student_hidden: Tensor, weight: Tensor, bias: Tensor | None):
        self.p = problem
        self.hidden = student_hidden
        size = problem.vocab_size
        self.projector = Projector(weight[:size], None if bias is None else bias[:size], problem.compute_dtype)
        self.teacher_projector = None
        if problem.teacher is not None:
            assert problem.teacher_hidden is not None
            head = problem.teacher
            self.teacher_projector = Projector(
                head.weight[:size], None if head.bias is None else head.bias[:size], problem.teacher_dtype
            )
        self.dtype = self.projector.out_dtype
        n = student_hidden.shape[0]
        self.stats = student_hidden.new_full((len(STATS), n), float("nan"), dtype=self.dtype)
        self.rows = problem.num_rows(max(n, 1), student_hidden.device, self.dtype)

    def run(
        self,
        grad_hidden: Tensor | None = None,  # (N, H) fp32, written
        grad_weight: Tensor | None = None,  # (V, H) fp32, added to
        grad_bias: Tensor | None = None,  # (V,) fp32, added to
        upstream: _Upstream | None = None,  # instead of the problem's weights
    ) -> Tensor:
        """Fill and return the statistics, `(len(STATS), N)`."""
        size, n = self.p.vocab_size, self.hidden.shape[0]
        need_grad = grad_hidden is not None or grad_weight is not None or grad_bias is not None
        student_buffer = self.hidden.new_empty((min(self.rows, n), size), dtype=self.dtype)
        teacher_buffer = torch.empty_like(student_buffer) if self.teacher_projector is not None else None
        for start in range(0, n, self.rows):
            sl = slice(start, min(start + self.rows, n))
            logits = self.projector.logits(self.hidden[sl], student_buffer[: sl.stop - start])
            teacher_logits = None
            if self.teacher_projector is not None:
                assert teacher_buffer is not None and self.p.teacher_hidden is not None
                teacher_logits = self.teacher_projector.logits(
                    self.p.teacher_hidden[sl], teacher_buffer[: sl.stop - start]
                )
            block = self._block_rows(logits)
            for i in range(0, logits.shape[0], block):
                rows = slice(i, min(i + block, logits.shape[0]))
                grad = self._block(
                    logits[rows],
                    None if teacher_logits is None else teacher_logits[rows],
                    slice(start + rows.start, start + rows.stop),
                    need_grad,
                    upstream,
                )
                if grad is not None:
                    logits[rows] = grad
            if need_grad:
                weights = None if upstream is not None or self.p.weights is None else self.p.weights[sl].to(self.dtype)
                if grad_bias is not None:
                    grad_bias[:size] += logits.sum(0) if weights is None else weights @ logits
                self.projector.add_gradients(
                    logits,
                    weights,
                    self.hidden[sl],
                    None if grad_hidden is None else grad_hidden[sl],
                    None if grad_weight is None else grad_weight[:size],
                )
        return self.stats

    def _block_rows(self, logits: Tensor) -> int:
        if logits.device.type != "cpu":
            return logits.shape[0]
        return max(1, _CPU_BLOCK_BYTES // (logits.shape[1] * logits.element_size()))

    def _block(
        self, logits: Tensor, teacher_logits: Tensor | None, sl: slice, need_grad: bool, upstream: _Upstream | None
    ) -> Tensor | None:
        """Statistics of the rows `sl`, and the gradient of their divergence (or of `upstream`) in the raw logits."""
        p = self.p
        slope = shape_logits(logits, p.student_logit_scale, p.student_softcap, p.temperature)
        student_logprobs = log_softmax_rows(logits)
        grad = None
        if teacher_logits is not None:
            assert p.teacher is not None
            shape_logits(teacher_logits, p.teacher.logit_scale, p.teacher.softcap, p.temperature)
            grad, student_probs = self._dense(student_logprobs, log_softmax_rows(teacher_logits), sl)
        elif p.topk is not None:
            grad, student_probs = self._sparse(student_logprobs, sl)
        else:
            student_probs = student_logprobs.exp()
        entropy = -row_dot(student_probs, student_logprobs)
        self._set("student_entropy", sl, entropy)
        if p.target_ids is not None:
            self._set("student_logprobs", sl, student_logprobs.gather(-1, p.target_ids[sl, None]).squeeze(-1))
        if not need_grad:
            return None
        if upstream is not None:
            grad = self._upstream_gradient(grad, student_probs, student_logprobs, entropy, sl, upstream)
        assert grad is not None
        if slope is not None:
            grad *= slope
        elif p.student_logit_scale != p.temperature:
            grad *= p.student_logit_scale / p.temperature
        return grad

    def _dense(self, student_logprobs: Tensor, teacher_logprobs: Tensor, sl: slice) -> tuple[Tensor, Tensor]:
        p = self.p
        rows = make_rows(student_logprobs, teacher_logprobs)
        self._set("forward_kl", sl, rows.forward_kl)
        self._set("reverse_kl", sl, rows.reverse_kl)
        self._set("teacher_entropy", sl, -row_dot(rows.teacher_probs, teacher_logprobs))
        if p.target_ids is not None:
            self._set("teacher_logprobs", sl, teacher_logprobs.gather(-1, p.target_ids[sl, None]).squeeze(-1))
        if p.overlap_top_k:
            k = min(p.overlap_top_k, p.vocab_size)
            self._set("overlap", sl, _overlap(student_logprobs, teacher_logprobs.topk(k, dim=-1).indices))
        if p.support == "full":
            value, gradient = CORES[p.divergence](rows, **p.params)
            self._set("divergence", sl, value)
            return logit_gradient(rows, gradient), rows.student_probs
        ids = select_ids(student_logprobs, teacher_logprobs, p.support, p.support_size)
        support = Support(
            ids,
            gather_logprobs(student_logprobs, ids),
            gather_logprobs(teacher_logprobs, ids),
            rest_mass(rows.student_probs, ids),
            rest_mass(rows.teacher_probs, ids),
            complete=ids.shape[1] >= p.vocab_size,
        )
        return self._on_support(support, rows.student_probs, sl, stats=False), rows.student_probs

    def _sparse(self, student_logprobs: Tensor, sl: slice) -> tuple[Tensor, Tensor]:
        assert self.p.topk is not None
        ids, teacher = self.p.topk[0][sl], self.p.topk[1][sl].to(self.dtype)
        teacher = teacher.masked_fill(ids < 0, -torch.inf)
        student_probs = student_logprobs.exp()
        # The teacher's rest is a difference of rounded numbers: below their resolution it is unknown, but not zero
        resolution = torch.finfo(self.dtype).eps
        support = Support(
            ids,
            gather_logprobs(student_logprobs, ids),
            teacher,
            rest_mass(student_probs, ids).clamp_(min=torch.finfo(self.dtype).tiny),
            (1 - teacher.exp().sum(-1)).clamp(min=resolution),
            complete=ids.shape[1] >= self.p.vocab_size,
        )
        if self.p.overlap_top_k:
            k = min(self.p.overlap_top_k, ids.shape[1])
            top = teacher.topk(k, dim=-1).indices
            self._set("overlap", sl, _overlap(student_logprobs, ids.gather(-1, top)))
        return self._on_support(support, student_probs, sl, stats=True), student_probs

    def _on_support(self, support: Support, student_probs: Tensor, sl: slice, stats: bool) -> Tensor:
        result = support_divergence(support, self.p.divergence, self.p.params, self.p.tail)
        self._set("divergence", sl, result.value)
        if stats:
            self._set("forward_kl", sl, result.forward_kl)
            self._set("reverse_kl", sl, result.reverse_kl)
            self._set("teacher_entropy", sl, result.teacher_entropy)
        grad = student_probs * result.outside.to(self.dtype)[:, None]
        return scatter_valid(grad, support.ids, result.support_gradient.to(self.dtype))

    def _upstream_gradient(
        self,
        grad: Tensor | None,
        probs: Tensor,
        logprobs: Tensor,
        entropy: Tensor,
        sl: slice,
        upstream: _Upstream,
    ) -> Tensor:
        """Σ of upstream × gradient over the divergence, the target's log-prob (δ_y − s) and the entropy."""
        total = torch.zeros_like(probs) if grad is None or upstream.divergence is None else grad
        if grad is not None and upstream.divergence is not None:
            total *= upstream.divergence[sl, None]
        if upstream.logprobs is not None:
            assert self.p.target_ids is not None
            u = upstream.logprobs[sl, None]
            total.addcmul_(probs, u, value=-1).scatter_add_(-1, self.p.target_ids[sl, None], u)
        if upstream.entropy is not None:
            total.addcmul_(probs, (logprobs + entropy[:, None]).mul_(upstream.entropy[sl, None]), value=-1)
        return total

    def _set(self, name: str, sl: slice, value: Tensor) -> None:
        # A student that puts mass where the teacher has none has an infinite KL; the rows carry it as 1e30
        self.stats[STATS.index(name), sl] = torch.where(value > 1e20, torch.inf, value).to(self.dtype)


def _overlap(student_logprobs: Tensor, teacher_ids: Tensor) -> Tensor:
    """Share of `teacher_ids` (n, K) that are among the student's top K."""
    threshold = student_logprobs.topk(teacher_ids.shape[1], dim=-1).values[:, -1:]
    found = student_logprobs.gather(-1, teacher_ids.clamp(min=0)) >= threshold
    return (found & (teacher_ids >= 0)).to(student_logprobs.dtype).mean(-1)


_Buffers = tuple[Tensor | None, Tensor | None, Tensor | None]


def _gradient_buffers(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...], dtype: torch.dtype
) -> _Buffers:
    return (
        torch.empty_like(hidden, dtype=dtype, memory_format=torch.contiguous_format) if needs[0] else None,
        torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format) if needs[1] else None,
        torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[2] else None,
    )


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


class GradientInForward(torch.autograd.Function):
    """`(loss, stats)`: the gradient of the weighted sum is formed in the forward pass and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem
    ) -> tuple[Tensor, Tensor]:
        needs = tuple(ctx.needs_input_grad[:3]) if problem.grad_enabled else (False,) * 3
        with torch.autocast(hidden.device.type, enabled=False):
            step = _Pass(problem, hidden, weight, bias)
            buffers = _gradient_buffers(hidden, weight, bias, needs, step.dtype)
            stats = step.run(*buffers)
        divergence = stats[STATS.index("divergence")]
        weighted = divergence if problem.weights is None else divergence * problem.weights.to(divergence.dtype)
        loss = weighted.sum()
        ctx.save_for_backward(*(_cast(g, x) for g, x in zip(buffers, (hidden, weight, bias), strict=True)))
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
        # Out of place, so that a second backward sees the same gradients
        return *(None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors), None


class PerToken(torch.autograd.Function):
    """`(divergence, logprobs, entropy, stats)`, the first three differentiable; the backward projects again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            stats = _Pass(problem, hidden, weight, bias).run()
        ctx.save_for_backward(hidden, weight, bias)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats)
        divergence, logprobs, entropy = (
            stats[STATS.index(name)].clone() for name in ("divergence", "student_logprobs", "student_entropy")
        )
        return divergence, logprobs, entropy, stats

    @staticmethod
    def backward(
        ctx: Any,
        grad_divergence: Tensor | None,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        _grad_stats: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        problem: Problem = ctx.problem
        if not any(needs) or (grad_divergence is None and grad_logprobs is None and grad_entropy is None):
            return None, None, None, None
        with torch.autocast(hidden.device.type, enabled=False), problem.gather():
            step = _Pass(problem, hidden, weight, bias)
            buffers = _gradient_buffers(hidden, weight, bias, needs, step.dtype)
            upstream = _Upstream(grad_divergence, grad_logprobs, grad_entropy)
            step.run(buffers[0], buffers[1], buffers[2], upstream)
            return *(_cast(g, x) for g, x in zip(buffers, (hidden, weight, bias), strict=True)), None
