"""Training runs in which something goes wrong, and the teachers, rewards and students that make it."""

import math
from typing import Any

import torch
from datasets import Dataset
from tiny import VOCAB_SIZE, make_model, make_prompts, make_tokenizer, trainer_config
from torch import Tensor
from transformers import TrainerCallback

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer
from trl_opd.alarms import AlarmCallback
from trl_opd.collators import TeacherScores

EOS, A, B = 1, 6, 7


class Listener:
    """What `on_alarm` hears; it answers `answer`."""

    def __init__(self, answer: str | None = None):
        self.alarms: list[Any] = []
        self.answer = answer

    def __call__(self, alarm: Any) -> str | None:
        self.alarms.append(alarm)
        return self.answer

    @property
    def names(self) -> set[str]:
        return {alarm.alarm for alarm in self.alarms}

    def first(self, name: str) -> Any:
        return next(alarm for alarm in self.alarms if alarm.alarm == name)


def make_student(seed: int = 0) -> Any:
    """A dozen of its tokens end a completion, so that few are truncated."""
    model = make_model(seed=seed)
    model.generation_config.eos_token_id = list(range(1, 13))
    return model


def make_near_pair() -> tuple[Any, Any]:
    """A student and a teacher that are sure of what they say, and nearly agree."""
    student, teacher = make_student(), make_model()
    torch.manual_seed(3)
    with torch.no_grad():
        student.lm_head.weight *= 4
        teacher.lm_head.weight *= 4
        for parameter in teacher.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return student, teacher


def scores_of(likely: Tensor, share: float = 0.97) -> TeacherScores:
    """A teacher that gives `share` to one token at each position `(B, T)`, and a little to another."""
    ids = torch.stack([likely, (likely + 20) % VOCAB_SIZE], dim=-1)
    logprobs = torch.tensor([share, (1 - share) / 2]).log()
    return TeacherScores(topk_ids=ids, topk_logprobs=logprobs.expand(ids.shape))


class Likes:
    """A teacher that wants one token, at every position."""

    def __init__(self, token: int, name: str = "likes"):
        self.token, self.name = token, name

    def __call__(self, batch: Any) -> TeacherScores:
        return scores_of(torch.full_like(batch.completion_ids, self.token))


class Swapped:
    """A teacher that becomes another one after so many answers."""

    name = "swapped"

    def __init__(self, first: Any, second: Any, after: int):
        self.first, self.second, self.after, self.calls = first, second, after, 0

    def __call__(self, batch: Any) -> TeacherScores:
        self.calls += 1
        return (self.first if self.calls <= self.after else self.second)(batch)


class Repeats:
    """A teacher that wants the last token again; from its `after`th answer on: until then it wants the end token."""

    name = "repeats"

    def __init__(self, after: int):
        self.after, self.calls = after, 0

    def __call__(self, batch: Any) -> TeacherScores:
        self.calls += 1
        if self.calls <= self.after:
            return scores_of(torch.full_like(batch.completion_ids, EOS), share=0.4)
        likely = batch.completion_ids.roll(1, dims=1)
        return scores_of(likely.clamp(min=20))  # none that ends a completion


class NeverEnds(Repeats):
    """A teacher without an end token: it goes on with what it has to say."""

    name = "never ends"

    def __call__(self, batch: Any) -> TeacherScores:
        if self.calls < self.after:
            return super().__call__(batch)
        places = torch.arange(batch.completion_ids.shape[1], device=batch.completion_ids.device)
        return scores_of((20 + places % 3).expand(batch.completion_ids.shape))


def share_of(token: int, sign: float = 1.0) -> Any:
    """A reward: the share of a token in the completion, or of the others."""

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        shares = [sum(t == token for t in ids) / len(ids) for ids in completion_ids]
        return [share if sign > 0 else 1 - share for share in shares]

    return reward


def empty_rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that end at once."""
    encoded = trainer.processing_class(prompts)["input_ids"]
    return {"prompt_ids": encoded, "completion_ids": [[EOS] for _ in prompts], "logprobs": None}


class BreakStudent(TrainerCallback):
    """After the given step, when the next one's completions are there already, a weight of the student is NaN."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            model.lm_head.weight.data[20, 0] = math.nan


def rising_rate(model: Any, start: float, factor: float) -> tuple[Any, Any]:
    """An optimizer whose learning rate grows until it is far too high."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=start)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor**step)


def make_trainer(output_dir: Any, listener: Any = None, teacher: Any = None, **fields: Any) -> Any:
    """
    A run of 40 steps with the alarms' own thresholds.

    Args:
        listener (`Callable`, *optional*): Hears the alarms. Without it `fields` say who does.
    """
    arguments = fields.pop("arguments", {})
    model = fields.pop("model", None) or make_student()
    rate = fields.pop("rate", None)
    callbacks = [*arguments.pop("callbacks", []), *([AlarmCallback(listener)] if listener is not None else [])]
    defaults = {
        "max_steps": 40,
        "max_completion_length": 32,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
        "learning_rate": 3e-3,
        "token_view": 0,
        "preflight": "off",
        "generation_kwargs": {"min_new_tokens": 2},  # else one in five would be empty
    }
    return OnPolicyDistillTrainer(
        model=model,
        teacher_model=teacher or make_model(hidden_size=24, seed=1),
        args=OnPolicyDistillConfig(**trainer_config(output_dir, **{**defaults, **fields})),
        processing_class=make_tokenizer(),
        callbacks=callbacks,
        **{
            "train_dataset": make_prompts(64),
            "optimizers": (None, None) if rate is None else rising_rate(model, *rate),
            **arguments,
        },
    )


def routed_prompts() -> Dataset:
    """The same prompts for two teachers, one of which has three of four."""
    prompts = [prompt for prompt in make_prompts(6)["prompt"] for _ in range(4)] * 4
    return Dataset.from_dict({"prompt": prompts, "teacher": ["many", "many", "many", "few"] * 24})
