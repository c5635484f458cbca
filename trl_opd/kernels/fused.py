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

import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .projection import Head, Projector, shape_logits
from .rows import CORES, Normalized, logit_gradient, make_rows, normalize, row_dot
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


_workspaces = threading.local()


def _workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised buffer. On the CPU the last one is kept: asking the system for fresh pages costs a pass."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape)
    kept: Tensor | None = getattr(_workspaces, str(dtype), None)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # it outlives this call
            kept = torch.empty(size, dtype=dtype)
        setattr(_workspaces, str(dtype), kept)
    return kept[:size].view(shape)


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
        shape = (1 if self.teacher_projector is None else 2, min(self.rows, n), size)
        buffers = _workspace(shape, self.dtype, self.hidden.device)
        student_buffer, teacher_buffer = buffers[0], buffers[-1]
        for start in range(0, n, self.rows):
            sl = slice(start, min(start + self.rows, n))
            logits = self.projector.logits(self.hidden[sl], student_buffer[: sl.stop - start])
            teacher_logits = None
            if self.teacher_projector is not None:
                assert self.p.teacher_hidden is not None
                teacher_logits = self.teacher_projector.logits(
                    self.p.teacher_hidden[sl], teacher_buffer[: sl.stop - start]
                )
            block = self._block_rows(logits)
            for i in range(0, logits.shape[0], block):
                rows = slice(i, min(i + block, logits.shape[0]))
                self._block(
                    logits[rows],
                    None if teacher_logits is None else teacher_logits[rows],
                    slice(start + rows.start, start + rows.stop),
                    need_grad,
                    upstream,
                )
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
    ) -> None:
        """Statistics of the rows `sl`; the gradient of their divergence (or of `upstream`) overwrites `logits`."""
        p = self.p
        slope = shape_logits(logits, p.student_logit_scale, p.student_softcap, p.temperature)
        student = normalize(logits)
        if teacher_logits is not None:
            assert p.teacher is not None
            shape_logits(teacher_logits, p.teacher.logit_scale, p.teacher.softcap, p.temperature)
            self._dense(student, normalize(teacher_logits), sl, logits)
        elif p.topk is not None:
            self._sparse(student, sl, logits)
        logprobs, probs = student.logprobs, student.probs
        entropy = -row_dot(probs, logprobs)
        self._set("student_entropy", sl, entropy)
        if p.target_ids is not None:
            self._set("student_logprobs", sl, logprobs.gather(-1, p.target_ids[sl, None]).squeeze(-1))
        if not need_grad:
            return
        if upstream is not None:
            self._apply_upstream(logits, probs, logprobs, entropy, sl, upstream)
        if slope is not None:
            logits *= slope
        elif p.student_logit_scale != p.temperature:
            logits *= p.student_logit_scale / p.temperature

    def _dense(self, student: Normalized, teacher: Normalized, sl: slice, grad: Tensor) -> None:
        p = self.p
        rows = make_rows(student, teacher)
        self._set("forward_kl", sl, rows.forward_kl)
        self._set("reverse_kl", sl, rows.reverse_kl)
        self._set("teacher_entropy", sl, -row_dot(rows.teacher_probs, rows.teacher_logprobs))
        if p.target_ids is not None:
            self._set("teacher_logprobs", sl, rows.teacher_logprobs.gather(-1, p.target_ids[sl, None]).squeeze(-1))
        if p.overlap_top_k:
            k = min(p.overlap_top_k, p.vocab_size)
            self._set("overlap", sl, _overlap(student.logprobs, teacher.logprobs.topk(k, dim=-1).indices))
        if p.support == "full":
            value, gradient = CORES[p.divergence](rows, **p.params)
            self._set("divergence", sl, value)
            logit_gradient(rows, gradient, out=grad)
            return
        ids = select_ids(student.logprobs, teacher.logprobs, p.support, p.support_size)
        support = Support(
            ids,
            gather_logprobs(student.logprobs, ids),
            gather_logprobs(teacher.logprobs, ids),
            rest_mass(student.probs, ids),
            rest_mass(teacher.probs, ids),
            complete=p.support_size >= p.vocab_size,
        )
        self._on_support(support, student.probs, sl, grad, stats=False)

    def _sparse(self, student: Normalized, sl: slice, grad: Tensor) -> None:
        assert self.p.topk is not None
        ids, teacher = self.p.topk[0][sl], self.p.topk[1][sl].to(self.dtype)
        ids = ids.masked_fill(ids >= self.p.vocab_size, -1)  # an entry that the student lacks is part of the rest
        teacher = teacher.masked_fill(ids < 0, -torch.inf)
        # The teacher's rest is a difference of rounded numbers: below their resolution it is unknown, but not zero
        resolution = torch.finfo(self.dtype).eps
        support = Support(
            ids,
            gather_logprobs(student.logprobs, ids),
            teacher,
            rest_mass(student.probs, ids).clamp_(min=torch.finfo(self.dtype).tiny),
            (1 - teacher.exp().sum(-1)).clamp(min=resolution),
            complete=ids.shape[1] >= self.p.vocab_size and bool((ids >= 0).all()),
        )
        if self.p.overlap_top_k:
            k = min(self.p.overlap_top_k, ids.shape[1])
            top = teacher.topk(k, dim=-1).indices
            self._set("overlap", sl, _overlap(student.logprobs, ids.gather(-1, top)))
        self._on_support(support, student.probs, sl, grad, stats=True)

    def _on_support(self, support: Support, student_probs: Tensor, sl: slice, grad: Tensor, stats: bool) -> None:
        result = support_divergence(support, self.p.divergence, self.p.params, self.p.tail)
        self._set("divergence", sl, result.value)
        if stats:
            self._set("forward_kl", sl, result.forward_kl)
            self._set("reverse_kl", sl, result.reverse_kl)
            self._set("teacher_entropy", sl, result.teacher_entropy)
        torch.mul(student_probs, result.outside.to(self.dtype)[:, None], out=grad)
        scatter_valid(grad, support.ids, result.support_gradient.to(self.dtype))

    def _apply_upstream(
        self, grad: Tensor, probs: Tensor, logprobs: Tensor, entropy: Tensor, sl: slice, upstream: _Upstream
    ) -> None:
        """Turn ∂D in `grad` into Σ of upstream × gradient over divergence, target's log-prob (δ_y − s) and entropy."""
        if self.p.has_teacher and upstream.divergence is not None:
            grad *= upstream.divergence[sl, None]
        else:
            grad.zero_()
        if upstream.logprobs is not None:
            assert self.p.target_ids is not None
            u = upstream.logprobs[sl, None]
            grad.addcmul_(probs, u, value=-1).scatter_add_(-1, self.p.target_ids[sl, None], u)
        if upstream.entropy is not None:
            grad.addcmul_(probs, (logprobs + entropy[:, None]).mul_(upstream.entropy[sl, None]), value=-1)

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


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """Their product, out of place (a second backward sees the same gradient), the scale not rounded to its dtype."""
    return torch.mul(gradient, scale.detach().reshape(1), out=torch.empty_like(gradient))


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
        return *(None if g is None else _scaled(g, grad_loss) for g in ctx.saved_tensors), None


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
