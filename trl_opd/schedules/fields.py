# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Which fields of a configuration may be scheduled, and how a value gets into them."""

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ..losses import nearest_name
from .base import Schedule, ScheduleState, is_number
from .spec import Function, make_schedule

_NOMINAL_STEPS = 1000  # of a run whose length is known later, to look at the course of its schedules


@dataclasses.dataclass(frozen=True)
class Schedulable:
    """
    A field that is read anew during a run.

    Args:
        whole (`bool`): Whether it counts something: its values are rounded to the nearest whole number, halves up.
        held (`bool`): Whether a batch of completions keeps the value that it was generated with, however many
            optimizer steps are made of it. Its next value comes with the next batch.
        built (`bool`): Whether what it multiplies is only built if the configuration's own value is not 0.
        rule (`str`), valid (`Callable`): The range, where `validate_distillation` does not check it.
    """

    whole: bool = False
    held: bool = False
    built: bool = False
    rule: str = ""
    valid: Callable[[float], bool] = math.isfinite


def _grpo(rule: str, valid: Callable[[float], bool], **kwargs: bool) -> Schedulable:
    return Schedulable(rule=rule, valid=valid, **kwargs)


SCHEDULABLE: Mapping[str, Schedulable] = {
    # Whose tokens are trained on
    "student_fraction": Schedulable(held=True),
    "replay_fraction": Schedulable(held=True),
    "off_policy_weight": Schedulable(),
    "injected_completions": Schedulable(whole=True, held=True),
    "injected_shaping": Schedulable(),
    # The teacher
    "teacher_sync_steps": Schedulable(whole=True),
    "teacher_sync_rate": Schedulable(),
    # The objective
    "support_size": Schedulable(whole=True, held=True),
    "direct_coef": Schedulable(),
    "discount": Schedulable(),
    "return_horizon": Schedulable(whole=True),
    "advantage_power": Schedulable(),
    "advantage_floor": Schedulable(),
    "advantage_clip": Schedulable(),
    "importance_low": Schedulable(),
    "importance_high": Schedulable(),
    "ratio_anchor": Schedulable(),
    "distill_temperature": Schedulable(held=True),
    "temperature_adaptation": Schedulable(),
    "distill_coef": Schedulable(),
    "reward_coef": Schedulable(held=True, built=True),
    # GRPO's
    "max_completion_length": _grpo("at least 1", lambda x: x >= 1, whole=True, held=True),
    "temperature": _grpo("above 0", lambda x: x > 0, held=True),
    "top_p": _grpo("in (0, 1]", lambda x: 0 < x <= 1, held=True),
    "top_k": _grpo("at least 0", lambda x: x >= 0, whole=True, held=True),
    "min_p": _grpo("in [0, 1]", lambda x: 0 <= x <= 1, held=True),
    "repetition_penalty": _grpo("above 0", lambda x: x > 0, held=True),
    "beta": _grpo("at least 0", lambda x: x >= 0, held=True, built=True),
    "epsilon": _grpo("at least 0", lambda x: x >= 0),
    "epsilon_high": _grpo("at least 0", lambda x: x >= 0),
    "delta": _grpo("above 1", lambda x: x > 1),
    "entropy_coef": _grpo("a finite number", math.isfinite, built=True),
    "top_entropy_quantile": _grpo("in [0, 1]", lambda x: 0 <= x <= 1),
    "sapo_temperature_pos": _grpo("above 0", lambda x: x > 0),
    "sapo_temperature_neg": _grpo("above 0", lambda x: x > 0),
    "max_grad_norm": _grpo("above 0", lambda x: x > 0),
}
# Fields that are dicts: "field.key" schedules a number inside one, which is not rounded
SCHEDULABLE_DICTS = (
    "divergence_kwargs",
    "off_policy_divergence_kwargs",
    "target_kwargs",
    "token_weighting",
    "sample_weighting",
    "reward_mix_kwargs",
)
_INSTEAD = {
    "learning_rate": "Set lr_scheduler_type, lr_scheduler_kwargs and warmup_steps.",
    "replay_size": "Schedule replay_fraction.",
    "num_generations": "Schedule injected_completions.",
}


def resolve_schedules(spec: Mapping[str, Any] | None, config: Any) -> dict[str, Schedule]:
    """
    The schedules of a configuration, checked: each field may move, and stays in its range all the way.

    Args:
        spec (`Mapping[str, Any]`, *optional*): The field `schedules`.
        config ([`OnPolicyDistillConfig`]): The configuration that they move. It stays as it is.

    Returns:
        `dict[str, Schedule]`: By field, or `field.key`.

    Raises:
        ValueError: Naming the field and what is wrong with it.
    """
    if not spec:
        return {}
    if not isinstance(spec, Mapping):
        raise ValueError(
            f"schedules must be a dict from fields to schedules, got {spec!r}. There is nothing to schedule. Set e.g. "
            "{'distill_coef': {'type': 'linear', 'start': 1.0, 'end': 0.0}}."
        )
    schedules = {}
    for name, description in spec.items():
        _check_field(str(name), config)
        schedules[str(name)] = schedule = make_schedule(description, f"schedules[{name!r}]")
        metric = schedule.follows
        if metric is not None and metric.startswith("eval_") and getattr(config, "eval_strategy", "steps") == "no":
            raise ValueError(
                f"eval_strategy must be set for schedules[{name!r}], which follows {metric!r}, got 'no'. Without "
                "evaluation it would never move. Set eval_strategy='steps' and eval_steps."
            )
    _check_course(schedules, config)
    return schedules


def value_range(config: Any, name: str) -> tuple[float, float] | None:
    """
    Least and greatest value of a number during the run; without a schedule, the configuration's twice.

    `None` if it is unset, or scheduled by a function.

    Args:
        config ([`OnPolicyDistillConfig`]): The configuration.
        name (`str`): A field, or `field.key`.
    """
    spec = getattr(config, "schedules", None) or {}
    if name in spec:
        return make_schedule(spec[name], f"schedules[{name!r}]").bounds
    value = get_value(config, name)
    return None if value is None else (value, value)


def _check_field(name: str, config: Any) -> None:
    known = {f.name: f.type for f in dataclasses.fields(config)}
    head, _, rest = name.partition(".")
    if head not in known:
        raise ValueError(
            f"schedules must name fields of the configuration, got {name!r}. Nothing would read it."
            f"{_short(nearest_name(head, sorted([*SCHEDULABLE, *SCHEDULABLE_DICTS])))}"
        )
    if head in SCHEDULABLE_DICTS:
        if not rest:
            raise ValueError(
                f"schedules must name one number in {head}, got {name!r}. The field is a dict. Set e.g. "
                f"'{head}.NAME', with NAME one of its parameters."
            )
        get_value(config, name)
        return
    if rest or not _is_numeric(known[head]):
        what = getattr(known[head], "__name__", str(known[head]))
        raise ValueError(
            f"schedules must name numbers, got {name!r}. {head} is of type {what}, {getattr(config, head)!r} here: "
            f"there is nothing between two of its values. Valid: {', '.join([*SCHEDULABLE, *SCHEDULABLE_DICTS])}."
        )
    if head not in SCHEDULABLE:
        raise ValueError(
            f"schedules must name fields that are read during the run, got {name!r}. It is read once, when the run is "
            f"built. {_INSTEAD.get(head, 'Leave it at one value.')} Valid: {', '.join(SCHEDULABLE)}."
        )
    value = getattr(config, head)
    if SCHEDULABLE[head].built and not value:
        raise ValueError(
            f"{head} must not be 0 in the configuration to be scheduled, got {value!r}. What it multiplies is built "
            "at the start only if it is not 0. Set it to the schedule's greatest value."
        )
    if head == "entropy_coef" and config.use_adaptive_entropy:
        raise ValueError(
            "use_adaptive_entropy must be False with a schedule of entropy_coef, got True. Both would move it. Unset "
            "one of them."
        )
    if head in (getattr(config, "generation_kwargs", None) or {}):
        raise ValueError(
            f"generation_kwargs must not have {head!r} beside a schedule of it, got {config.generation_kwargs!r}. It "
            f"would win over the schedule. Remove it from generation_kwargs."
        )


def _short(hint: str) -> str:
    """A hint without its list of everything, if it has a guess."""
    return hint.partition(" Valid:")[0] if "Did you mean" in hint else hint


def _is_numeric(annotation: Any) -> bool:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(_is_numeric(a) for a in typing.get_args(annotation))
    return annotation in (int, float) or annotation in ("int", "float")


def _check_course(schedules: Mapping[str, Schedule], config: Any) -> None:
    """Set a copy of the configuration to what the schedules say at the start, middle, end and turns of the run."""
    max_steps = config.max_steps if config.max_steps > 0 else _NOMINAL_STEPS
    turns = {0, max_steps // 2, max_steps}
    for schedule in schedules.values():
        turns.update(step for step in schedule.breakpoints(max_steps) if config.max_steps <= 0 or step <= max_steps)
    # What follows a metric may be anywhere between its ends at any time
    ends = (None, 0, 1) if any(schedule.follows for schedule in schedules.values()) else (None,)
    for step in sorted(turns):
        for end in ends:
            values = {name: _sample(name, s, step, max_steps, end, config) for name, s in schedules.items()}
            check_values(config, values, step)


def _sample(name: str, schedule: Schedule, step: int, max_steps: int, end: int | None, config: Any) -> float:
    if isinstance(schedule, Function):
        schedule = Function(copy.deepcopy(schedule.function))
    state = ScheduleState(step, max(max_steps, step), get_value(config, name))
    return schedule.value(state) if end is None else schedule.extremes(state)[end]


def check_values(config: Any, values: Mapping[str, float], step: int) -> None:
    """
    Check scheduled values together, in a copy of the configuration.

    Raises:
        ValueError: If one is no number, or out of its field's range.
    """
    probe = copy.copy(config)
    probe.schedules = None
    probe._scheduled_fields = frozenset(getattr(config, "schedules", None) or ())  # which may have another value yet
    for name, value in values.items():
        if not is_number(value):
            raise ValueError(
                f"schedules[{name!r}] must give finite numbers, got {value!r} at step {step}. The field would have no "
                "value. Return a float."
            )
        rounded = set_value(probe, name, value)
        field = SCHEDULABLE.get(name)
        if field is not None and not field.valid(rounded):
            raise ValueError(
                f"schedules[{name!r}] must stay in the range of {name}, {field.rule}, got {rounded!r} at step {step}."
                " Change its ends."
            )
    try:
        probe.validate_distillation()
    except ValueError as error:
        raise ValueError(
            f"schedules must keep the configuration valid, got {dict(values)} at step {step}: {error}"
        ) from error


def get_value(config: Any, name: str) -> float | None:
    """The number at a field, or at `field.key`; `None` if it is unset."""
    head, _, rest = name.partition(".")
    value = getattr(config, head)
    while rest:
        entries = _entries(value, name)
        key = _key(entries, rest, name)
        value, rest = entries.get(key), rest[len(key) + 1 :]
    if value is not None and not is_number(value):
        raise ValueError(
            f"schedules must name numbers, got {name!r}, which is {value!r}. There is nothing between two of its "
            "values. Name a number."
        )
    return value


def set_value(config: Any, name: str, value: float) -> float:
    """
    Set the number at a field, or at `field.key`. Dicts are replaced, never changed in place.

    Returns:
        `float`: The number as it was set: fields that count are rounded to the nearest whole number, halves up.
    """
    head, _, rest = name.partition(".")
    if name in SCHEDULABLE and SCHEDULABLE[name].whole:
        value = math.floor(value + 0.5)
    setattr(config, head, _replaced(getattr(config, head), rest, value, name) if rest else value)
    return value


def _replaced(container: Any, rest: str, value: float, name: str) -> Any:
    if not rest:
        return value
    entries = dict(_entries(container, name))
    key = _key(entries, rest, name)
    entries[key] = _replaced(entries.get(key), rest[len(key) + 1 :], value, name)
    return entries


def _entries(container: Any, name: str) -> Mapping[str, Any]:
    """A dict field; the name alone of a weighting means one without parameters."""
    if isinstance(container, str):
        return {container: {}}
    if container is None or isinstance(container, Mapping):
        return container or {}
    raise ValueError(f"schedules must name numbers in dicts, got {name!r}, on whose way is {container!r}. Name one.")


def _key(entries: Mapping[str, Any], rest: str, name: str) -> str:
    """The key that the rest of a name begins with. Keys that are import paths have dots of their own."""
    keys = [key for key in entries if rest == key or rest.startswith(f"{key}.")]
    if keys:
        return max(keys, key=len)
    if "." in rest:
        raise ValueError(
            f"schedules must name numbers that the configuration has, got {name!r}. There is no "
            f"{rest.partition('.')[0]!r}.{nearest_name(rest.partition('.')[0], [*map(str, entries)])}"
        )
    return rest
