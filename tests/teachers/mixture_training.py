"""Runs with several teachers of every sample, and the same by hand: plain autograd over full logits."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from routed_runs import TOPK, by_hand, topk_ids, topk_teacher
from self_runs import Event, run, trained
from steps import full_logprobs, sampled, student
from tiny import VOCAB_SIZE, make_prompts
from torch import Tensor

from trl_opd.collators import TeacherScores

WEIGHTS = [0.3, 0.7]
OTHER_TOPK = torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64)


def other_ids(completion_ids: Tensor) -> Tensor:
    return torch.stack([completion_ids, (completion_ids + 2) % VOCAB_SIZE, (completion_ids + 9) % VOCAB_SIZE], dim=-1)


def other_topk_teacher(batch: Any) -> TeacherScores:
    """Three entries a token, of other ids and probabilities than `topk_teacher`'s."""
    ids = other_ids(batch.completion_ids)
    return TeacherScores(
        topk_ids=ids,
        topk_logprobs=OTHER_TOPK.log().expand(ids.shape),
        sampled_logprobs=OTHER_TOPK[0].log().expand(ids.shape[:2]),
    )


LISTS = {topk_teacher: (topk_ids, TOPK), other_topk_teacher: (other_ids, OTHER_TOPK)}

# What a teacher and the student are to each other: their log-probs `(B, T, entries)` on the same entries
Views = Callable[[Any, dict[str, Any]], tuple[Tensor, Tensor]]


def of_model(teacher: Any) -> Views:
    """Both over the whole vocabulary; the teacher does not move."""

    def views(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            t = full_logprobs(teacher, inputs)
        return full_logprobs(model, inputs), t

    return views


def of_topk(teacher: Any) -> Views:
    """Both over the teacher's entries and one for the rest."""
    ids_of, probs = LISTS[teacher]

    def views(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        s = full_logprobs(model, inputs).exp().gather(-1, ids_of(inputs["completion_ids"]))
        s, t = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1).log() for p in (s, probs.expand(s.shape)))
        return s, t

    return views


def weights_for(members: Sequence[Any]) -> list[float]:
    return WEIGHTS if len(members) == 2 else [1.0]


def mixed_value(members: Sequence[Views], mixture: str, divergence: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """The divergence of each token from two teachers of the weights `WEIGHTS`, or from one."""
    weights = weights_for(members)

    def value(model: Any, inputs: dict[str, Any]) -> Tensor:
        pairs = [views(model, inputs) for views in members]
        if mixture == "loss_sum":
            return sum(w * divergence(s, t) for w, (s, t) in zip(weights, pairs, strict=True))
        if mixture == "arithmetic":
            probs = sum(w * t.exp() for w, (_, t) in zip(weights, pairs, strict=True))
        else:
            probs = torch.stack([t.exp() ** w for w, (_, t) in zip(weights, pairs, strict=True)]).prod(0)
            probs = probs / probs.sum(-1, keepdim=True)
        return divergence(pairs[0][0], probs.log())

    return value


def advantage_of_mixture(members: Sequence[Any], mixture: str) -> Any:
    """The policy gradient's surrogate −min(A r, A clip(r)) with r = π/π_old on the student's own rollouts."""
    weights = weights_for(members)

    def value(model: Any, inputs: dict[str, Any]) -> Tensor:
        logprobs = sampled(full_logprobs(model, inputs), inputs)
        probs = []
        for teacher in members:
            if teacher in LISTS:
                probs.append(LISTS[teacher][1][0].expand(logprobs.shape))
                continue
            with torch.no_grad():
                probs.append(sampled(full_logprobs(teacher, inputs), inputs).exp())
        if mixture == "arithmetic":
            theirs = sum(w * p for w, p in zip(weights, probs, strict=True)).log()
        else:
            theirs = sum(w * p.log() for w, p in zip(weights, probs, strict=True))
        old = inputs.get("old_per_token_logps", logprobs.detach())
        ratio, advantage = (logprobs - old).exp(), theirs - old
        return -torch.minimum(advantage * ratio, advantage * ratio.clamp(0.8, 1.2))

    return value


def assert_as_by_hand(
    tmp_path: Any, teacher: Any, value: Any, make: Any = student, prompts: Any = make_prompts, **fields: Any
) -> tuple[Any, list[Event]]:
    """Losses and SGD-updated weights of a run are those of `value` (see `routed_runs.by_hand`)."""
    datasets = {"train_dataset": prompts(32), "eval_dataset": prompts(32)}
    defaults = {"loss_type": "bnpo", "max_steps": 3, "shuffle_dataset": False}
    trainer, events = run(tmp_path, make(), teacher=teacher, arguments=datasets, **{**defaults, **fields})
    losses, theta = by_hand(events, make(), value)
    assert [event.loss for event in events] == pytest.approx(losses, rel=1e-5)
    moved = make().state_dict()
    for name, weight in theta.items():
        torch.testing.assert_close(trained(trainer.model)[name], weight, rtol=0, atol=2e-6)
    assert any((moved[name] - weight).abs().max() > 1e-3 for name, weight in theta.items())
    return trainer, events
