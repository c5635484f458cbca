# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The public op: checks, rows to project, choice of backend, and the result."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..losses import resolve_divergence
from .checks import BACKENDS as BACKENDS
from .checks import check_names, check_rows, checked_temperature
from .fused import GradientInForward, PerToken, weighted_divergence
from .members import MIXTURES, AffineTarget, TopK, check_mixture, checked_weights, list_members, make_target
from .modes import untraced
from .operands import Rows, check_head, choose_rows, gathered, move, operand_dtype, whole
from .problem import Problem, TokenWeighting
from .projection import logit_dtype
from .result import FusedDivergence, make_result
from .rows import TORCH_ONLY
from .statistics import IN_TRITON, check_statistics
from .supports import check_topk
from .vocab_parallel import VocabShard, make_shard

_CPU_CHUNK_BYTES = 128 << 20
_DEVICE_CHUNK_BYTES = 512 << 20


@untraced
def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor | None] | None = None,
    teacher_weight: Tensor | Sequence[Tensor | None] | None = None,
    *,
    divergence: str = "reverse_kl",
    divergence_kwargs: Mapping[str, Any] | None = None,
    token_weights: Tensor | None = None,
    mask: Tensor | None = None,
    target_ids: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    temperature: float | Tensor = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float | Sequence[float] = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | Sequence[float | None] | None = None,
    teacher_topk: TopK | Sequence[TopK | None] | None = None,
    mixture: str = "arithmetic",
    mixture_weights: Sequence[float] | Tensor | None = None,
    student_coef: float | Tensor = 0.0,
    contrast_scale: float = 15.0,
    contrast_floor: float = 1e-3,
    support: str = "full",
    support_size: int | None = None,
    tail: str = "bucket",
    overlap_top_k: int = 0,
    statistics: Mapping[str, int | None] | None = None,
    token_weighting: TokenWeighting | None = None,
    per_token_grad: bool = False,
    vocab_size: int | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
    gather: Callable[[], AbstractContextManager[None]] = nullcontext,
    backend: str = "auto",
) -> FusedDivergence:
    r"""
    Divergence between a student's and a teacher's next-token distributions, from hidden states and heads.

    Logits are softcap · tanh(scale · (h Wᵀ + b) / softcap) / temperature (without the softcap where it is `None`), in
    fp32 whatever the inputs, formed a few rows at a time. The gradient is formed in the forward pass, so the backward
    pass costs no GEMM. It flows to `student_hidden`, `student_weight` and `student_bias` only.

    Heads come as they are. FSDP2 shards (`DTensor`) are gathered, and a student's gets a gradient of its own
    placement, the mean over the processes (with `vocab_group` neither: they are its rows). ZeRO-3's partitions need
    `gather`. Of tensors on several devices, the work is done where the student's head is, and gradients return to
    where the inputs are. Under `torch.compile` the graph breaks around this call. There is no second derivative.

    If the heads have different numbers of rows (vocabulary padding), the shared first rows are compared and the others
    are masked out of both distributions.

    Several teachers are sequences of one entry each in the arguments `teacher_*`, with `None` where one has nothing;
    an argument that is no sequence is that of all. GEMMs of 2·N·H·V operations, for M teachers of hidden states:

    | | one teacher | M, any mixture |
    |---|---|---|
    | trained head | 4 | 3 + M |
    | frozen head | 3 | 2 + M |
    | `per_token_grad` | 6 | 4 + 2·M |

    Args:
        student_hidden (`torch.Tensor`): Last hidden states, shape `(N, H_s)`.
        student_weight (`torch.Tensor`): Head, shape `(V_s, H_s)`. Frozen (no `requires_grad`) costs one GEMM less.
        teacher_hidden (`torch.Tensor` or `Sequence`, *optional*): Shape `(N, H_t)`; of several teachers, one each.
        teacher_weight (`torch.Tensor` or `Sequence`, *optional*): Shape `(V_t, H_t)`.
        divergence (`str`, *optional*, defaults to `"reverse_kl"`): A name of `trl_opd.losses`.
        divergence_kwargs (`Mapping[str, Any]`, *optional*): Its parameters.
        token_weights (`torch.Tensor`, *optional*): Detached weight per token, shape `(N,)`; 1 by default.
        mask (`torch.Tensor`, *optional*):
            Rows to project, boolean, shape `(N,)`; by default those whose weight is not 0. Other rows cost nothing,
            get exactly zero gradient, and their statistics are 0.
        target_ids (`torch.Tensor`, *optional*):
            Sampled tokens, shape `(N,)`, for the two log-probs. An id outside the shared vocabulary is read as the
            last entry: leave such rows out.
        student_bias (`torch.Tensor`, *optional*), teacher_bias (`torch.Tensor`, *optional*):
            Shapes `(V_s,)`, `(V_t,)`.
        temperature (`float` or `torch.Tensor`, *optional*, defaults to `1.0`):
            Divides both models' logits; a tensor `(N,)` for one of each row, with dense teachers. The divergence is
            not multiplied by its square.
        student_logit_scale (`float`), teacher_logit_scale (`float`), student_softcap (`float`, *optional*),
        teacher_softcap (`float`, *optional*): The models' own logit post-processing.
        teacher_topk (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            A teacher of which only the top K is known, instead of hidden states: ids `(N, K)` and log-probs `(N, K)`
            at this `temperature`. Ids of a row are distinct; those below 0 are padding. A row without a real id is
            one about whose teacher nothing is known: value and gradient 0.
        mixture (`str`, *optional*, defaults to `"arithmetic"`):
            What several teachers make, with their probabilities p_k and weights w_k: `"arithmetic"` is the teacher
            Σ w_k p_k, `"geometric"` the one proportional to Π p_k^w_k, `"loss_sum"` is Σ w_k times the divergence from
            each (each on its own support). Top-k teachers have the last only. Two more are targets made of dense
            teachers' final logits z_k (after scale, softcap and temperature). `"affine"` aims at the logits
            Σ w_k z_k + `student_coef` · z_student, of one teacher too. `"contrast"` aims at z_1 + c (z_1 − z_2) of
            two, with c = `contrast_scale` · Σ_v |p_1 − p_2| + `contrast_floor` in each row, and divides the row's
            divergence by c. With these two, what is reported of the teacher is that of the first; `divergence` and the
            entries of a support are the target's.
        mixture_weights (`Sequence[float]` or `torch.Tensor`, *optional*):
            The w_k, above 0 and of sum 1 (any finite numbers with `"affine"`); a tensor `(N, M)` for weights that
            differ by token. Equal by default.
        student_coef (`float` or `torch.Tensor`, *optional*, defaults to `0.0`):
            Coefficient of the student's own final logits in an `"affine"` target, `(N,)` if it differs by token. That
            term carries no gradient.
        contrast_scale (`float`, *optional*, defaults to `15.0`): See `mixture`.
        contrast_floor (`float`, *optional*, defaults to `1e-3`): See `mixture`; above 0.
        support (`str`, *optional*, defaults to `"full"`):
            Entries to compare with a dense teacher: `"full"`, `"teacher_top_k"`, `"student_top_k"`, `"union_top_k"`,
            `"intersection_top_k"` (entries in both top sets; a row that has none is left at value and gradient 0).
        support_size (`int`, *optional*): K of those supports.
        tail (`str`, *optional*, defaults to `"bucket"`):
            What becomes of the entries outside a support: `"bucket"`, `"renormalize"` or `"none"`.
        overlap_top_k (`int`, *optional*, defaults to `0`):
            Size of the top sets whose overlap, and agreement on what is in both, is reported; 0 for none. Of a top-k
            teacher the sets are no larger than its list.
        statistics (`Mapping[str, int | None]`, *optional*):
            Further statistics to report in `.further`, by name: `"hellinger"`, `"total_variation"`, `"accepted"`
            (with k), `"teacher_margin"` (with k), `"teacher_rank"`, `"student_rank"`, `"teacher_max_logprob"`; see
            `trl_opd.kernels.statistics`.
        token_weighting (`Callable`, *optional*):
            A weight of each row that depends on its statistics: called with those of some rows by name, `(n,)` each
            and detached (all that the result has, and `statistics`), it returns `(n,)` weights, which are multiplied
            with `token_weights` before the gradient is formed. What it returns for a row must depend on that row
            alone; how many rows it sees at a time is not defined. Costs no product. With `mixture="loss_sum"` it sees
            the means over the teachers; with `per_token_grad` its weights are in `.loss` and not in `.divergence`.
        per_token_grad (`bool`, *optional*, defaults to `False`):
            Make `.divergence`, `.student_logprobs` and `.student_entropy` differentiable. The backward pass then
            projects again (6 GEMMs instead of 4). Without any teacher, log-probs and entropy alone.
        vocab_size (`int`, *optional*): Compare the first `vocab_size` entries only.
        vocab_group (`torch.distributed.ProcessGroup`, *optional*):
            The processes over which the heads' rows are spread, contiguous and in rank order: weights and biases are
            this process's rows, the same of both models. Everything else is the same on all of them: hidden states,
            weights of tokens, ids (of the whole vocabulary), settings. So are loss, statistics and the gradient of
            `student_hidden`, which is that of the whole head (do not sum it over the group again); the gradients of
            weight and bias are those of this process's rows. All must run the backward pass of `per_token_grad`.
        chunk_bytes (`int`, *optional*): Memory for a chunk's logits; 128 MiB on a CPU, 512 MiB elsewhere.
        gather (`Callable`, *optional*):
            Context in which partitioned heads are whole, such as ZeRO-3's `GatheredParameters`. Entered in the forward
            pass, unless they are whole because the caller holds it open, and in the backward pass of `per_token_grad`.
            ZeRO-3 reduces the head's gradient only if the call is made inside the model's own forward.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"torch"` is the chunked reference, `"triton"` does its elementwise work in Triton kernels on CUDA devices
            (fp32 logits; no `vocab_group`, target or temperature of each row, and of the `statistics` only
            `teacher_rank`), `"liger"` calls liger-kernel for what it computes correctly. `"auto"` takes Triton where
            it runs, else PyTorch.

    Returns:
        [`FusedDivergence`]

    Raises:
        ValueError: If shapes disagree, a name or parameter is unknown, or the backend cannot compute the request.
    """
    name, params = resolve_divergence(divergence, divergence_kwargs)
    members = list_members(
        teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap, teacher_topk
    )
    check_names(support, tail, backend, support_size, members)
    check_mixture(mixture, members)
    further = check_statistics(statistics, members, target_ids is not None)
    if token_weighting is not None and not members:
        raise ValueError("token_weighting needs a teacher: it weighs the divergence, and this call has none.")
    if not members and not per_token_grad:
        raise ValueError(
            "A teacher is required: pass teacher_hidden and teacher_weight, or teacher_topk. Without one only "
            "per_token_grad=True (log-probs and entropy) has a meaning."
        )
    per_row = {"token_weights": token_weights, "mask": mask, "target_ids": target_ids}
    if isinstance(mixture_weights, Tensor) and mixture_weights.dim() == 2:
        per_row["mixture_weights"] = mixture_weights
    for what, x in (("student_coef", student_coef), ("temperature", temperature)):
        if isinstance(x, Tensor) and x.dim() > 0:
            per_row[what] = x
    check_rows(student_hidden.shape[0], members, per_row)

    heads = [head for member in members if (head := member.head) is not None]
    with gathered(gather, student_weight, student_bias, *(x for head in heads for x in (head.weight, head.bias))):
        device = student_weight.device
        weight, bias = whole(student_weight, vocab_group), move(whole(student_bias, vocab_group), device)
        check_head("student", student_hidden, weight, bias)
        rows = choose_rows(student_hidden.shape[0], mask, token_weights, device)
        dtype = operand_dtype(student_hidden, weight)
        members = [member.taken(rows.take, device, dtype, vocab_group) for member in members]
        hidden, targets = rows.take(student_hidden), rows.take(target_ids)
        chunk_bytes = chunk_bytes or (_CPU_CHUNK_BYTES if device.type == "cpu" else _DEVICE_CHUNK_BYTES)
        in_step = {
            "The number of rows": hidden.shape[0],
            "chunk_bytes": chunk_bytes,
            "requires_grad of student_hidden": hidden.requires_grad,
            "requires_grad of student_weight": weight.requires_grad,
        }
        held = [member.head.weight for member in members if member.head is not None]
        shard = make_shard(vocab_group, weight, held, vocab_size, in_step)
        for member in members:
            if member.topk is not None:
                check_topk(*member.topk, shard.total)
        contrast = (contrast_scale, contrast_floor)
        target = make_target(mixture, mixture_weights, student_coef, contrast, len(members), rows.take, weight)
        if isinstance(target, AffineTarget) and target.is_teacher:
            target, members = None, members[:1]
        several = mixture in MIXTURES and (len(members) > 1 or (members and mixture_weights is not None))
        temperature = checked_temperature(temperature, members, rows, device)
        whole_rows = support == "full" and any(member.head is not None for member in members)
        torch_only = _torch_only(name, whole_rows, target, temperature, further)
        problem = Problem(
            divergence=name,
            params=params,
            members=tuple(members),
            mixture=mixture,
            mixture_weights=checked_weights(mixture_weights, len(members), rows.take, weight) if several else None,
            student_logit_scale=student_logit_scale,
            student_softcap=student_softcap,
            temperature=temperature,
            weights=None if token_weights is None else rows.take(token_weights.detach()),
            target_ids=None if targets is None else targets.clamp(0, shard.total - 1),
            support=support,
            support_size=support_size or 0,
            tail=tail,
            overlap_top_k=overlap_top_k if members else 0,
            vocab_size=shard.widths[shard.rank],
            shard=shard,
            compute_dtype=dtype,
            chunk_bytes=chunk_bytes,
            grad_enabled=torch.is_grad_enabled(),
            backend=_choose_backend(backend, device, dtype, shard, torch_only),
            gather=gather,
            target=target,
            further=further,
            token_weighting=token_weighting,
        )
        return _run(rows, hidden, weight, bias, problem, backend, per_token_grad)


def _run(
    rows: Rows,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    problem: Problem,
    backend: str,
    per_token_grad: bool,
) -> FusedDivergence:
    """The backend's answer."""
    stats: Tensor | None = None
    per_token: dict[str, Tensor] = {}
    if backend == "liger":
        from .liger import liger_divergence

        loss = liger_divergence(hidden, weight, bias, problem, per_token_grad)
    elif per_token_grad:
        values = PerToken.apply(hidden, weight, bias, problem)
        per_token = dict(zip(("divergence", "student_logprobs", "student_entropy"), values[:3], strict=True))
        stats = values[3]
        if problem.has_teacher:
            loss = weighted_divergence(per_token["divergence"], stats, problem).sum()
        else:
            loss = per_token["student_entropy"].sum() * 0.0
    else:
        loss, stats = GradientInForward.apply(hidden, weight, bias, problem)
    return make_result(loss, stats, per_token, rows, problem)


def _choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype, shard: VocabShard, torch_only: str | None
) -> str:
    """Whether Triton or PyTorch does the arithmetic of the rows."""
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        reason = torch_only or why_not_triton(device, dtype, shard.group)
        if reason is None:
            return "triton"
        if backend == "triton":
            raise ValueError(f"backend='triton' cannot be used: {reason}. Use backend='auto' or 'torch'.")
    return "torch"


def _torch_only(
    divergence: str, whole_rows: bool, target: object, temperature: float | Tensor, further: Mapping[str, int | None]
) -> str | None:
    """What of a request the Triton kernels do not do; `None` if they do it all."""
    if divergence in TORCH_ONLY and whole_rows:
        return f"its kernels have no core for {divergence} over the full vocabulary"
    if target is not None:
        return "its kernels compare with the teacher itself, not with an affine or contrast target"
    if isinstance(temperature, Tensor):
        return "its kernels take one temperature for all rows"
    unknown = sorted(further.keys() - {*IN_TRITON})
    if unknown:
        return f"its kernels do not find out statistics={unknown}"
    return None


def why_not_triton(
    device: torch.device, dtype: torch.dtype = torch.float32, vocab_group: dist.ProcessGroup | None = None
) -> str | None:
    """Why `backend="triton"` cannot serve operands of this kind; `None` if it can."""
    if vocab_group is not None:
        return "with vocab_group, row sums travel between processes in the middle of its passes"
    try:
        from .triton_backend import unusable
    except ImportError as error:  # no wheel for this system, or the files are gone
        return f"it cannot be imported ({error})"
    return unusable(device, logit_dtype(dtype))
