# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The fused linear divergence, chunk by chunk: projection, divergence and gradient of a few rows at a time.

Token chunks × the full vocabulary. For each chunk of rows the student's and the teacher's logits are formed in fp32,
turned into the gradient of the weighted divergence (by `torch_backend` or `triton_backend`), and multiplied back into
the gradients of the hidden states and of the head: 4 GEMMs of 2·N·H·V operations in all (3 with a frozen head; 3 and 2
when the teacher gives only top-k log-probs), none of them in the backward pass. No tensor of N × V elements exists.

Each further dense teacher costs its own projection, whatever the mixture. A mixture of distributions is formed in the
teacher's logits (`mixtures`) and compared once. A sum of losses is the weighted mean of problems of one teacher each:
they share the student's logits, and their gradients are averaged before they are multiplied back. A target is formed
where the student's final logits are, block by block (`torch_backend`), from the logits of all teachers.

A `token_weighting` is called between a chunk's statistics and its products: its weights join those of the rows.

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

from .mixtures import TeacherMixture, shares
from .modes import first_order, scaled
from .operands import check_head
from .problem import ROOM, STATS, Problem, TokenWeighting, Upstream
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
        self.teacher_projectors = [
            None
            if (head := member.head) is None
            else Projector(own(head.weight), None if head.bias is None else own(head.bias), member.dtype)
            for member in problem.members
        ]
        self.dtype = self.projector.out_dtype
        self.mixture = None
        if problem.mixes_logits:
            dense = [projector for projector in self.teacher_projectors if projector is not None]
            self.mixture = TeacherMixture(problem, dense, self.dtype)
        self.parts = problem.parts  # whose weighted mean the problem is
        if len(self.parts) > 1:
            assert problem.mixture_weights is not None
            self.shares = shares(problem.mixture_weights, self.dtype)[1]
        self.adds_bias = problem.backend != "triton"  # which adds it as it reads
        n = student_hidden.shape[0]
        self.stat_names = problem.stat_names
        shape = len(self.stat_names), n
        self.stats = [student_hidden.new_full(shape, float("nan"), dtype=self.dtype) for _ in self.parts]

    def run(
        self,
        grad_hidden: Tensor | None = None,  # (N, H) fp32, written
        grad_weight: Tensor | None = None,  # (V, H) fp32, added to
        grad_bias: Tensor | None = None,  # (V,) fp32, added to
        upstream: Upstream | None = None,  # instead of the problem's weights
    ) -> Tensor:
        """Fill and return the statistics, `(len(problem.stat_names), N)`."""
        size, n, device = self.p.vocab_size, self.hidden.shape[0], self.hidden.device
        need_grad = grad_hidden is not None or grad_weight is not None or grad_bias is not None
        waits = need_grad and self.projector.grad_dtype != self.dtype
        chunks = _WINDOW_CHUNKS if grad_weight is not None else 1
        num_rows = self.p.num_rows(n, device, self.dtype, chunks * self.projector.grad_dtype.itemsize if waits else 0)
        width = math.ceil(size / ROOM) * ROOM if self.p.backend == "triton" else size
        buffers = _workspace((self.p.num_buffers, min(num_rows, n), width), self.dtype, device)[..., :size]
        window = None
        if waits:
            dtype = self.projector.grad_dtype
            window = torch.empty(min(chunks * num_rows, n), width, dtype=dtype, device=device)[:, :size]
        first = 0  # row whose gradient is the first to wait
        for start in range(0, n, num_rows):
            sl = slice(start, min(start + num_rows, n))
            logits = self.projector.logits(self.hidden[sl], buffers[0, : sl.stop - start], self.adds_bias)
            gradient = None
            if need_grad:
                gradient = logits if window is None else window[start - first : sl.stop - first]
            gradient, weights = self._chunk(logits, buffers[1:, : sl.stop - start], gradient, sl, upstream)
            if gradient is not None and (window is None or sl.stop - first == window.shape[0] or sl.stop == n):
                rows = slice(first, sl.stop)
                gradient = gradient if window is None else window[: rows.stop - first]
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
        if self.p.token_weighting is None or upstream is not None:
            self._make_whole(slice(None))
        if grad_hidden is not None and self.p.shard.group is not None:
            grad_hidden.copy_(self.p.shard.sum(grad_hidden)[0])
        return self._mean_stats(slice(None))

    def _chunk(
        self, logits: Tensor, others: Tensor, gradient: Tensor | None, sl: slice, upstream: Upstream | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """
        Statistics of the rows `sl` from the student's logits (n, V), and their gradient where there is a place for it,
        which may be that of the logits; `others` are the other buffers.

        Returns the gradient and the weights of the rows where it still lacks them.
        """
        weighting = self.p.token_weighting if upstream is None else None
        if len(self.parts) == 1 and weighting is None:
            return gradient, self._part(0, logits, self._teacher_logits(0, others, sl), gradient, sl, upstream)
        mean, weights = logits, None
        for i in range(len(self.parts)):
            teacher_logits = self._teacher_logits(i, others, sl)
            own = logits if i == len(self.parts) - 1 else others[min(i, 1)].copy_(logits)
            weights = self._part(i, own, teacher_logits, None if gradient is None else own, sl, upstream)
            if i == 0:
                mean = own
            elif gradient is not None:
                share = self.shares[:, i : i + 1]
                mean.lerp_(own, share if share.shape[0] == 1 else share[sl])
        if weighting is not None:
            own_weights = self._weigh(weighting, sl)
            if weights is None and gradient is logits:  # as it would be without: what is summed has its weights
                mean.mul_(own_weights[:, None])
            else:
                weights = own_weights if weights is None else weights * own_weights
        if gradient is None or gradient is logits:
            return None if gradient is None else mean, weights
        torch.mul(mean, 1.0 if weights is None else weights[:, None], out=gradient)
        return gradient, None

    def _weigh(self, weighting: TokenWeighting, sl: slice) -> Tensor:
        """The weights that the call's `token_weighting` makes of the statistics of the rows `sl`."""
        self._make_whole(sl)
        stats = dict(zip(self.stat_names, self._mean_stats(sl), strict=True))
        weights = weighting({name: stats[name].clone() for name in self.p.known if name != "weights"})
        shape = (sl.stop - sl.start,)
        if not isinstance(weights, Tensor) or weights.shape != shape:
            got = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else repr(weights)
            raise ValueError(
                f"token_weighting must return a tensor of one weight per row, {shape} like the statistics it is "
                f"given, got {got}."
            )
        own = self.stats[0][self.stat_names.index("weights")]
        own[sl] = weights.detach().to(self.dtype)
        return own[sl]

    def _teacher_logits(self, i: int, others: Tensor, sl: slice) -> list[Tensor]:
        """Logits of the i-th part's dense teachers, if it has any, in the buffers beside the student's."""
        if self.mixture is not None:
            return [self.mixture.logits(sl, others[0], others[1])]
        if self.p.target is None:
            others, which = others[-1:], [i]
        else:
            which = [*range(len(self.p.members))]
        logits = []
        for k, out in zip(which, others, strict=False):
            projector = self.teacher_projectors[k] if self.teacher_projectors else None
            if projector is not None:
                hidden = self.p.members[k].hidden
                assert hidden is not None
                logits.append(projector.logits(hidden[sl], out, self.adds_bias))
        return logits

    def _part(
        self,
        i: int,
        logits: Tensor,
        teacher_logits: list[Tensor],
        gradient: Tensor | None,
        sl: slice,
        upstream: Upstream | None,
    ) -> Tensor | None:
        """
        Statistics and gradient of the i-th part. Returns the weights of the rows where the gradient still lacks them.
        """
        problem, stats = self.parts[i], self.stats[i]
        if self.p.backend == "torch":
            return TorchRows(problem, stats).run(logits, teacher_logits, gradient, sl, upstream)
        from .triton_backend import TritonRows

        teacher = None if self.mixture is not None or not self.teacher_projectors else self.teacher_projectors[i]
        biases = (self.projector.bias, None if teacher is None else teacher.bias)
        dense = teacher_logits[0] if teacher_logits else None
        TritonRows(problem, logits, dense, biases, stats[:, sl], gradient, sl, upstream).run()
        return None

    def _make_whole(self, sl: slice) -> None:
        """
        Sum over the processes of a vocabulary group what was left in parts of the rows `sl`: entries at the targets,
        entropies.
        """
        if self.p.shard.group is None:
            return
        for problem, stats in zip(self.parts, self.stats, strict=True):
            models = ("student",) if problem.teacher is None else ("student", "teacher")  # a sparse one's are whole
            rows = [STATS.index(f"{model}_{name}") for model in models for name in ("entropy", "logprobs")]
            own = stats[:, sl]
            (own[rows],) = self.p.shard.sum(own[rows])

    def _mean_stats(self, sl: slice) -> Tensor:
        """The parts' statistics of the rows `sl` in the mean; the student's are the same in all."""
        if len(self.parts) == 1:
            return self.stats[0][:, sl]
        assert self.p.mixture_weights is not None
        stats = self.stats[0][:, sl].clone()
        shared = [*(name for name in self.stat_names if name.startswith("student_")), "weights"]
        teachers = [i for i, name in enumerate(self.stat_names) if name not in shared]
        columns = self.p.mixture_weights.T  # (M, 1) or (M, N)
        columns = columns if columns.shape[1] == 1 else columns[:, sl]
        stats[teachers] = sum(
            part[teachers][:, sl].double() * column for part, column in zip(self.stats, columns, strict=True)
        ).to(self.dtype)
        return stats


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


def weighted_divergence(divergence: Tensor, stats: Tensor, problem: Problem) -> Tensor:
    """Weight times divergence of each row, `(N,)`."""
    if problem.weights is not None:
        divergence = divergence * problem.weights.to(divergence.dtype)
    if problem.token_weighting is None:
        return divergence
    weights = stats[problem.stat_names.index("weights")]
    return divergence.masked_fill((weights == 0) & divergence.isinf(), 0.0) * weights  # a gate takes such a row out


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
        loss = weighted_divergence(divergence, stats, problem).sum()
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
            for member in problem.members:
                if member.hidden is not None and member.head is not None:
                    check_head("teacher", member.hidden, member.head.weight, member.head.bias)
            step = _Pass(problem, hidden, weight, bias)
            buffers = _gradient_buffers(hidden, weight, bias, needs, step.dtype)
            upstream = Upstream(grad_divergence, grad_logprobs, grad_entropy)
            step.run(buffers[0], buffers[1], buffers[2], upstream)
            return *(_cast(g, x) for g, x in zip(buffers, (hidden, weight, bias), strict=True)), None
