# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
A chunk of rows by the Triton kernels: what `torch_backend` does block by block, in two or three launches.

Runs on CUDA devices, and anywhere under `TRITON_INTERPRET=1`, for fp32 logits.
Shapes: n rows, V vocabulary, K support.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from . import triton_rows as kernels
from .problem import ROOM, Problem, Upstream
from .statistics import Listed, further_statistics
from .supports import (
    Support,
    known_teacher,
    overlap_advantage,
    overlap_share,
    scatter_valid,
    select_ids,
    support_divergence,
)
from .triton_cores import CENTRED, parameters

_INTERPRET: bool = triton.knobs.runtime.interpret  # read once, as `triton.jit` does
_LOWEST = -1e30
# Entries that a program of 8 warps takes at a time, chosen from the registers that ptxas reports for sm_90
MAX_BLOCK = 2048


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot serve logits of this kind; `None` if they can."""
    if dtype != torch.float32:
        return f"its logits are float32, and these would be {dtype}"
    if device.type != "cuda" and not _INTERPRET:
        return f"it needs a CUDA device, and these tensors are on {device} (TRITON_INTERPRET=1 runs it there, slowly)"
    return None


@dataclass
class _Shaping:
    """How a model's raw logits become its final ones: outer · tanh(inner · (z + bias)), or inner · (z + bias)."""

    inner: float
    outer: float
    slope: float  # ∂(final)/∂(raw) without the softcap
    bias: Tensor | None
    softcap: bool

    @property
    def needed(self) -> bool:
        return self.softcap or self.bias is not None or self.inner != 1.0

    @classmethod
    def of(cls, scale: float, softcap: float | None, temperature: float, bias: Tensor | None) -> _Shaping:
        slope = scale / temperature
        if softcap is None:
            return cls(slope, 1.0, slope, bias, False)
        return cls(scale / softcap, softcap / temperature, slope, bias, True)

    def slope_at(self, z: Tensor) -> Tensor | float:
        """∂(final)/∂(raw) from the final logits."""
        return self.slope * (1 - (z / self.outer).square()) if self.softcap else self.slope


def _around(x: Tensor) -> AbstractContextManager[object]:
    """What a launch on `x` runs in."""
    if _INTERPRET:
        return np.errstate(all="ignore")  # the branch that a `where` drops may overflow
    return torch.cuda.device(x.device)


def _launch(
    kernel: object,
    logits: Tensor,
    *args: object,
    registers_heavy: bool = False,
    least_block: int = 1,
    **constants: object,
) -> None:
    block = min(triton.next_power_of_2(logits.shape[1]), MAX_BLOCK)
    if registers_heavy and not _INTERPRET:
        block = min(block, MAX_BLOCK // 2)
    block = max(block, triton.next_power_of_2(least_block))
    options = {} if _INTERPRET else {"num_warps": 8, "enable_fp_fusion": True}
    with _around(logits):
        kernel[(logits.shape[0],)](*args, **constants, BLOCK=block, **options)  # type: ignore[index]


def _width(logits: Tensor) -> int:
    """Columns up to which the kernels read and write: those of the room that a row has."""
    return math.ceil(logits.shape[1] / ROOM) * ROOM


class TritonRows:
    """
    The rows of one chunk.

    Args:
        p ([`Problem`]): The call.
        logits (`torch.Tensor`): The student's logits without bias, `(n, V)` fp32; overwritten.
        teacher_logits (`torch.Tensor` or `None`): The teacher's, likewise.
        biases (`tuple`): Of the two heads, `(V,)` fp32 each or `None`.
        stats (`torch.Tensor`): `(len(p.stat_names), n)` fp32, written.
        gradient (`torch.Tensor` or `None`):
            `(n, V)`, written: the gradient of Σ weight · divergence, or of `upstream`, in the raw logits. May be
            `logits`.
        sl (`slice`): Which rows of the problem these are.
        upstream (`Upstream` or `None`): Gradients that reach the per-token values, instead of the problem's weights.
    """

    def __init__(
        self,
        p: Problem,
        logits: Tensor,
        teacher_logits: Tensor | None,
        biases: tuple[Tensor | None, Tensor | None],
        stats: Tensor,
        gradient: Tensor | None,
        sl: slice,
        upstream: Upstream | None,
    ):
        self.p, self.logits, self.teacher_logits, self.sl = p, logits, teacher_logits, sl
        self.stats, self.gradient = stats, gradient
        self.row_of = {name: i for i, name in enumerate(p.stat_names)}
        # A backward pass has no use for statistics that the divergence does not need
        self.overlap_top_k = p.overlap_top_k if upstream is None else 0
        self.further = p.further if upstream is None else {}  # the target's rank under the teacher, or nothing
        assert isinstance(p.temperature, float)  # `dispatch._torch_only` has seen to it
        temperature = p.temperature
        self.shaping = _Shaping.of(p.student_logit_scale, p.student_softcap, temperature, biases[0])
        if p.teacher is not None:
            head = p.teacher
            self.teacher_shaping = _Shaping.of(head.logit_scale, head.softcap, temperature, biases[1])
            if p.teacher_is_final:
                self.teacher_shaping = _Shaping(1.0, 1.0, 1.0, None, False)
        self.targets = None if p.target_ids is None else p.target_ids[sl].contiguous()
        if upstream is None:
            self.weight = None if p.weights is None else p.weights[sl].float().contiguous()
            self.logprob_weight = self.entropy_weight = None
        else:
            zeros = logits.new_zeros(logits.shape[0])
            parts = (upstream.divergence if p.has_teacher else None, upstream.logprobs, upstream.entropy)
            self.weight, self.logprob_weight, self.entropy_weight = (
                zeros if x is None else x[sl].float().contiguous() for x in parts
            )

    def run(self) -> None:
        """Statistics and gradient."""
        if self.teacher_logits is None:
            self.sparse()
        elif self.p.support == "full":
            self.dense(self.p.divergence, self.gradient)
        else:
            self.dense_on_support()

    def set(self, name: str, value: Tensor) -> None:
        self.stats[self.row_of[name]] = torch.where(value > 1e20, torch.inf, value)

    def dense(self, divergence: str, gradient: Tensor | None) -> Tensor:
        """Full-vocabulary statistics and gradient. Returns the normalisers, see `triton_rows.dense_kernel`."""
        p, logits, teacher_logits = self.p, self.logits, self.teacher_logits
        assert teacher_logits is not None
        norms = logits.new_empty(4, logits.shape[0])
        student, teacher = self.shaping, self.teacher_shaping
        p0, p1 = parameters(divergence, p.params) if divergence == p.divergence else (0.0, 0.0)
        upstream = self.logprob_weight is not None
        top_k = min(self.overlap_top_k, p.vocab_size)
        rank = "teacher_rank" in self.further
        sum_of_a = divergence not in CENTRED or upstream
        _launch(
            kernels.dense_kernel, logits,
            logits, teacher_logits, logits if gradient is None else gradient, student.bias, teacher.bias,
            self.targets, self.weight, self.logprob_weight, self.entropy_weight, self.stats, norms,
            logits.shape[1], _width(logits), logits.stride(0), teacher_logits.stride(0),
            (logits if gradient is None else gradient).stride(0), self.stats.stride(0), norms.stride(0),
            student.inner, student.outer, student.slope, teacher.inner, teacher.outer, p0, p1,
            top_k, self.row_of["teacher_rank"] if rank else 0,
            registers_heavy=sum_of_a, least_block=top_k,  # `top_threshold` starts from a block's k-th largest
            DIVERGENCE=divergence, GRADIENT=gradient is not None, SUM_OF_A=sum_of_a,
            STUDENT_SHAPED=student.needed, STUDENT_BIAS=student.bias is not None, STUDENT_SOFTCAP=student.softcap,
            TEACHER_SHAPED=teacher.needed, TEACHER_BIAS=teacher.bias is not None, TEACHER_SOFTCAP=teacher.softcap,
            TARGET=self.targets is not None, WEIGHT=self.weight is not None, UPSTREAM=upstream, OVERLAP=top_k > 0,
            RANK=rank,
        )  # fmt: skip
        return norms

    def _sums(self, logits: Tensor, shaping: _Shaping | None = None) -> Tensor:
        """Maximum, Σ exp(z − maximum) and Σ exp(z − maximum) z of each row, `(3, n)`; first the shaping, if given."""
        sums = logits.new_empty(3, logits.shape[0])
        shaping = shaping or _Shaping(1.0, 1.0, 1.0, None, False)
        _launch(
            kernels.partial_kernel, logits,
            logits, shaping.bias, sums, logits.shape[1], _width(logits), logits.stride(0), sums.stride(0),
            shaping.inner, shaping.outer,
            SHAPED=shaping.needed, BIAS=shaping.bias is not None, SOFTCAP=shaping.softcap,
        )  # fmt: skip
        return sums

    def dense_on_support(self) -> None:
        """A dense teacher on a part of the vocabulary."""
        p, teacher_logits = self.p, self.teacher_logits
        assert teacher_logits is not None
        norms = self.dense("forward_kl", None)
        ids = select_ids(self.logits, teacher_logits, p.support, p.support_size, p.shard)
        known, rests = [], []
        for logits, (maximum, log_sum) in ((self.logits, norms[:2]), (teacher_logits, norms[2:])):
            z = _take(logits, ids)
            scatter_valid(logits, ids, torch.full_like(z, _LOWEST))
            rest = self._sums(logits)
            known.append(z)
            rests.append((rest[0] - maximum - log_sum).exp() * rest[1])
        log_normalisers = [(m[:, None], x[:, None]) for m, x in ((norms[0], norms[1]), (norms[2], norms[3]))]
        student, teacher = ((z - m) - x for z, (m, x) in zip(known, log_normalisers, strict=True))
        support = Support(ids, student, teacher, rests[0], rests[1], p.support_size >= p.vocab_size)
        self._on_support(support, known[0], norms[0], norms[1], self.stats[self.row_of["student_entropy"]])

    def sparse(self) -> None:
        """A teacher of which only the top K is known, or none at all."""
        p, logits = self.p, self.logits
        if self.shaping.needed:
            self._sums(logits, self.shaping)  # for what it writes
        if self.targets is not None:
            self.set("student_logprobs", logits.gather(-1, self.targets[:, None]).squeeze(-1))  # a logit as yet
        if p.topk is None:
            ids = torch.full((logits.shape[0], 1), -1, dtype=torch.long, device=logits.device)
            z = _take(logits, ids)
        else:
            ids = p.topk[0][self.sl]
            ids = ids.masked_fill(ids >= p.vocab_size, -1)
            z = _take(logits, ids)
            if self.overlap_top_k:
                k = min(self.overlap_top_k, ids.shape[1], p.vocab_size)
                listed, top = p.topk[1][self.sl].masked_fill(ids < 0, -torch.inf).topk(k, dim=-1)
                best, there = logits.topk(k, dim=-1).values, z.gather(-1, top)
                self.set("overlap", overlap_share(best, there))
                self.set("overlap_advantage", overlap_advantage(best, there, listed))
            scatter_valid(logits, ids, torch.full_like(z, _LOWEST))
        maximum, total, weighted = self._sums(logits).double()
        # Rest and support put together, in float64
        logsumexp = torch.cat([(maximum + total.log())[:, None], z.double()], dim=-1).logsumexp(-1)
        log_s = z.double() - logsumexp[:, None]
        scale = (maximum - logsumexp).exp()
        mean = scale * weighted + (log_s.exp() * z.double().clamp(min=_LOWEST)).sum(-1)
        entropy = logsumexp - mean
        self.set("student_entropy", entropy)
        self.set("student_logsumexp", logsumexp)
        if self.targets is not None:
            logprobs = self.stats[self.row_of["student_logprobs"]]
            logprobs.copy_(logprobs.double() - logsumexp)
        # The exponent of the whole as two numbers: fp32 would round a large logit's normaliser
        largest = torch.maximum(maximum, z.amax(-1).double()).float()
        log_sum = (logsumexp - largest.double()).float()
        if p.topk is None:
            support = None
        else:
            support = known_teacher(ids, log_s.float(), (scale * total).float(), p.topk[1][self.sl], p.vocab_size)
            known = Listed.of(logits, support, p.shard)  # (the student's rank is not asked for)
            for name, value in further_statistics(self.further, known, self.targets).items():
                self.set(name, value)
        self._on_support(support, z, largest, log_sum, entropy.float())

    def _on_support(
        self, support: Support | None, z: Tensor, maximum: Tensor, log_sum: Tensor, entropy: Tensor
    ) -> None:
        """
        Value and gradient from a support whose logits `z` (n, K) have been taken out of `logits`.

        Outside the support the gradient is a multiple of s; on it, it is written entry by entry.
        """
        p, gradient = self.p, self.gradient
        factor, at_support, ids = torch.zeros_like(maximum), None, None
        if support is not None:
            result = support_divergence(support, p.divergence, p.params, p.tail)
            self.set("divergence", result.value)
            if self.teacher_logits is None:
                for name in ("forward_kl", "reverse_kl", "teacher_entropy"):
                    self.set(name, getattr(result, name))
            weight = 1.0 if self.weight is None else self.weight.double()
            factor = (weight * result.outside).float()
            at_support, ids = (result.support_gradient.T * weight).T, support.ids
        if gradient is None:
            return
        if self.logprob_weight is not None and self.entropy_weight is not None:
            factor = factor - self.logprob_weight
            if support is not None and at_support is not None:
                log_s = support.student_logprobs.double().clamp(min=_LOWEST)
                upstream = self.logprob_weight[:, None] + self.entropy_weight[:, None] * (log_s + entropy[:, None])
                at_support = at_support - log_s.exp() * upstream
        target_slope = None
        if self.logprob_weight is not None and self.targets is not None:
            # A target on the support has been taken out of the logits; its final logit is its log-prob's
            log_prob = self.stats[self.row_of["student_logprobs"]]
            target_slope = self.shaping.slope_at(log_prob + log_sum + maximum)
        logsumexp = torch.stack([maximum, log_sum])
        _launch(
            kernels.softmax_kernel, self.logits,
            self.logits, gradient, factor, self.entropy_weight, entropy.contiguous(), logsumexp,
            self.logits.shape[1], _width(self.logits), self.logits.stride(0), gradient.stride(0), logsumexp.stride(0),
            self.shaping.outer, self.shaping.slope,
            SOFTCAP=self.shaping.softcap, UPSTREAM=self.entropy_weight is not None,
        )  # fmt: skip
        if at_support is not None and ids is not None:
            scatter_valid(gradient, ids, (at_support * self.shaping.slope_at(z)).to(gradient.dtype))
        if target_slope is not None and self.logprob_weight is not None and self.targets is not None:
            at_target = (self.logprob_weight * target_slope).to(gradient.dtype)
            gradient.scatter_add_(-1, self.targets[:, None], at_target[:, None])


def _take(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits `(n, K)` at `ids`, `-inf` at padding."""
    return logits.gather(-1, ids.clamp(min=0)).clamp(min=_LOWEST).masked_fill(ids < 0, -torch.inf)
