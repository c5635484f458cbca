# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The public op: checks, rows to project, choice of backend, and the result."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import nearest_name, resolve_divergence
from .fused import STATS, GradientInForward, PerToken, Problem
from .projection import Head
from .supports import SUPPORTS, TAILS

BACKENDS = ("auto", "torch", "liger")
_CPU_CHUNK_BYTES = 64 << 20
_DEVICE_CHUNK_BYTES = 512 << 20


@dataclass
class FusedDivergence:
    """
    Result of [`fused_linear_divergence`]. Per-token tensors have shape `(N,)`, dtype float32 (float64 for float64
    inputs), are in nats, and are 0 on rows that were left out.

    Args:
        loss (`torch.Tensor`):
            Scalar Σ weight · divergence, differentiable in the student's hidden states, weight and bias.
        divergence (`torch.Tensor` or `None`):
            Value per token, on the support asked for. With `backend="liger"` this and all that follow except `rows`
            are `None`: Liger returns the scalar only, and projecting again for metrics would cost what it saves.
        forward_kl (`torch.Tensor`), reverse_kl (`torch.Tensor`):
            KL(teacher‖student) and KL(student‖teacher) per token, whatever the divergence. Over the whole vocabulary
            with a dense teacher; with a top-k teacher over its support and one bucket for the rest (a lower bound).
        student_entropy (`torch.Tensor`), teacher_entropy (`torch.Tensor`):
            Entropies. A top-k teacher's is that of the bucketed distribution (a lower bound).
        student_logprobs (`torch.Tensor` or `None`), teacher_logprobs (`torch.Tensor` or `None`):
            Log-probs of `target_ids`; `None` without them (the teacher's also with a top-k teacher).
        overlap (`torch.Tensor` or `None`):
            Share of the teacher's top `overlap_top_k` entries that are in the student's; `None` if not asked for.
        rows (`torch.Tensor`):
            Boolean mask of the rows that were projected.
    """

    loss: Tensor
    divergence: Tensor | None
    forward_kl: Tensor | None
    reverse_kl: Tensor | None
    student_entropy: Tensor | None
    teacher_entropy: Tensor | None
    student_logprobs: Tensor | None
    teacher_logprobs: Tensor | None
    overlap: Tensor | None
    rows: Tensor


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    divergence: str = "reverse_kl",
    divergence_kwargs: Mapping[str, float] | None = None,
    token_weights: Tensor | None = None,
    mask: Tensor | None = None,
    target_ids: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    support: str = "full",
    support_size: int | None = None,
    tail: str = "bucket",
    overlap_top_k: int = 0,
    per_token_grad: bool = False,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    gather: Callable[[], AbstractContextManager[None]] = nullcontext,
    backend: str = "auto",
) -> FusedDivergence:
    r"""
    Divergence between a student's and a teacher's next-token distributions, from hidden states and heads.

    Logits are softcap · tanh(scale · (h Wᵀ + b) / softcap) / temperature (without the softcap where it is `None`), in
    fp32 whatever the inputs, formed a few rows at a time. The gradient is formed in the forward pass, so the backward
    pass costs no GEMM. It flows to `student_hidden`, `student_weight` and `student_bias` only.

    If the heads have different numbers of rows (vocabulary padding), the shared first rows are compared and the others
    are masked out of both distributions.

    Args:
        student_hidden (`torch.Tensor`): Last hidden states, shape `(N, H_s)`.
        student_weight (`torch.Tensor`): Head, shape `(V_s, H_s)`. Frozen (no `requires_grad`) costs one GEMM less.
        teacher_hidden (`torch.Tensor`, *optional*): Shape `(N, H_t)`.
        teacher_weight (`torch.Tensor`, *optional*): Shape `(V_t, H_t)`.
        divergence (`str`, *optional*, defaults to `"reverse_kl"`): A name of `trl_opd.losses`.
        divergence_kwargs (`Mapping[str, float]`, *optional*): Its parameters.
        token_weights (`torch.Tensor`, *optional*): Detached weight per token, shape `(N,)`; 1 by default.
        mask (`torch.Tensor`, *optional*):
            Rows to project, boolean, shape `(N,)`; by default those whose weight is not 0. Other rows cost nothing,
            get exactly zero gradient, and their statistics are 0.
        target_ids (`torch.Tensor`, *optional*):
            Sampled tokens, shape `(N,)`, for the two log-probs. An id outside the shared vocabulary is read as the
            last entry: leave such rows out.
        student_bias (`torch.Tensor`, *optional*), teacher_bias (`torch.Tensor`, *optional*):
            Shapes `(V_s,)`, `(V_t,)`.
        temperature (`float`, *optional*, defaults to `1.0`): Divides both models' logits. The divergence is not
            multiplied by its square.
        student_logit_scale (`float`), teacher_logit_scale (`float`), student_softcap (`float`, *optional*),
        teacher_softcap (`float`, *optional*): The models' own logit post-processing.
        teacher_topk (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            A teacher of which only the top K is known, instead of hidden states: ids `(N, K)` and log-probs `(N, K)`
            at this `temperature`. Ids of a row are distinct; those below 0 are padding, beside at least one real id.
        support (`str`, *optional*, defaults to `"full"`):
            Entries to compare with a dense teacher: `"full"`, `"teacher_top_k"`, `"student_top_k"`, `"union_top_k"`.
        support_size (`int`, *optional*): K of those supports.
        tail (`str`, *optional*, defaults to `"bucket"`):
            What becomes of the entries outside a support: `"bucket"`, `"renormalize"` or `"none"`.
        overlap_top_k (`int`, *optional*, defaults to `0`): Size of the top sets whose overlap is reported; 0 for none.
        per_token_grad (`bool`, *optional*, defaults to `False`):
            Make `.divergence`, `.student_logprobs` and `.student_entropy` differentiable. The backward pass then
            projects again (6 GEMMs instead of 4). Without any teacher, log-probs and entropy alone.
        vocab_size (`int`, *optional*): Compare the first `vocab_size` entries only.
        chunk_bytes (`int`, *optional*): Memory for a chunk's logits; 64 MiB on a CPU, 512 MiB elsewhere.
        gather (`Callable`, *optional*): Context in which partitioned weights are whole (ZeRO-3), entered in the
            backward pass of `per_token_grad`; the caller holds it open in the forward pass.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"torch"` is the chunked reference, `"liger"` calls liger-kernel for what it computes correctly, `"auto"`
            chooses the fastest that is exact.

    Returns:
        [`FusedDivergence`]

    Raises:
        ValueError: If shapes disagree, a name or parameter is unknown, or the backend cannot compute the request.
    """
    name, params = resolve_divergence(divergence, divergence_kwargs)
    _check_names(support, tail, backend, support_size, teacher_topk, temperature)
    n = student_hidden.shape[0]
    sizes = [student_weight.shape[0]]
    head = None
    if teacher_hidden is not None or teacher_weight is not None:
        head = _check_dense_teacher(n, teacher_hidden, teacher_weight, teacher_topk)
        head.bias, head.logit_scale, head.softcap = teacher_bias, teacher_logit_scale, teacher_softcap
        sizes.append(head.weight.shape[0])
    elif teacher_topk is None and not per_token_grad:
        raise ValueError(
            "A teacher is required: pass teacher_hidden and teacher_weight, or teacher_topk. Without one only "
            "per_token_grad=True (log-probs and entropy) has a meaning."
        )
    if vocab_size is not None:
        sizes.append(vocab_size)
    size = min(sizes)
    per_row = {"token_weights": token_weights, "mask": mask, "target_ids": target_ids}
    if teacher_topk is not None:
        per_row |= {"teacher_topk ids": teacher_topk[0], "teacher_topk log-probs": teacher_topk[1]}
    for what, tensor in per_row.items():
        if tensor is not None and tensor.shape[0] != n:
            raise ValueError(f"{what} must have one row per token ({n}), got shape {tuple(tensor.shape)}.")

    if mask is not None:
        rows = mask.bool()
    elif token_weights is not None:
        rows = token_weights != 0
    else:
        rows = torch.ones(n, dtype=torch.bool, device=student_hidden.device)
    every = mask is None and token_weights is None

    def take(x: Tensor | None) -> Tensor | None:
        return x if x is None or every else x[rows]

    device_type = student_hidden.device.type
    dtype = _operand_dtype(student_hidden, student_weight)
    teacher_dtype = dtype
    if teacher_hidden is not None and head is not None and dtype != torch.float64:
        teacher_dtype = _operand_dtype(teacher_hidden, head.weight)
        teacher_dtype = torch.float32 if teacher_dtype == torch.float64 else teacher_dtype
    targets = take(target_ids)
    problem = Problem(
        divergence=name,
        params=params,
        teacher_hidden=None if teacher_hidden is None else take(teacher_hidden.detach()),
        teacher=head,
        student_logit_scale=student_logit_scale,
        student_softcap=student_softcap,
        temperature=temperature,
        weights=None if token_weights is None else take(token_weights.detach()),
        target_ids=None if targets is None else targets.clamp(0, size - 1),
        support=support,
        support_size=support_size or 0,
        tail=tail,
        topk=None if teacher_topk is None else tuple(take(x) for x in teacher_topk),  # type: ignore[arg-type]
        overlap_top_k=overlap_top_k if head is not None or teacher_topk is not None else 0,
        vocab_size=size,
        compute_dtype=dtype,
        teacher_dtype=teacher_dtype,
        chunk_bytes=chunk_bytes or (_CPU_CHUNK_BYTES if device_type == "cpu" else _DEVICE_CHUNK_BYTES),
        grad_enabled=torch.is_grad_enabled(),
        gather=gather,
    )
    hidden = take(student_hidden)
    assert hidden is not None
    if backend == "liger":
        from .liger import liger_divergence

        loss, stats = liger_divergence(hidden, student_weight, student_bias, problem, per_token_grad), None
        per_token: dict[str, Tensor] = {}
    elif per_token_grad:
        values = PerToken.apply(hidden, student_weight, student_bias, problem)
        per_token = dict(zip(("divergence", "student_logprobs", "student_entropy"), values[:3], strict=True))
        stats = values[3]
        weighted = per_token["divergence"] if problem.weights is None else per_token["divergence"] * problem.weights
        loss = weighted.sum() if problem.has_teacher else per_token["student_entropy"].sum() * 0.0
    else:
        loss, stats = GradientInForward.apply(hidden, student_weight, student_bias, problem)
        per_token = {}
    return _result(loss, stats, per_token, rows, every, problem)


def _operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which hidden states meet the head: autocast's, or the wider of the two."""
    if hidden.dtype == torch.float64:
        return torch.float64
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _check_names(
    support: str,
    tail: str,
    backend: str,
    support_size: int | None,
    teacher_topk: tuple[Tensor, Tensor] | None,
    temperature: float,
) -> None:
    if support not in SUPPORTS or support == "sampled":
        valid = [s for s in SUPPORTS if s != "sampled"]
        raise ValueError(f"support must be a vocabulary support, got {support!r}.{nearest_name(support, valid)}")
    if tail not in TAILS:
        raise ValueError(f"tail must be a known name, got {tail!r}.{nearest_name(tail, list(TAILS))}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be a known name, got {backend!r}.{nearest_name(backend, list(BACKENDS))}")
    if support != "full" and teacher_topk is None and (support_size is None or support_size < 1):
        raise ValueError(f"support_size must be at least 1 for support={support!r}, got {support_size!r}.")
    size = teacher_topk[0].shape[1] if teacher_topk is not None else support_size
    restricted = teacher_topk is not None or support != "full"
    if restricted and tail == "renormalize" and size == 1 and support != "union_top_k":
        raise ValueError(
            "support_size must be at least 2 with tail='renormalize', got 1. One renormalised entry has probability 1 "
            "in both distributions: value and gradient are identically zero. Use a larger support or tail='bucket'."
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}. It divides the logits.")


def _check_dense_teacher(
    n: int,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_topk: tuple[Tensor, Tensor] | None,
) -> Head:
    if teacher_hidden is None or teacher_weight is None:
        raise ValueError("teacher_hidden and teacher_weight go together: pass both, or teacher_topk.")
    if teacher_topk is not None:
        raise ValueError("teacher_topk replaces teacher_hidden and teacher_weight: pass the one or the others.")
    if teacher_hidden.shape[0] != n:
        raise ValueError(
            f"teacher_hidden must have one row per student row ({n}), got {teacher_hidden.shape[0]}. The two models "
            "must be compared at the same positions."
        )
    return Head(teacher_weight.detach())


def _result(
    loss: Tensor, stats: Tensor | None, per_token: dict[str, Tensor], rows: Tensor, every: bool, problem: Problem
) -> FusedDivergence:
    missing = set(STATS) if stats is None else set()
    if problem.target_ids is None:
        missing |= {"student_logprobs", "teacher_logprobs"}
    if problem.teacher is None:
        missing.add("teacher_logprobs")
    if not problem.overlap_top_k:
        missing.add("overlap")
    if not problem.has_teacher:
        missing |= {"forward_kl", "reverse_kl", "teacher_entropy"}

    def spread(name: str, value: Tensor) -> Tensor | None:
        if name in missing:
            return None
        if every:
            return value
        return value.new_zeros(rows.shape).masked_scatter(rows, value)

    if not problem.has_teacher:
        missing.add("divergence")

    values: dict[str, Tensor | None] = dict.fromkeys(STATS)
    if stats is not None:
        values = {name: spread(name, per_token.get(name, stats[i])) for i, name in enumerate(STATS)}
    return FusedDivergence(loss=loss, rows=rows, **values)
