# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""One run of the methods' test-bed: a copy of the start, one method, so many tokens, and what became of it."""

import gc
import math
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..config import OnPolicyDistillConfig
from ..demo.stages import shared_arguments, train
from ..demo.task import accuracy_reward, supervised_dataset
from ..teachers import MixtureTeacher, RoutedTeacher
from ..trainer import OnPolicyDistillTrainer
from .measure import in_words
from .methods_measure import measure
from .methods_plan import Plan, max_steps
from .methods_task import Start, kind_of, with_hint

COUNTED = (
    "Tokens are completion tokens of the batches that are trained on, with their end-of-sequence tokens, whoever "
    "wrote them: the student now, the student some steps ago, the teacher, or the data set (which the teacher wrote). "
    "A batch that is used for several optimizer steps counts once. Prompts and what the teacher reads do not count."
)


@dataclass
class Meter:
    """
    What a run has used.

    Args:
        budget (`int`): Tokens after which it stops, with the step that crosses it.
        tokens (`Counter`): Completion tokens by who wrote them: `"student"`, `"replay"`, `"teacher"`, `"dataset"`.
        completions (`Counter`): Completions, likewise.
        passes (`int`): Sequences that went through teachers and references, to be scored or to be written.
        cpu_seconds (`float`), seconds (`float`): Of the training alone: the process's, and the wall's.
    """

    budget: int
    tokens: Counter = field(default_factory=Counter)
    completions: Counter = field(default_factory=Counter)
    passes: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0

    def note(self, source: str, lengths: list[int]) -> None:
        """Completions of one source, by their lengths."""
        self.tokens[source] += sum(lengths)
        self.completions[source] += len(lengths)

    def schedule(self, optimizer: Any, warmup_steps: int) -> LambdaLR:
        """The learning rate of all methods: linear to 0 in tokens, after a linear warm-up in steps."""

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / max(1, warmup_steps)) * max(0.0, 1 - self.tokens.total() / self.budget)

        return LambdaLR(optimizer, factor)


class StopAtBudget(TrainerCallback):
    """
    Takes a run's time, and stops it when its tokens are spent.

    To schedules the run has `max_steps` optimizer steps. With completions that turn out shorter it goes on after them,
    and then is always in its last step.
    """

    def __init__(self, meter: Meter, max_steps: int):
        self.meter = meter
        self.max_steps = max_steps
        self.steps = 0
        self._since = (0.0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        state.max_steps = self.max_steps
        self._since = time.process_time(), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps = state.global_step
        if self.meter.tokens.total() >= self.meter.budget:
            control.should_training_stop = True
        elif state.global_step >= state.max_steps:
            state.max_steps = state.global_step + 1
            control.should_training_stop = False

    def on_train_end(self, args, state, control, **kwargs):
        self.meter.cpu_seconds += time.process_time() - self._since[0]
        self.meter.seconds += time.perf_counter() - self._since[1]


class MeteredTrainer(OnPolicyDistillTrainer):
    """The trainer, with a meter."""

    def __init__(self, *args: Any, meter: Meter, **kwargs: Any):
        self.meter = meter
        self._lengths: list[int] = []
        super().__init__(*args, **kwargs)
        if self.teacher is None:
            return
        side: Any = self._teacher_side
        # A target or a mixture asks all of its members about a sequence; of a dict of teachers, each has its own
        models = 1 if isinstance(self.teacher, RoutedTeacher) else len(getattr(self.teacher, "members", ())) or 1
        answer = side.answer

        def counted(inputs: dict[str, Any], *rest: Any) -> Any:
            meter.passes += models * len(inputs["completion_ids"])
            return answer(inputs, *rest)

        side.answer = counted

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        self.lr_scheduler = self.meter.schedule(optimizer or self.optimizer, int(self.args.warmup_steps))
        return self.lr_scheduler

    def _generate(self, prompts: list) -> tuple:
        rollouts = super()._generate(prompts)
        self._lengths = [len(ids) for ids in rollouts[1]]
        return rollouts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.note_sources(output)
        return output

    def note_sources(self, output: dict[str, Any]) -> None:
        """Count the completions of a generation batch, by who wrote them."""
        if not self.model.training:
            return
        n, now = len(self._lengths), self.state.global_step
        mine = output["on_policy"].tolist() if "on_policy" in output else [True] * n
        steps = output["sampled_step"].tolist() if "sampled_step" in output else [now] * n
        for length, own, step in zip(self._lengths, mine, steps, strict=True):
            source = "student" if own else "replay" if step < now else self.args.off_policy_source
            self.meter.note(source, [length])
            self.meter.passes += source == "teacher"


class MeteredSFT(SFTTrainer):
    """Fine-tuning on given completions, with a meter."""

    def __init__(self, *args: Any, meter: Meter, **kwargs: Any):
        self.meter = meter
        super().__init__(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        self.lr_scheduler = self.meter.schedule(optimizer or self.optimizer, int(self.args.warmup_steps))
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> Any:
        self.meter.note("dataset", (inputs["labels"] != -100).sum(-1).tolist())
        return super().training_step(model, inputs, *rest, **kwargs)


def run(plan: Plan, start: Start) -> dict[str, Any]:
    """
    Train and measure.

    Args:
        plan ([`Plan`]): The method.
        start ([`Start`]): With the plan's parts made.

    Returns:
        `dict[str, Any]`: `status` `"done"` with `metrics`, `tokens`, `steps`, `passes` and `cpu_seconds`, or
        `"failed"` with a `message`.
    """
    result: dict[str, Any] = {"name": plan.name, "seed": start.seed}
    try:
        result |= _run(plan, start)
    except Exception as error:  # of whatever kind: the other runs go on
        result |= {"status": "failed", "message": in_words(error)}
    gc.collect()
    return result


def _run(plan: Plan, start: Start) -> dict[str, Any]:
    hinted = plan.start == "hinted"
    own = "hinted_student" if hinted else "student"
    meter = Meter(start.settings.budget)
    used: dict[str, Any] = {}
    if plan.trainer == "none":
        model = start.load("teacher" if plan.name == "teacher" else own)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            trainer, stop = make_trainer(plan, start, start.load(own).train(), meter, Path(scratch))
            torch.manual_seed(start.seed_base)
            train(trainer)
            model = trainer.model
        used = _used(plan, start, meter, stop.steps)
        if meter.tokens.total() < meter.budget:
            raise ValueError(f"The run ended after {meter.tokens.total()} of {meter.budget} tokens.")
    metrics = measure(
        model,
        start.load(own if hinted else "teacher"),
        start.task,
        start.tokenizer(hinted),
        hints=start.hints if hinted else None,
        hinted=plan.name == "teacher_with_hints",
    )
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(f"Not finite: {', '.join(bad)}.")
    return {"status": "done", "metrics": metrics, **used}


def _used(plan: Plan, start: Start, meter: Meter, steps: int) -> dict[str, Any]:
    """What a run took. The sampling of a data set is shared by all runs, and each is charged for what it used."""
    written = meter.completions["dataset"]
    sampling = written * start.demonstrations["cpu_seconds"] if written else 0.0
    return {
        "tokens": dict(meter.tokens),
        "completions": meter.completions.total(),
        "steps": steps,
        "passes": (meter.passes + written) / meter.completions.total(),
        "cpu_seconds": meter.cpu_seconds + sampling,
        "seconds": meter.seconds,
    }


def make_trainer(plan: Plan, start: Start, model: Any, meter: Meter, scratch: Path) -> tuple[Any, StopAtBudget]:
    """
    The trainer of a method, ready to train.

    Args:
        plan ([`Plan`]): The method.
        start ([`Start`]): With the plan's parts made.
        model ([`~transformers.PreTrainedModel`]): A copy of the start.
        meter ([`Meter`]): To be filled.
        scratch (`Path`): Where the trainer may write.

    Returns:
        The trainer, and its callback that stops it.
    """
    settings = start.settings
    steps = max_steps(plan, start.task, settings)
    stop = StopAtBudget(meter, steps)
    common: dict[str, Any] = {
        "seed": start.seed_base,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": plan.learning_rate,
        "max_steps": 2 * steps,  # see StopAtBudget
        "warmup_steps": min(20, steps // 10),
    }
    tokenizer = start.tokenizer(plan.start == "hinted")
    if plan.trainer == "sft":
        common |= {"train_sampling_strategy": "sequential", "dataset_kwargs": {"skip_prepare_dataset": True}}
        dataset = supervised_dataset(start.problems, start.demonstrations["completion_ids"], tokenizer)
        args = shared_arguments(SFTConfig, scratch, **common)
        sft = MeteredSFT(model, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[stop], meter=meter)
        return sft, stop
    fields = {"max_completion_length": start.task.max_completion_length, "overlap_top_k": 0, **plan.fields}
    if plan.recipe is not None:
        fields["recipe"] = plan.recipe
    trainer = MeteredTrainer(
        model,
        teacher_model=_teacher(plan, start),
        reference_model=[str(start.path(name)) for name in plan.references] or None,
        reward_funcs=accuracy_reward if plan.rewards else None,
        args=shared_arguments(OnPolicyDistillConfig, scratch, **common, **fields),
        train_dataset=_dataset(plan, start, tokenizer),
        processing_class=tokenizer,
        callbacks=[stop],
        meter=meter,
    )
    return trainer, stop


def _teacher(plan: Plan, start: Start) -> Any:
    if plan.teacher is None or plan.teacher == "self":
        return plan.teacher
    if plan.start == "hinted":
        return str(start.path("hinted_student"))
    first, second = str(start.path("teacher")), str(start.path("second_teacher"))
    if plan.teacher == "routed":
        return {"even": first, "odd": second}
    return MixtureTeacher([first, second]) if plan.teacher == "mixture" else first


def _dataset(plan: Plan, start: Start, tokenizer: Any) -> Dataset:
    """The columns that the method asks for."""
    columns: dict[str, Any] = {"prompt": start.problems}
    if plan.demonstrations:
        # The end-of-sequence token of a sample that has none would be added, as to any text
        ids = start.demonstrations["completion_ids"]
        columns["completion"] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    if plan.start == "hinted":
        columns["teacher_prompt"] = [with_hint(problem) for problem in start.problems]
    if plan.teacher == "routed":
        columns["teacher"] = [kind_of(problem) for problem in start.problems]
    return Dataset.from_dict(columns)
