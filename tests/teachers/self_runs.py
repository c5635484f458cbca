"""Runs of a student that is its own teacher, and the same by hand: plain autograd, full logits, two whole models."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from steps import build, full_logprobs, loss_mask, reverse_kl, student
from tiny import make_prompts, make_tokenizer
from torch import Tensor

HINT = "be brief "
LEARNING_RATE = 0.05
SGD = {"optim": "sgd", "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0}
PG = {"credit": "policy_gradient", "support": "sampled"}


def hinted_prompts(num: int = 32) -> Dataset:
    """Prompts that the teacher sees with a hint in front."""
    prompts = make_prompts(num)
    return prompts.add_column("teacher_prompt", [HINT + prompt for prompt in prompts["prompt"]])


def adapted(init: bool | str = False, **kwargs: Any) -> Any:
    """A student with an adapter; with `init=True` the adapter starts at zero."""
    torch.manual_seed(5)
    fields = {"r": 2, "target_modules": "all-linear", "init_lora_weights": init, **kwargs}
    return get_peft_model(student(), LoraConfig(**fields))


STUDENTS = {
    "full": student,
    "tied": lambda: student(tie_word_embeddings=True),
    "lora from zero": lambda: adapted(True),
    "lora": adapted,
    "lora and head": lambda: adapted(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
}


@dataclass
class Event:
    """One call of the loss."""

    training: bool
    inputs: dict[str, Any]
    loss: float


def run(output_dir: Any, model: Any, **fields: Any) -> tuple[Any, list[Event]]:
    """Train with `teacher_model="self"` (or another `teacher`), and keep what the loss was called with."""
    teacher = fields.pop("teacher", "self")
    arguments = {"train_dataset": hinted_prompts(), "eval_dataset": hinted_prompts(4), **fields.pop("arguments", {})}
    trainer = build(output_dir, teacher=teacher, model=model, arguments=arguments, **{**SGD, "max_steps": 4, **fields})
    events: list[Event] = []
    compute_loss = trainer._compute_loss

    def keep(model, inputs):
        kept = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        loss = compute_loss(model, inputs)
        events.append(Event(trainer.model.training, kept, loss.item()))
        return loss

    trainer._compute_loss = keep
    trainer.train()
    return trainer, events


@functools.cache
def _hinted_ids() -> dict[tuple[int, ...], list[int]]:
    """The teacher's prompt by the student's, as ids."""
    tokenizer = make_tokenizer()
    return {tuple(tokenizer(p)["input_ids"]): tokenizer(HINT + p)["input_ids"] for p in make_prompts(6)["prompt"]}


def hinted_logprobs(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Log-probs `(B, T, V)` of the completions after the hinted prompt, one sequence at a time without padding."""
    mask, hinted = inputs["completion_mask"].bool(), _hinted_ids()
    whole = []
    for i, completion in enumerate(inputs["completion_ids"]):
        ids = hinted[tuple(inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist())]
        logits = model(input_ids=torch.tensor([ids + completion[mask[i]].tolist()])).logits[0, len(ids) - 1 : -1]
        logprobs = torch.zeros(len(completion), logits.shape[-1], dtype=torch.float64)
        logprobs[: len(logits)] = logits.double().log_softmax(-1)
        whole.append(logprobs)
    return torch.stack(whole)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def weights_of(trainer: Any) -> dict[str, Tensor]:
    """The teacher's weights."""
    return trainer.teacher._weights


def by_hand(
    events: list[Event], make: Any, sync: str, steps: int = 1, rate: float = 0.05
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses of the reverse KL on the same rollouts, and the student's and the teacher's weights at the end."""
    model, teacher = make(), make()
    theta, theta_bar = trained(model), trained(teacher)
    losses, step = [], 0
    for event in events:
        mask = loss_mask(event.inputs)
        with torch.no_grad():
            t = hinted_logprobs(model if sync == "live" else teacher, event.inputs)
        loss = (reverse_kl(full_logprobs(model, event.inputs), t) * mask).sum() / mask.sum()
        losses.append(loss.item())
        if not event.training:
            continue
        gradients = torch.autograd.grad(loss, list(theta.values()))
        step += 1
        with torch.no_grad():
            for p, gradient in zip(theta.values(), gradients, strict=True):
                p -= LEARNING_RATE * gradient
            for name, p in theta.items():
                if sync == "ema" and step % steps == 0:
                    theta_bar[name].copy_((1 - rate) * theta_bar[name] + rate * p)
                if sync == "every_n" and step % steps == 0:
                    theta_bar[name].copy_(p)
    return losses, theta, theta_bar
