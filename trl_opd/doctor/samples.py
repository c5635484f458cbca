# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Completions of the student as the run would sample them, and the teacher asked about them as the run would ask.

Nothing of it stays in the trainer: neither metrics nor generators, and no rollout is counted.

Shapes: B sequences, P prompt tokens (left-padded), T completion tokens (right-padded).
"""

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..collators import Scores, TeacherBatch
from ..student import student_top_ids
from ..teacher_side import TeacherSide
from ..teachers.base import AnsweredScores, PendingScores, collect, submit
from ..teachers.recording import RecordingTeacher
from ..teachers.replay import Replay

MAX_TOKENS = 32768  # of the batch that is looked at, padding included
MAX_REPEATED = 4  # sequences that the teacher is asked about again
_COPIED = ("_metrics", "_logs", "_pending_metrics", "_pending_extra_logs", "_token_metrics")
_KEPT = ("num_generations_eval", "max_completion_length", "_last_loaded_step")
_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class _Questions(TeacherSide):
    """A trainer's teacher side that prepares its questions and asks nobody."""

    def __init__(self, side: TeacherSide):
        self.__dict__.update(side.__dict__)
        self._pending = {}
        if isinstance(self.teacher, RecordingTeacher):
            self.teacher = self.teacher.teacher  # nothing of this is to be stored, or answered from what was

    def _submit(self, inputs: dict[str, Any]) -> None:
        self._asked, self._extra = True, self._make_extra(inputs)

    @property
    def sampled_ids(self) -> list[list[int]]:
        """The completions before they were padded or masked."""
        return self._ids[1]


class _Deaf:
    """Stands where a watcher is told of rollouts."""

    def note_rollouts(self, *args: Any) -> None:
        pass


@contextmanager
def undisturbed(trainer: Any) -> Iterator[_Questions]:
    """
    The trainer in evaluation, without gradient, with a teacher side that asks nobody. When it ends, the trainer is
    what it was: generators, metrics, logs, modes of modules.
    """
    device = trainer.accelerator.device
    python, numpy = random.getstate(), np.random.get_state()
    cards = [device] if device.type == "cuda" else []
    modes = {module: module.training for module in trainer.model.modules()}
    kept = {name: trainer.__dict__[name] for name in (*_COPIED, *_KEPT) if name in trainer.__dict__}
    swapped = ("_groups", "_rollouts", "_teacher_side", "_diagnostics", "_token_view")
    kept |= {name: trainer.__dict__[name] for name in swapped}
    side = _Questions(trainer._teacher_side)
    try:
        with torch.random.fork_rng(devices=cards), torch.no_grad():
            for name in _COPIED:
                if name in kept:
                    setattr(trainer, name, copy.deepcopy(kept[name]))
            trainer._groups, trainer._rollouts = copy.copy(trainer._groups), copy.copy(trainer._rollouts)
            trainer._teacher_side, trainer._diagnostics, trainer._token_view = side, _Deaf(), _Deaf()
            trainer.model.eval()
            yield side
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes.items():
            module.training = training
        trainer.__dict__.update(kept)
        trainer.__dict__.pop("_calculate_rewards", None)
        if isinstance(trainer.rollout_func, Replay):
            trainer.rollout_func.restart("eval")


@dataclass
class Piece:
    """
    Sequences that go through the models together.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
        side (`TeacherSide`): What makes its questions.
        inputs (`dict[str, Any]`): GRPO's batch.
        examples (`Sequence[Mapping]`): Dataset rows.
    """

    trainer: Any
    side: Any
    inputs: dict[str, Any]
    examples: Sequence[Mapping[str, Any]]

    @property
    def mask(self) -> Tensor:
        """Tokens that are distilled, `(B, T)`."""
        return self.trainer.distill_mask(self.inputs)

    @property
    def loss_mask(self) -> Tensor:
        """Tokens that the student wrote, `(B, T)`."""
        return self.trainer.loss_mask(self.inputs)

    @property
    def completion_ids(self) -> Tensor:
        """`(B, T)`."""
        return self.inputs["completion_ids"]

    @property
    def has_images(self) -> bool:
        """Whether its sequences cannot be told apart."""
        return any(self.inputs.get(name) is not None for name in _IMAGES)

    def select(self, rows: Sequence[int]) -> "Piece":
        """Some of its sequences, without the padding that they have in common."""
        index, num = torch.tensor(rows, device=self.completion_ids.device), len(self.completion_ids)
        picked = {
            k: v[index] if isinstance(v, Tensor) and v.dim() and len(v) == num else v for k, v in self.inputs.items()
        }
        for name in ("prompt", "teacher_prompt"):
            if f"{name}_mask" in picked:
                width = max(1, int(picked[f"{name}_mask"].sum(1).max()))
                for kind in ("ids", "mask"):
                    picked[f"{name}_{kind}"] = picked[f"{name}_{kind}"][:, -width:]
        used = picked["completion_mask"].bool().any(0).nonzero()
        return replace(
            self._cut(picked, int(used[-1]) + 1 if len(used) else 1), examples=[self.examples[i] for i in rows]
        )

    def first_tokens(self, num: int) -> "Piece":
        """Its completions cut after `num` tokens."""
        return self._cut(dict(self.inputs), num)

    def _cut(self, inputs: dict[str, Any], end: int) -> "Piece":
        width = inputs["completion_ids"].shape[1]
        for key, value in inputs.items():
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == width and "prompt" not in key:
                inputs[key] = value[:, :end]
        return replace(self, inputs=inputs)

    def padded(self, left: int, right: int) -> "Piece":
        """With further padding on both sides."""
        inputs, filler = dict(self.inputs), self.trainer._tokenizer.pad_token_id
        sides = {"prompt": (left, 0), "teacher_prompt": (left, 0), "completion": (0, right)}
        for name, widths in sides.items():
            for kind, value in (("ids", filler), ("mask", 0)):
                if f"{name}_{kind}" in inputs:
                    inputs[f"{name}_{kind}"] = functional.pad(inputs[f"{name}_{kind}"], widths, value=value)
        if "tool_mask" in inputs:
            inputs["tool_mask"] = functional.pad(inputs["tool_mask"], (0, right), value=1)
        return replace(self, inputs=inputs)

    def split(self) -> "list[Piece]":
        """In micro-batches."""
        size, num = self.trainer.args.per_device_train_batch_size, len(self.completion_ids)
        if num <= size or self.has_images:
            return [self]
        return [self.select(range(i, min(i + size, num))) for i in range(0, num, size)]

    # The models

    def question(self, temperature: float | None = None, **extra: Any) -> TeacherBatch:
        """What the run would ask, or that at another temperature."""
        question = self.side.question(self.inputs, self.mask, **extra)
        return question if temperature is None else replace(question, temperature=temperature)

    def student_question(self) -> TeacherBatch:
        """The question to a teacher that reads what the student reads."""
        own = {k: v for k, v in self.inputs.items() if not k.startswith("teacher_")}
        return replace(self.side.question(own, self.loss_mask, model_inputs=self._further()), support="full")

    def ask(self, temperature: float | None = None) -> Scores:
        """The teacher's answer: asked at generation time or inside the loss, as it wants to be."""
        trainer, side = self.trainer, self.side
        question = self.question(temperature, examples=self.examples)
        if side._requests_ids:
            question.requested_ids = student_top_ids(trainer, self.inputs)
        size = trainer.student_vocab_size
        pending: PendingScores | None = submit(side.teacher, question, size)
        if isinstance(pending, AnsweredScores):
            return pending.scores
        rows = torch.arange(len(self.completion_ids), device=self.completion_ids.device)
        question = self.question(temperature, model_inputs=self._further())
        with trainer.accelerator.autocast():
            return collect(side.teacher, pending, rows, question, size)

    def through_trainer(self, forward: Callable[[dict[str, Any], Tensor], Any]) -> Any:
        """What `forward(model_inputs, labels)` returns of what GRPOTrainer would give its model."""
        result: list[Any] = []
        shape = (len(self.completion_ids), self._ids.shape[1])

        def call(labels: Tensor, fused_lm_head: bool, **model_inputs: Any) -> Any:
            result.append(forward(model_inputs, labels))
            return SimpleNamespace(log_probs=torch.zeros(shape), entropy=torch.zeros(shape), aux_loss=None)

        mask = torch.cat([self.inputs["prompt_mask"], self.inputs["completion_mask"]], dim=1)
        images = {name: self.inputs.get(name) for name in _IMAGES}
        self.trainer._get_per_token_logps_and_entropies(
            call, self._ids, mask, self.completion_ids.shape[1], compute_entropy=True, **images
        )
        return result[0]

    @property
    def _ids(self) -> Tensor:
        return torch.cat([self.inputs["prompt_ids"], self.completion_ids], dim=1)

    def _further(self) -> dict[str, Any]:
        """Model inputs beside the ids, as the trainer hands them to the teacher."""
        if not self.has_images:
            return {}
        own = ("input_ids", "attention_mask", "output_router_logits")
        model_inputs = self.through_trainer(lambda model_inputs, _: model_inputs)
        return {k: v for k, v in model_inputs.items() if k not in own}


@dataclass
class Samples:
    """
    What was sampled.

    Args:
        batch ([`Piece`]): All of it, or the first sequences of many.
        completion_ids (`list[list[int]]`): Every completion without padding.
        texts (`list[str]`): Those as text.
        prompt_ids (`list[list[int]]`): The student's prompts.
    """

    batch: Piece
    completion_ids: list[list[int]]
    texts: list[str]
    prompt_ids: list[list[int]]


def draw(trainer: Any, side: Any, num_samples: int) -> Samples:
    """
    Sample completions of the dataset's first prompts, with the trainer's own generation.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run, inside [`undisturbed`].
        side (`TeacherSide`): Of [`undisturbed`].
        num_samples (`int`): Completions. With a `teacher_view`, which sees whole groups, up to a group more.

    Raises:
        ValueError: If there is no dataset to take prompts from.
    """
    group = trainer.num_generations if side.view is not None else 1
    prompts = first_rows(trainer.train_dataset or trainer.eval_dataset, math.ceil(max(num_samples, 1) / group))
    trainer.num_generations_eval = group
    if side.view is None:  # nothing of the teacher's question depends on rewards
        functions = len(trainer.reward_funcs)

        def no_rewards(inputs: list, *args: Any, **kwargs: Any) -> Tensor:
            shape = (len(inputs) * trainer.accelerator.num_processes, functions)
            return torch.zeros(shape, device=trainer.accelerator.device)

        trainer._calculate_rewards = no_rewards
    rows = [dict(row) for row in prompts for _ in range(group)]
    inputs = trainer._generate_and_score_completions(rows)
    trainer.model.eval()  # continuous batching leaves it in training
    piece = Piece(trainer, side, inputs, rows)
    ids = [list(x) for x in side.sampled_ids]
    prompt_ids = [
        row[mask.bool()].tolist() for row, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
    ]
    widest = sum(inputs[f"{name}_ids"].shape[1] for name in ("prompt", "completion"))
    num = max(2, MAX_TOKENS // max(widest, 1))
    if num < len(rows) and not piece.has_images:
        piece = piece.select(range(num))
    return Samples(piece, ids, trainer._tokenizer.batch_decode(ids), prompt_ids)


def first_rows(dataset: Any, num: int) -> list[Mapping[str, Any]]:
    """The dataset's first rows, from the beginning again if they are too few."""
    if isinstance(dataset, Mapping):
        dataset = next(iter(dataset.values()), None)
    rows = [] if dataset is None else list(itertools.islice(dataset, num))
    if not rows:
        raise ValueError("train_dataset must have a row. There is no prompt to sample from. Pass a dataset.")
    return list(itertools.islice(itertools.cycle(rows), num))
