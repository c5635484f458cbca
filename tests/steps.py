"""Optimizer steps of a trainer, taken apart: the rollouts, the losses and the gradient, and the same by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import make_model, make_prompts, make_tokenizer, trainer_config
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer

MAX_LENGTH = 8  # of a completion, in tiny.trainer_config


@dataclass
class Step:
    """What one `train()` did: the micro-batches, their losses, and the gradient before the first optimizer step."""

    trainer: Any
    batches: list[dict[str, Any]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    gradient: dict[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        return torch.stack(self.losses).sum()

    @property
    def logs(self) -> dict[str, float]:
        return self.trainer.state.log_history[0]


class _KeepGradient(TrainerCallback):
    def __init__(self, step: Step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if not self.step.gradient:
            named = model.named_parameters()
            self.step.gradient = {name: p.grad.clone() for name, p in named if p.grad is not None}


def record(trainer: GRPOTrainer) -> Step:
    """Keep a trainer's micro-batches, losses and first gradient."""
    step = Step(trainer)
    compute_loss = trainer._compute_loss

    def keep(model, inputs):
        step.batches.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()})
        loss = compute_loss(model, inputs)
        step.losses.append(loss.detach().clone())
        return loss

    trainer._compute_loss = keep
    trainer.add_callback(_KeepGradient(step))
    return step


def student(**kwargs: Any) -> Any:
    """The student that `build` trains: float64, and a dozen of its tokens end a completion, so that lengths differ."""
    model = make_model(**kwargs).double()
    model.generation_config.eos_token_id = list(range(1, 13))
    return model


def build(output_dir: Any, *, teacher: Any = None, grpo: bool = False, model: Any = None, **fields: Any) -> Any:
    """A trainer for one step in float64 without gradient clipping; `arguments=` are the trainer's own."""
    arguments = fields.pop("arguments", {})
    config_class = GRPOConfig if grpo else OnPolicyDistillConfig
    args = config_class(**{**trainer_config(output_dir, max_steps=1, max_grad_norm=0.0), **fields})
    defaults = {
        "model": student() if model is None else model,
        "args": args,
        "train_dataset": make_prompts(),
        "processing_class": make_tokenizer(),
    }
    if grpo:
        return GRPOTrainer(**{**defaults, **arguments})
    return OnPolicyDistillTrainer(**{**defaults, "teacher_model": teacher, **arguments})


def take_step(output_dir: Any, prepare: Callable[[Any], None] | None = None, **kwargs: Any) -> Step:
    """Build a trainer (see `build`), train one step, and return what happened."""
    trainer = build(output_dir, **kwargs)
    if prepare is not None:
        prepare(trainer)
    step = record(trainer)
    trainer.train()
    return step


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """Completion tokens that the student wrote."""
    mask = inputs["completion_mask"]
    return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).double()


def full_logprobs(model: Any, inputs: dict[str, Any], temperature: float = 1.0) -> Tensor:
    """Log-probs `(B, T, V)` of the completion positions, from the model's own full logits."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    images = {key: inputs[key] for key in ("pixel_values",) if key in inputs}
    logits = model(input_ids=ids, attention_mask=mask, **images).logits
    return (logits[:, inputs["prompt_ids"].shape[1] - 1 : -1].double() / temperature).log_softmax(-1)


def sampled(logprobs: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Log-probs of the sampled tokens."""
    return logprobs.gather(-1, inputs["completion_ids"][..., None])[..., 0]


def gradient_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradient by name."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: g for (name, _), g in zip(named, grads, strict=True) if g is not None}


def assert_same_gradient(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Equal up to `tolerance` of the largest entry, in every parameter (the models' norms compute in float32)."""
    assert ours.keys() == theirs.keys()
    scale = max(g.abs().max().item() for g in theirs.values())
    assert scale > 1e-6, "there is no gradient to compare"
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).abs().max().item()
        assert error <= tolerance * scale, f"{name}: {error / scale:.1e}"


def forward_kl(s: Tensor, t: Tensor) -> Tensor:
    return (t.exp() * (t - s)).sum(-1)


def reverse_kl(s: Tensor, t: Tensor) -> Tensor:
    return (s.exp() * (s - t)).sum(-1)


def jsd(s: Tensor, t: Tensor, beta: float) -> Tensor:
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return beta * forward_kl(m, t) + (1 - beta) * forward_kl(m, s)


def reduce(values: list[Tensor], masks: list[Tensor], loss_type: str) -> Tensor:
    """GRPO's reductions of a step's micro-batches."""
    every, mask = torch.cat([v * m for v, m in zip(values, masks, strict=True)]), torch.cat(masks)
    if loss_type in ("dapo", "cispo", "vespo"):
        return every.sum() / mask.sum()
    if loss_type in ("grpo", "sapo"):
        return (every.sum(1) / mask.sum(1)).mean()
    if loss_type == "bnpo":
        return torch.stack([(v * m).sum() / m.sum() for v, m in zip(values, masks, strict=True)]).mean()
    if loss_type == "dr_grpo":
        return every.sum() / (len(mask) * MAX_LENGTH)
    assert loss_type == "luspo"
    return every.sum(1).mean()


def check(
    step: Step,
    divergence: Callable[[Tensor, Tensor], Tensor],
    loss_type: str = "dapo",
    temperature: float = 1.0,
    masks: list[Tensor] | None = None,
    model: Any = None,
    teacher: Any = None,
) -> None:
    """Compare a step's loss and gradient with those of plain autograd over full logits, on the same rollouts."""
    model = student() if model is None else model
    teacher = make_model(hidden_size=24, seed=1).double() if teacher is None else teacher
    values = []
    for inputs in step.batches:
        with torch.no_grad():
            t = full_logprobs(teacher, inputs, temperature)
        values.append(divergence(full_logprobs(model, inputs, temperature), t))
    masks = [loss_mask(inputs) for inputs in step.batches] if masks is None else masks
    lengths = torch.cat([mask.sum(1) for mask in masks]).tolist()
    assert len(set(lengths)) > 1, "the lengths are equal, so that the reductions are too"
    loss = reduce(values, masks, loss_type)
    assert step.loss.item() == pytest.approx(loss.item(), rel=2e-7)
    assert_same_gradient(step.gradient, gradient_of(model, loss))
