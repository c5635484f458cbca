# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What each method is given on the test-bed's task, and why some cannot run there."""

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import OnPolicyDistillConfig
from ..demo.stages import Settings
from ..demo.task import AdditionTask, solve
from ..recipes import get_recipe
from ..recipes.entry import NEEDS, Recipe
from ..schedules import ScheduleState, make_schedule

# Rows that no recipe makes. `opd` is one, and the unit of cost.
BASELINES: Mapping[str, str] = {
    "reverse_kl": "the defaults: the reverse KL, exact over the vocabulary",
    "grpo": "GRPO on the verifier's reward, without a teacher",
    "sft": "fine-tuning on the teacher's samples, each used once",
}
UNIT_OF_COST = "opd"
# Models that nothing is trained of: the row, and the start that it describes
ENDS: Mapping[str, str] = {
    "start": "plain",
    "teacher": "plain",
    "start_with_hints": "hinted",
    "teacher_with_hints": "hinted",
}
# Published for vocabularies of 100,000 entries and texts of thousands of tokens; the task has 14 entries, 7 tokens
MOST_ENTRIES = 4
_SMALLER: Mapping[str, Mapping[str, Any]] = {
    "ptsf": {"token_weighting": {"prefix_release": {"block": 1, "k": MOST_ENTRIES, "min_blocks": 3}}},
    "selectkd": {"token_weighting": {"selectkd": {"k": 2, "beta": 0.01, "mode": "greedy"}}},
}


@dataclass(frozen=True)
class Plan:
    """
    One row of the table: a method and what it is given.

    Args:
        name (`str`): Of the row.
        trainer (`str`): `"opd"` (this library's), `"sft"`, or `"none"` (nothing is trained).
        start (`str`): `"plain"`, or `"hinted"` (a student that has learned to read hints).
        recipe (`str`, *optional*): Of the configuration.
        fields (`Mapping[str, Any]`): Fields given beside the recipe.
        effective (`Mapping[str, Any]`): The recipe's fields with those.
        learning_rate (`float`): At the end of the warm-up.
        teacher (`str`, *optional*): `"teacher"`, `"self"`, `"routed"`, `"mixture"`, or `None`.
        references (`tuple[str, ...]`): Models of `reference_model`: `"student"` (the start), `"raw_teacher"`.
        rewards (`bool`), demonstrations (`bool`): Whether it gets the verifier, the column `completion`.
        changes (`tuple[str, ...]`): What differs from the recipe, in words.
    """

    name: str
    trainer: str = "opd"
    start: str = "plain"
    recipe: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    effective: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.0
    teacher: str | None = "teacher"
    references: tuple[str, ...] = ()
    rewards: bool = False
    demonstrations: bool = False
    changes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """What must have been made for it, of `methods_task.PARTS`."""
        parts = ["hinted_student" if self.start == "hinted" else "student", *self.references]
        if self.start == "plain":
            parts.append("teacher")
        if self.teacher in ("routed", "mixture"):
            parts.append("second_teacher")
        if self.demonstrations:
            parts += ["teacher", "demonstrations"]
        return tuple(dict.fromkeys(parts))

    @property
    def signature(self) -> str:
        """The same for two plans that train the same thing."""
        same = (self.trainer, self.start, self.effective, self.learning_rate, self.teacher, self.references)
        return json.dumps([*same, self.rewards, self.demonstrations], sort_keys=True, default=str)

    @property
    def num_generations(self) -> int:
        """Completions a prompt."""
        return int(self.effective.get("num_generations", 1))


def make_plan(name: str, settings: Settings) -> Plan | str:
    """
    How a method runs on the task.

    Args:
        name (`str`): A recipe, a baseline of `BASELINES`, or one of `ENDS`.
        settings ([`Settings`]): The demo's settings, with the budget of this run.

    Returns:
        [`Plan`], or why there is none (`str`).

    Raises:
        ValueError: If there is no such method.
    """
    rates = settings.learning_rates
    if name in ENDS:
        return Plan(name, trainer="none", start=ENDS[name])
    if name == "reverse_kl":
        return Plan(name, learning_rate=rates["opd"])
    if name == "grpo":
        fields = {"num_generations": settings.num_generations}
        grpo = Plan(name, fields=fields, effective=fields, learning_rate=rates["grpo"], teacher=None, rewards=True)
        return grpo
    if name == "sft":
        return Plan(name, trainer="sft", learning_rate=rates["sft"], demonstrations=True, teacher=None)
    recipe = get_recipe(name)
    if recipe.kind != "slots":
        what = "a pipeline of TRL's own trainers" if recipe.kind == "pipeline" else "not there yet"
        return f"{what}: {recipe.how}"
    if "tools" in recipe.needs:
        return f"it needs {NEEDS['tools'].what}, and the task has one turn"
    teacher = _teacher(recipe)
    if teacher is None:
        return f"its teacher is {recipe.teacher_model!r}, which the task has not"
    return _plan(recipe, teacher, settings)


def _teacher(recipe: Recipe) -> str | None:
    if "several_teachers" in recipe.needs:
        return "routed"
    if "mixture" in recipe.needs:
        return "mixture"
    named = recipe.teacher_model or "teacher"
    if named == "self":
        return "self"
    return None if named == "base" or named.startswith(("adapter:", "cache:")) else "teacher"


def _references(recipe: Recipe) -> tuple[str, ...]:
    """The student's start, or the teacher before its training was over; of two, the teacher's comes first."""
    if "two_references" in recipe.needs:
        return ("raw_teacher", "student")
    if "reference_model" in recipe.needs:
        return ("student",) if recipe.fields.get("target") == "extrapolate" else ("raw_teacher",)
    return ()


def _plan(recipe: Recipe, teacher: str, settings: Settings) -> Plan:
    own = recipe.fields
    fields, changes = _smaller(recipe, settings)
    rewards = "rewards" in recipe.needs
    if "num_generations" not in own and (rewards or "group" in recipe.needs):
        fields["num_generations"] = settings.num_generations
    effective = _without_defaults({**copy.deepcopy(dict(own)), **fields})
    trains_on_rewards = rewards and effective.get("reward_coef", 1.0) != 0
    return Plan(
        name=recipe.name,
        start="hinted" if "teacher_prompt" in recipe.needs else "plain",
        recipe=recipe.name,
        fields=fields,
        effective=effective,
        learning_rate=settings.learning_rates["grpo" if trains_on_rewards else "opd"],
        teacher=teacher,
        references=_references(recipe),
        rewards=rewards,
        demonstrations="demonstrations" in recipe.needs,
        changes=tuple(changes),
    )


def _smaller(recipe: Recipe, settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """Fields that do not fit the task, in its size, and in words."""
    own, fields = recipe.fields, copy.deepcopy(dict(_SMALLER.get(recipe.name, {})))
    longest = settings.num_digits + 2
    schedules = own.get("schedules") or {}
    if "max_completion_length" in schedules:
        scale = longest / own.get("max_completion_length", longest)
        scaled = _scaled(schedules["max_completion_length"], scale)
        fields["schedules"] = {**copy.deepcopy(dict(schedules)), "max_completion_length": scaled}
    if own.get("support", "full").endswith("top_k"):
        fields["support_size"] = min(own.get("support_size", 64), MOST_ENTRIES)
    group = own.get("num_generations", 1)
    if settings.batch_size % group:
        fields["num_generations"] = math.gcd(group, settings.batch_size)
    changes = [f"{name} {_short(value)}" for name, value in fields.items() if own.get(name) != value]
    return fields, changes


def _without_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that change something, so that two recipes which spell one method differently are seen to be one."""
    defaults = {f.name: f.default for f in dataclasses.fields(OnPolicyDistillConfig)}
    given_anyway = ("max_completion_length",)
    return {k: v for k, v in fields.items() if k not in given_anyway and v != defaults[k]}


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, Mapping) else str(value)


def _scaled(spec: Any, scale: float) -> Any:
    """A schedule of lengths with all of its lengths scaled, to at least one token."""
    if not isinstance(spec, Mapping):
        return max(1, round(spec * scale))
    scaled = dict(spec)
    for key in ("start", "end", "value"):
        if key in scaled:
            scaled[key] = max(1, round(scaled[key] * scale))
    if "points" in scaled:
        scaled["points"] = [[x, max(1, round(length * scale))] for x, length in scaled["points"]]
    return scaled


def max_steps(plan: Plan, task: AdditionTask, settings: Settings) -> int:
    """
    Optimizer steps that the budget takes if completions are as long as right answers, cut where the method cuts them.
    It is the length of the run to schedules; the budget ends it.

    Args:
        plan ([`Plan`]): The method.
        task ([`AdditionTask`]): The task.
        settings ([`Settings`]): Budget and batch size.
    """
    lengths = [len(solve(problem)) + 1 for problem in task.held_out]
    spec = (plan.effective.get("schedules") or {}).get("max_completion_length")
    limits = [float(task.max_completion_length)]
    if spec is not None:
        schedule = make_schedule(spec, "max_completion_length")
        limits = [schedule.value(ScheduleState(step, 100)) for step in range(100)]
    mean = sum(min(length, limit) for length in lengths for limit in limits) / (len(lengths) * len(limits))
    batches = math.ceil(settings.budget / (settings.batch_size * mean))
    return batches * int(plan.effective.get("num_iterations", 1))
