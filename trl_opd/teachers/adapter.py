# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""A teacher that is the student's own base model, its adapter off or another one on: no second copy of weights."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from trl.trainer.utils import use_adapter

from ..collators import TeacherBatch, TeacherScores
from .scoring import score_student

if TYPE_CHECKING:
    from trl import GRPOTrainer


class AdapterTeacher:
    """
    The student's base model without its adapter, or with another named adapter of the same model.

    Args:
        adapter_name (`str`, *optional*): Adapter that the teacher wears; `None` for the bare base model.
    """

    scores_in_loss = True

    def __init__(self, adapter_name: str | None = None):
        self.adapter_name = adapter_name
        self._trainer: Any = None

    @classmethod
    def from_string(cls, name: str) -> "AdapterTeacher":
        """From `"base"` or `"adapter:NAME"`."""
        adapter = None if name == "base" else name.removeprefix("adapter:")
        if adapter == "":
            raise ValueError(
                "teacher_model must name an adapter after 'adapter:', got 'adapter:'. Set 'adapter:NAME'."
            )
        return cls(adapter)

    @property
    def name(self) -> str:
        """As in the `teacher_model=` argument."""
        return "base" if self.adapter_name is None else f"adapter:{self.adapter_name}"

    @property
    def vocab_size(self) -> int:
        """Entries of the shared head."""
        return self._trainer.model.config.get_text_config().vocab_size

    def check_student(self, adapters: Collection[str], active: Collection[str]) -> None:
        """
        Check that the student has the adapter.

        Args:
            adapters (`Collection[str]`): Names of the student's adapters, none without PEFT.
            active (`Collection[str]`): Those that are trained.
        """
        if not adapters:
            raise ValueError(
                f"teacher_model={self.name!r} needs a PEFT student: with full fine-tuning the base weights move with "
                "the student, which would teach itself. Pass peft_config=, or another teacher_model."
            )
        if self.adapter_name is not None and self.adapter_name not in adapters:
            raise ValueError(
                f"teacher_model names the adapter {self.adapter_name!r}, but the student has "
                f"{sorted(adapters)}. Load it with model.load_adapter(path, {self.adapter_name!r}) first."
            )
        if self.adapter_name is not None and self.adapter_name in active:
            raise ValueError(
                f"teacher_model names the adapter {self.adapter_name!r}, which is the one being trained: every "
                "divergence from itself is zero. Name another adapter, or 'base'."
            )

    def prepare(self, trainer: "GRPOTrainer") -> None:
        """Check the student again, as it is now, and keep it."""
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        self.check_student(*((model.peft_config, model.active_adapters) if is_peft_model(model) else ((), ())))
        self._trainer = trainer

    def __call__(self, batch: TeacherBatch) -> TeacherScores:
        model = self._trainer.model
        peft_model = self._trainer.accelerator.unwrap_model(model)
        was_training = model.training
        model.eval()  # no dropout in the teacher
        try:
            with use_adapter(peft_model, self.adapter_name):
                return score_student(model, batch)
        finally:
            model.train(was_training)
