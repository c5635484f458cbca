# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The divergences that liger-kernel computes correctly, by its chunked JSD (`liger_kernel.chunked_loss`).

Everything else is refused with the reason, as measured on liger-kernel 0.8.5: below fp32 its log-softmax runs in the
logits' dtype, which near a matched teacher is wrong by more than the value; a teacher with a larger vocabulary is met
with student logits of 0; it has no per-token weights, no softcap and no per-token values. It forms the head's gradient
even for a frozen head, so it is a cross-check rather than a speed-up.
"""

import torch
from torch import Tensor

from .problem import Problem

_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}


def _refuse(what: str, reason: str) -> ValueError:
    return ValueError(f"loss_backend='liger' cannot compute {what}. {reason} Use loss_backend='auto' or 'torch'.")


def _check(hidden: Tensor, weight: Tensor, problem: Problem, per_token_grad: bool) -> float:
    """The β of Liger's JSD for this problem, or an error."""
    if len(problem.members) > 1:
        raise _refuse("several teachers", "Liger compares with one.")
    if problem.target is not None or problem.further or problem.token_weighting is not None:
        raise _refuse("targets, further statistics or a token_weighting", "Liger compares with the teacher itself.")
    if isinstance(problem.temperature, torch.Tensor):
        raise _refuse("a temperature of each token", "Liger takes one number.")
    if problem.divergence not in (*_BETA, "generalized_jsd"):
        raise _refuse(problem.divergence, "Liger has forward KL, reverse KL and the generalized JSD only.")
    if problem.teacher is None or problem.support != "full":
        raise _refuse("a top-k support", "Liger compares whole vocabularies.")
    if problem.shard.group is not None:
        raise _refuse("heads that are spread over processes", "Liger takes whole heads.")
    if per_token_grad:
        raise _refuse("differentiable per-token values", "Liger returns a scalar.")
    if problem.teacher.weight.shape[0] != weight.shape[0]:
        raise _refuse(
            f"heads of {weight.shape[0]} and {problem.teacher.weight.shape[0]} entries",
            "Liger pads the student's logits with 0, which gives the padding probability.",
        )
    if problem.vocab_size != weight.shape[0]:
        raise _refuse(f"the first {problem.vocab_size} of {weight.shape[0]} entries", "Liger compares all of them.")
    if problem.compute_dtype != torch.float32:
        raise _refuse(
            f"{problem.compute_dtype} logits",
            "Its log-softmax runs in the logits' dtype: in bf16 near a matched teacher the loss is off by 340%.",
        )
    plain = (problem.student_softcap, problem.teacher.softcap) == (None, None)
    if not plain or (problem.student_logit_scale, problem.teacher.logit_scale) != (1.0, 1.0):
        raise _refuse("a softcap or a logit scale", "Liger takes the plain projection.")
    if problem.weights is not None and problem.weights.numel() and bool((problem.weights != problem.weights[0]).any()):
        raise _refuse("token weights that differ", "Liger takes a mean. A token-mean loss_type has equal weights.")
    return _BETA.get(problem.divergence, problem.params.get("beta", 0.5))


def liger_divergence(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, per_token_grad: bool
) -> Tensor:
    """Σ weight · divergence through Liger; the arguments of `fused_linear_divergence` as a [`Problem`]."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    beta = _check(hidden, weight, problem, per_token_grad)
    (member,) = problem.members
    assert member.head is not None and member.hidden is not None
    if hidden.shape[0] == 0:
        return hidden.sum() + 0.0 * weight.sum() + (0.0 if bias is None else 0.0 * bias.sum())
    labels = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    mean = LigerFusedLinearJSDFunction.apply(
        hidden,
        weight,
        member.hidden.to(problem.compute_dtype),
        member.head.weight.detach().to(problem.compute_dtype),
        labels,
        bias,
        member.head.bias,
        0.0,  # weight of the hard loss
        1.0,  # weight of the soft loss
        beta,
        -100,  # ignore_index
        problem.temperature,
        False,  # compiled
        max(1, problem.num_rows(hidden.shape[0], hidden.device, torch.float32)),
    )
    scale = hidden.shape[0] if problem.weights is None else problem.weights.sum()
    return mean * scale
