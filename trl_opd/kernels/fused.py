# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The fused linear divergence, chunk by chunk: projection, divergence and gradient of a few rows at a time.

Token chunks × the full vocabulary. For each chunk of rows the student's and the teacher's logits are formed in fp32,
turned into the gradient of the weighted divergence (by `torch_backend` or `triton_backend`), and multiplied back into
the gradients of the hidden states and of the head: 4 GEMMs of 2·N·H·V operations in all (3 with a frozen head; 3 and 2
when the teacher gives only top-k log-probs), none of them in the backward pass. No tensor of N × V elements exists.

Where gradients are multiplied in a lower precision than the logits', those of several chunks wait for one product: it
adds to the fp32 gradient of the head, and reading and writing that costs as much as multiplying a few hundred rows.

With `per_token_grad` the per-token divergence, log-prob and entropy are differentiable instead; their upstream
gradients are known only in the backward pass, which projects again (6 GEMMs).

Shapes: N rows (tokens), H hidden, V vocabulary.
"""

import math
import threading
from typing import Any

import torch
from torch import Tensor

from .modes import first_order, scaled
from .operands import check_head
from .problem import ROOM, STATS, Problem, Upstream
from .projection import Projector
from .torch_backend import TorchRows

_WINDOW_CHUNKS = 4  # chunks whose gradients wait in a low precision for one product that adds to the head's gradient


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
        own = problem.shard.own
        self.projector = Projector(own(weight), None if bias is None else own(bias), problem.compute_dtype)
        self.teacher_projector = None
        if problem.teacher is not None:
            assert problem.teacher_hidden is not None
            head = problem.teacher
            self.teacher_projector = Projector(
                own(head.weight), None if head.bias is None else own(head.bias), problem.teacher_dtype
            )
        self.dtype = self.projector.out_dtype
        n = student_hidden.shape[0]
        self.stats = student_hidden.new_full((len(STATS), n), float("nan"), dtype=self.dtype)

    def run(
        self,
        grad_hidden: Tensor | None = None,  # (N, H) fp32, written
        grad_weight: Tensor | None = None,  # (V, H) fp32, added to
        grad_bias: Tensor | None = None,  # (V,) fp32, added to
        upstream: Upstream | None = None,  # instead of the problem's weights
    ) -> Tensor:
        """Fill and return the statistics, `(len(STATS), N)`."""
        size, n, device = self.p.vocab_size, self.hidden.shape[0], self.hidden.device
        need_grad = grad_hidden is not None or grad_weight is not None or grad_bias is not None
        waits = need_grad and self.projector.grad_dtype != self.dtype
        chunks = _WINDOW_CHUNKS if grad_weight is not None else 1
        num_rows = self.p.num_rows(n, device, self.dtype, chunks * self.projector.grad_dtype.itemsize if waits else 0)
        models = 1 if self.teacher_projector is None else 2
        width = math.ceil(size / ROOM) * ROOM if self.p.backend == "triton" else size
        buffers = _workspace((models, min(num_rows, n), width), self.dtype, device)[..., :size]
        window = None
        if waits:
            dtype = self.projector.grad_dtype
            window = torch.empty(min(chunks * num_rows, n), width, dtype=dtype, device=device)[:, :size]
        add_bias = self.p.backend != "triton"  # which adds it as it reads
        first = 0  # row whose gradient is the first to wait
        for start in range(0, n, num_rows):
            sl = slice(start, min(start + num_rows, n))
            logits = self.projector.logits(self.hidden[sl], buffers[0, : sl.stop - start], add_bias)
            teacher_logits = None
            if self.teacher_projector is not None:
                assert self.p.teacher_hidden is not None
                teacher_logits = self.teacher_projector.logits(
                    self.p.teacher_hidden[sl], buffers[-1, : sl.stop - start], add_bias
                )
            gradient = logits if window is None else window[start - first : sl.stop - first]
            weights = self._chunk(logits, teacher_logits, gradient if need_grad else None, sl, upstream)
            if need_grad and (window is None or sl.stop - first == window.shape[0] or sl.stop == n):
                rows = slice(first, sl.stop)
                gradient = logits if window is None else window[: rows.stop - first]
                if grad_bias is not None:
                    grad_bias[:size] += gradient.sum(0, dtype=self.dtype) if weights is None else weights @ gradient
                self.projector.add_gradients(
                    gradient,
                    weights,
                    self.hidden[rows],
                    None if grad_hidden is None else grad_hidden[rows],
                    None if grad_weight is None else grad_weight[:size],
                )
                first = sl.stop
        self._make_whole(grad_hidden)
        return self.stats

    def _chunk(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        gradient: Tensor | None,
        sl: slice,
        upstream: Upstream | None,
    ) -> Tensor | None:
        """Statistics and gradient of the rows `sl`. Returns the weights of the rows where it still lacks them."""
        if self.p.backend == "torch":
            return TorchRows(self.p, self.stats).run(logits, teacher_logits, gradient, sl, upstream)
        from .triton_backend import TritonRows

        biases = (self.projector.bias, None if self.teacher_projector is None else self.teacher_projector.bias)
        TritonRows(self.p, logits, teacher_logits, biases, self.stats[:, sl], gradient, sl, upstream).run()
        return None

    def _make_whole(self, grad_hidden: Tensor | None) -> None:
        """Sum over the processes of a vocabulary group what was left in parts: entries at the targets, entropies."""
        if self.p.shard.group is None:
            return
        models = ("student",) if self.p.teacher is None else ("student", "teacher")  # a sparse one's are whole
        parts = [STATS.index(f"{model}_{name}") for model in models for name in ("entropy", "logprobs")]
        (self.stats[parts],) = self.p.shard.sum(self.stats[parts])
        if grad_hidden is not None:
            grad_hidden.copy_(self.p.shard.sum(grad_hidden)[0])


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
    @first_order
    def backward(ctx: Any, grad_loss: Tensor, _grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
        return *scaled(ctx.saved_tensors, grad_loss), None


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
    @first_order
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
            check_head("student", hidden, weight, bias)
            if problem.teacher is not None and problem.teacher_hidden is not None:
                check_head("teacher", problem.teacher_hidden, problem.teacher.weight, problem.teacher.bias)
            step = _Pass(problem, hidden, weight, bias)
            buffers = _gradient_buffers(hidden, weight, bias, needs, step.dtype)
            upstream = Upstream(grad_divergence, grad_logprobs, grad_entropy)
            step.run(buffers[0], buffers[1], buffers[2], upstream)
            return *(_cast(g, x) for g, x in zip(buffers, (hidden, weight, bias), strict=True)), None
