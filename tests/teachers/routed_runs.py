"""Batches whose samples go to different teachers, and the same by hand: each sample with its own, full logits."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from self_runs import LEARNING_RATE, Event, trained
from steps import full_logprobs, loss_mask, sampled
from tiny import VOCAB_SIZE, make_model, make_prompts, make_tokenizer
from torch import Tensor

from trl_opd.collators import TeacherScores

# By prompt; their lengths differ within both
TEACHER_OF = {"abc": "a", "hello world": "b", "x": "b", "the quick brown fox": "a", "12 34": "b", "what is it": "a"}


def routed_prompts(num: int = 32, only: str | None = None) -> Dataset:
    """Prompts with the name of their teacher; with `only` those of one teacher alone."""
    prompts = [p for p in make_prompts(6)["prompt"] if only in (None, TEACHER_OF[p])]
    prompts = [prompts[i % len(prompts)] for i in range(num)]
    return Dataset.from_dict({"prompt": prompts, "teacher": [TEACHER_OF[p] for p in prompts]})


def wide() -> Any:
    return make_model(hidden_size=24, seed=1).double()


def wider() -> Any:
    return make_model(hidden_size=40, seed=2).double()


def topk_ids(completion_ids: Tensor) -> Tensor:
    return torch.stack([completion_ids, (completion_ids + 1) % VOCAB_SIZE], dim=-1)


TOPK = torch.tensor([0.6, 0.3], dtype=torch.float64)


def topk_teacher(batch: Any) -> TeacherScores:
    """Two entries a token that depend on the sampled token alone, answered at generation time."""
    ids = topk_ids(batch.completion_ids)
    return TeacherScores(
        topk_ids=ids, topk_logprobs=TOPK.log().expand(ids.shape), sampled_logprobs=TOPK[0].log().expand(ids.shape[:2])
    )


class Recorder:
    """A teacher that answers at generation time and remembers what it was asked."""

    name = "recorder"

    def __init__(self):
        self.asked: list[Any] = []

    def __call__(self, batch):
        self.asked.append(batch)
        return topk_teacher(batch)


Value = Callable[[Any, dict[str, Any]], Tensor]  # of each token, from the student and the batch


def against(teacher: Any, divergence: Callable[[Tensor, Tensor], Tensor]) -> Value:
    """The divergence from a model that does not move."""

    def value(model: Any, inputs: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            t = full_logprobs(teacher, inputs)
        return divergence(full_logprobs(model, inputs), t)

    return value


def against_topk(divergence: Callable[[Tensor, Tensor], Tensor]) -> Value:
    """The divergence from `topk_teacher` on its entries and one for the rest."""

    def value(model: Any, inputs: dict[str, Any]) -> Tensor:
        s = full_logprobs(model, inputs).exp().gather(-1, topk_ids(inputs["completion_ids"]))
        t = TOPK.expand(s.shape)
        s, t = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1).log() for p in (s, t))
        return divergence(s, t)

    return value


def advantage_of(teacher: Any) -> Value:
    """The policy gradient's surrogate −A π/π_old on the student's own rollouts."""

    def value(model: Any, inputs: dict[str, Any]) -> Tensor:
        logprobs = sampled(full_logprobs(model, inputs), inputs)
        if teacher is topk_teacher:
            theirs = TOPK[0].log()
        else:
            with torch.no_grad():
                theirs = sampled(full_logprobs(teacher, inputs), inputs)
        gap = theirs - logprobs.detach()
        return -gap * (logprobs - logprobs.detach()).exp()

    return value


def is_of(name: str, inputs: dict[str, Any]) -> Tensor:
    """Which samples go to a teacher, from their prompts alone."""
    names = {tuple(make_tokenizer()(p)["input_ids"]): teacher for p, teacher in TEACHER_OF.items()}
    rows = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
    return torch.tensor([names[tuple(ids[mask].tolist())] == name for ids, mask in rows])


def routed_value(values: dict[str, Value]) -> Value:
    """Each sample's value from its own teacher."""

    def value(model: Any, inputs: dict[str, Any]) -> Tensor:
        whole = torch.zeros(inputs["completion_ids"].shape, dtype=torch.float64)
        for name, of_one in values.items():
            whole = whole + torch.where(is_of(name, inputs)[:, None], of_one(model, inputs), 0.0)
        return whole

    return value


def by_hand(events: list[Event], model: Any, value: Value) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of SGD with the mean over each batch's tokens (`loss_type="bnpo"`)."""
    theta, losses = trained(model), []
    for event in events:
        mask = loss_mask(event.inputs)
        loss = (value(model, event.inputs) * mask).sum() / mask.sum()
        losses.append(loss.item())
        if not event.training:
            continue
        gradients = torch.autograd.grad(loss, list(theta.values()))
        with torch.no_grad():
            for p, gradient in zip(theta.values(), gradients, strict=True):
                p -= LEARNING_RATE * gradient
    return losses, theta
