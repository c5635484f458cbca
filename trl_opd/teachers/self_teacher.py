# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""A teacher that is the student itself: as it was at the start, as it was some steps ago, or as it is now."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from ..collators import TeacherBatch, TeacherScores
from ..kernels.projection import Head
from ..losses import nearest_name
from ..validation import SYNCS
from .scoring import score_student

if TYPE_CHECKING:
    from trl import GRPOTrainer

_WEIGHTS, _FINGERPRINT = "teacher.safetensors", "teacher_fingerprint.json"


class SelfTeacher:
    """
    The student's own weights as teacher, useful where the teacher sees another prompt than the student.

    Only the trained parameters exist twice (with LoRA the adapter, never the base model; with `"live"` nothing does).
    They take the student's place while the teacher answers. Moving averages of half-precision parameters are kept in
    float32, where small updates are not rounded away.

    Args:
        sync (`str`, *optional*, defaults to `"frozen"`):
            `"frozen"`: the weights at the start of the run, θ₀. `"ema"`: θ̄ ← (1 − rate) θ̄ + rate θ, from θ̄ = θ₀.
            `"every_n"`: θ of the last multiple of `steps`. `"live"`: θ.
        steps (`int`, *optional*, defaults to `1`): Optimizer steps between two updates of `"ema"` or `"every_n"`.
        rate (`float`, *optional*, defaults to `0.05`): The student's share in an update of `"ema"`.

    Raises:
        ValueError: If one of them is none of these.
    """

    scores_in_loss = True
    name = "self"

    def __init__(self, sync: str = "frozen", steps: int = 1, rate: float = 0.05):
        if sync not in SYNCS:
            raise ValueError(f"teacher_sync must be a known name, got {sync!r}.{nearest_name(str(sync), list(SYNCS))}")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(
                f"teacher_sync_steps must be a whole number of at least 1, got {steps!r}. It counts optimizer steps. "
                "Leave it unset for 1."
            )
        if not 0 < rate <= 1:
            raise ValueError(
                f"teacher_sync_rate must be in (0, 1], got {rate!r}. It is the student's share in the teacher's "
                "moving average. Set teacher_sync='frozen' for a teacher that does not move."
            )
        self.sync, self.steps, self.rate = sync, steps, rate
        self._trainer: Any = None
        self._parameters: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # the teacher's, in the parameters' dtype
        self._averages: dict[str, Tensor] = {}  # those of half-precision parameters in float32

    @property
    def changes(self) -> bool:
        """Whether its weights move during the run."""
        return self.sync != "frozen"

    @property
    def vocab_size(self) -> int:
        """Entries of the shared head."""
        return self._trainer.model.config.get_text_config().vocab_size

    def prepare(self, trainer: "GRPOTrainer") -> None:
        """Take the student's weights of this moment, and follow the run."""
        self._trainer = trainer
        if self.sync == "live":
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                f"teacher_sync must be 'live' for teacher_model='self' under FSDP or DeepSpeed, got {self.sync!r}. "
                "The second set of weights is exchanged with the student's in place, which their sharded parameters "
                "do not allow. Use DDP, teacher_sync='live', teacher_model='base' with LoRA, or the student's path."
            )
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        if self.sync == "ema":
            half = {name: w for name, w in self._weights.items() if w.dtype in (torch.bfloat16, torch.float16)}
            self._averages = {name: w.float() for name, w in half.items()}
        if self.changes:
            trainer.add_callback(_Follow(self))

    def __call__(self, batch: TeacherBatch) -> TeacherScores:
        model = self._trainer.model
        was_training = model.training
        model.eval()  # no dropout in the teacher
        torch.clear_autocast_cache()
        try:
            with self._worn():
                return score_student(model, batch, _detached)
        finally:
            torch.clear_autocast_cache()  # it knows parameters, not their weights: the student would get the teacher's
            model.train(was_training)

    @contextmanager
    def _worn(self) -> Iterator[None]:
        """The teacher's weights in the student's place."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            parameter = self._parameters[name]
            self._weights[name], parameter.data = parameter.data, weight

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the student after optimizer step `step`."""
        if step % self.steps:
            return
        for name, parameter in self._parameters.items():
            if self.sync == "every_n":
                self._weights[name].copy_(parameter)
            elif name in self._averages:
                self._averages[name].lerp_(parameter.float(), self.rate)
                self._weights[name].copy_(self._averages[name])
            else:
                self._weights[name].lerp_(parameter, self.rate)

    def save_state(self, folder: str) -> None:
        """Write what a resumed run cannot take from the student: the weights, or how to recognise the start's."""
        if not self._weights or not self._trainer.args.should_save:
            return
        os.makedirs(folder, exist_ok=True)
        if self._starts_alike:
            with open(os.path.join(folder, _FINGERPRINT), "w") as f:
                json.dump({"sha256": self._fingerprint()}, f)
            return
        weights = {name: self._averages.get(name, weight) for name, weight in self._weights.items()}
        save_file({name: w.contiguous().cpu() for name, w in weights.items()}, os.path.join(folder, _WEIGHTS))

    @torch.no_grad()
    def load_state(self, folder: str) -> None:
        """
        Continue from [`save_state`].

        Raises:
            ValueError: If the folder has no state of this teacher, or the student started from other weights.
        """
        if not self._weights:
            return
        path = os.path.join(folder, _FINGERPRINT if self._starts_alike else _WEIGHTS)
        if not os.path.exists(path):
            raise ValueError(
                f"The checkpoint {folder} must hold {os.path.basename(path)} to resume with teacher_model='self' and "
                f"teacher_sync={self.sync!r}, but does not. The teacher would not be the one that the run had. Resume "
                "with the teacher_sync of the run that wrote it."
            )
        if self._starts_alike:
            with open(path) as f:
                if json.load(f)["sha256"] == self._fingerprint():
                    return
            raise ValueError(
                f"model must be the one that the run in {folder} started from, got other weights. With "
                "teacher_sync='frozen' they are the teacher. Pass the same model as then, and the checkpoint as "
                "resume_from_checkpoint."
            )
        saved = load_file(path)
        if saved.keys() != self._weights.keys():
            missing = sorted(saved.keys() ^ self._weights.keys())[:3]
            raise ValueError(
                f"The teacher in {path} must have the student's trained parameters, but they differ in {missing}. "
                "Resume with the same model and peft_config."
            )
        for name, weight in saved.items():
            if name in self._averages:
                self._averages[name].copy_(weight)
            self._weights[name].copy_(weight)

    @property
    def _starts_alike(self) -> bool:
        """Whether a resumed run begins with the same weights. A new adapter is initialised at random."""
        return self.sync == "frozen" and not is_peft_model(self._trainer.accelerator.unwrap_model(self._trainer.model))

    def _fingerprint(self) -> str:
        """Of the beginning of every tensor."""
        digest = hashlib.sha256()
        for name, weight in sorted(self._weights.items()):
            digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
            digest.update(weight.flatten()[:1024].float().cpu().numpy().tobytes())
        return digest.hexdigest()


class _Follow(TrainerCallback):
    def __init__(self, teacher: SelfTeacher):
        self.teacher = teacher

    def on_step_end(self, args, state, control, **kwargs):
        self.teacher.update(state.global_step)


def _detached(head: Head) -> Head:
    """The head with today's storage: the parameters that it was read from get the student's back."""
    return Head(
        head.weight.detach(), None if head.bias is None else head.bias.detach(), head.logit_scale, head.softcap
    )
