# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The task of the methods' test-bed, and what its runs start from: made once a seed, kept in a folder, shared."""

import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ..demo.evaluation import Evaluator, generate
from ..demo.stages import Settings, StepsCallback, build_model, shared_arguments, train, train_teacher, warm_up_student
from ..demo.task import AdditionTask, build_tokenizer, solve, supervised_dataset
from .methods_plan import Plan, max_steps

SEPARATOR = "|"
# Of the warm-up's problems for a student that reads hints, those with the answer in front of them
HINTED_SHARE = 0.75
# Of the teacher's optimizer steps, those of the one that stands for the teacher before its training
RAW_SHARE = 0.25
PARTS = ("teacher", "raw_teacher", "second_teacher", "student", "hinted_student", "demonstrations")


def with_hint(problem: str) -> str:
    """A problem with its answer in front of it: `"908|713+294="`."""
    return f"{solve(problem)}{SEPARATOR}{problem}"


def kind_of(problem: str) -> str:
    """Which of two teachers a problem goes to: by the first digit that stands there."""
    return "even" if int(problem[0]) % 2 == 0 else "odd"


@dataclass
class Start:
    """
    What all methods of one seed share.

    Args:
        seed (`int`): Seed of the problems, the models and the sampling.
        settings ([`Settings`]): The demo's, with the budget of this run.
        folder (`Path`): Where its parts are kept. Made with other settings, they would be others.
    """

    seed: int
    settings: Settings
    folder: Path
    task: AdditionTask = field(init=False)

    def __post_init__(self) -> None:
        self.task = AdditionTask(self.settings.num_digits, self.settings.num_held_out, self.seed)

    @property
    def seed_base(self) -> int:
        """Each use draws from a seed of its own, counted from here, as in the demo."""
        return 1000 * self.seed

    @property
    def num_problems(self) -> int:
        """As many as a run takes with one completion each, and a twentieth more for completions that are shorter."""
        return math.ceil(1.05 * max_steps(Plan(""), self.task, self.settings)) * self.settings.batch_size

    @cached_property
    def problems(self) -> list[str]:
        """The training problems, the same ones for all methods."""
        return self.task.sample(self.num_problems, self.seed_base + 5)

    @cached_property
    def hints(self) -> list[str]:
        """The held-out problems with hints."""
        return [with_hint(problem) for problem in self.task.held_out]

    def tokenizer(self, hinted: bool) -> PreTrainedTokenizerFast:
        """The demo's tokenizer; for hints with one more token."""
        tokenizer = build_tokenizer()
        if hinted:
            tokenizer.add_tokens([SEPARATOR])
        return tokenizer

    def path(self, part: str) -> Path:
        """Where a part is kept."""
        return self.folder / (f"{part}-{self.num_problems}.json" if part == "demonstrations" else part)

    def load(self, part: str) -> Any:
        """A model among the parts, in evaluation mode."""
        return AutoModelForCausalLM.from_pretrained(self.path(part), dtype=torch.float32).eval()

    @cached_property
    def demonstrations(self) -> dict[str, Any]:
        """`completion_ids` of the teacher for each of `problems`, and the `cpu_seconds` that it took to sample one."""
        return json.loads(self.path("demonstrations").read_text())

    def make(self, parts: Iterable[str]) -> None:
        """Make the parts that are not there yet, each whole or not at all."""
        for part in sorted(parts, key=PARTS.index):
            if self.path(part).exists():
                continue
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                made = Path(scratch) / "made"
                self._make(part, made, Path(scratch))
                if part != "demonstrations":
                    self.tokenizer(part == "hinted_student").save_pretrained(made)
                os.replace(made, self.path(part))

    def _make(self, part: str, to: Path, scratch: Path) -> None:
        task, tokenizer, settings = self.task, self.tokenizer(False), self.settings
        if part == "demonstrations":
            to.write_text(json.dumps(self._sample_demonstrations(tokenizer)))
            return
        if part == "student":
            model = warm_up_student(task, tokenizer, settings, self.seed_base, scratch)
        elif part == "hinted_student":
            model = self._warm_up_with_hints(scratch)
        else:
            few = replace(settings, teacher_steps=max(1, round(RAW_SHARE * settings.teacher_steps)))
            # Seeds of the demo's stages lie close to the base; the other teacher's are far from all of them
            base = self.seed_base + (500 if part == "second_teacher" else 0)
            model = train_teacher(task, tokenizer, few if part == "raw_teacher" else settings, base, scratch)
        model.save_pretrained(to)

    def _sample_demonstrations(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        teacher, problems, size = self.load("teacher"), self.problems, 512
        started = time.process_time()
        torch.manual_seed(self.seed_base)
        completion_ids: list[list[int]] = []
        for i in range(0, len(problems), size):
            completion_ids += generate(teacher, tokenizer, problems[i : i + size], self.task.max_completion_length)
        seconds = (time.process_time() - started) / len(problems)
        return {"completion_ids": completion_ids, "cpu_seconds": seconds}

    def _warm_up_with_hints(self, scratch: Path) -> Any:
        """As the demo warms its student up, with problems beside them that have their answer in front."""
        task, tokenizer, settings, seed = self.task, self.tokenizer(True), self.settings, self.seed_base
        validator = Evaluator(task, tokenizer, problems=task.sample(256, seed + 2))
        plain = task.sample(settings.warm_up_problems, seed + 4)
        extra = round(settings.warm_up_problems * HINTED_SHARE / (1 - HINTED_SHARE))
        pairs = [(problem, solve(problem)) for problem in plain]
        pairs += [(with_hint(problem), solve(problem)) for problem in task.sample(extra, seed + 6)]
        random.Random(seed).shuffle(pairs)
        answers = tokenizer([answer + tokenizer.eos_token for _, answer in pairs])["input_ids"]
        student = build_model(settings.student_shape, tokenizer, seed + 3)

        def is_done(model: Any) -> bool:
            return validator.accuracy(model, greedy=False)[0] >= settings.warm_up_accuracy

        arguments = shared_arguments(
            SFTConfig,
            scratch / "warm_up",
            seed=seed,
            per_device_train_batch_size=64,
            max_steps=settings.warm_up_steps,
            learning_rate=4e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=50,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        train(
            SFTTrainer(
                model=student,
                args=arguments,
                train_dataset=supervised_dataset([problem for problem, _ in pairs], answers, tokenizer),
                processing_class=tokenizer,
                callbacks=[StepsCallback("warm-up with hints", is_done)],
            )
        )
        return student
