# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""A recipe becomes fields of a configuration: explicit fields win, and what was changed is on record."""

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from .entry import NEEDS, SLOT_OF, Recipe
from .explicit import explicit_fields

# A choice and its parameters: where another choice is given, the recipe's parameters go with the recipe's choice
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "divergence": ("divergence_kwargs",),
    "off_policy_divergence": ("off_policy_divergence_kwargs",),
    "target": ("target_kwargs",),
    "reward_mix": ("reward_mix_kwargs",),
    "importance_weighting": ("importance_low", "importance_high"),
    "teacher_sync": ("teacher_sync_steps", "teacher_sync_rate"),
    "credit": (
        "direct_coef",
        "discount",
        "return_horizon",
        "return_from_next",
        "return_normalization",
        "advantage_signal",
        "advantage_power",
        "advantage_baseline",
        "advantage_floor",
        "advantage_clip",
        "advantage_whitening",
        "importance_weighting",
        "importance_low",
        "importance_high",
        "ratio_anchor",
    ),
}


def apply_recipe(config: Any, recipe: Recipe) -> None:
    """
    Set the fields of a recipe that were not given, and record those that were in `config.recipe_changes`.

    Rules. A field counts as given as [`explicit.explicit_fields`] says, also with its default value. Dicts are not
    merged: a dict that is given replaces the recipe's. Where another divergence, target, reward mix, importance
    weighting, teacher sync or credit than the recipe's is given, the recipe's parameters of it are dropped, and so is
    its schedule of a field that is given (with a warning). A configuration that has `recipe_changes` already was
    saved by this function and is left as it is.

    Args:
        config ([`OnPolicyDistillConfig`]): At the beginning of its `__post_init__`.
        recipe ([`Recipe`]): Of kind `"slots"`.
    """
    if config.recipe_changes is not None:
        config.recipe_changes = _parsed(config.recipe_changes)
        return
    explicit = explicit_fields(config)
    config.__dict__["_explicit_fields"] = explicit  # for messages: the values do not tell any more
    defaults = {f.name: f for f in dataclasses.fields(config)}
    changes: dict[str, list[Any]] = {}
    dropped = _dropped(config, recipe, explicit)
    for name, value in recipe.fields.items():
        if name in explicit:
            used = _parsed(getattr(config, name))
        elif name in dropped:
            used = defaults[name].default
        else:
            used = copy.deepcopy(value)
            if name == "schedules":
                used = _without_given(used, config, recipe, explicit | dropped)
            setattr(config, name, used)
        if not _same(used, value):
            changes[name] = [copy.deepcopy(value), copy.deepcopy(used)]
    config.recipe_changes = changes


def _dropped(config: Any, recipe: Recipe, explicit: Collection[str]) -> frozenset[str]:
    """Fields of the recipe that are parameters of a choice that another one was given for."""
    names: set[str] = set()
    for choice, parameters in _PARAMETERS.items():
        if choice in explicit and choice in recipe.fields and getattr(config, choice) != recipe.fields[choice]:
            names.update(parameters)
    return frozenset(names) - frozenset(explicit)


def _without_given(schedules: dict[str, Any], config: Any, recipe: Recipe, given: Collection[str]) -> Any:
    kept = {}
    for key, spec in schedules.items():
        name = key.partition(".")[0]
        if name not in given:
            kept[key] = spec
            continue
        warnings.warn(
            f"recipe {recipe.name!r} schedules {key}, and {name} is given as {getattr(config, name)!r}: it stays at "
            f"that value. Leave {name} unset to follow the recipe, or set schedules to change the schedule itself.",
            UserWarning,
            stacklevel=2,
        )
    return kept or None


def _parsed(value: Any) -> Any:
    """A dict field as the command line gives it."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:  # left for the configuration's own check, which names the field
            return value
    return value


def _same(given: Any, value: Any) -> bool:
    """Equal, where a YAML file may have written a number as text (`1e-6`) and has lists for tuples."""
    if isinstance(value, float) and isinstance(given, str):
        try:
            return float(given) == value
        except ValueError:
            return False
    if isinstance(value, (list, tuple)) and isinstance(given, (list, tuple)):
        return list(given) == list(value)
    return bool(given == value)


def explain_conflict(error: ValueError, config: Any, recipe: Recipe) -> ValueError:
    """
    The error of a check, with where the fields that it names come from.

    Args:
        error (`ValueError`): Of the configuration's or the trainer's checks.
        config ([`OnPolicyDistillConfig`]): As it was checked.
        recipe ([`Recipe`]): That was applied to it.

    Returns:
        `ValueError`: Its message, and for each slot that it names, whether the recipe or the person has set it.
    """
    message = str(error)
    if f"recipe {recipe.name!r}" in message:
        return error
    explicit: frozenset[str] = vars(config).get("_explicit_fields", frozenset())
    known = {f.name for f in dataclasses.fields(config)} & set(SLOT_OF)
    # The first sentence says what conflicts, the others what to do about it
    first, _, rest = message.partition(". ")
    named, remedies = (
        [name for name in dict.fromkeys(re.findall(r"[a-z_0-9]+", text)) if name in known] for text in (first, rest)
    )
    given = [name for name in named if name in explicit]
    of_recipe = [name for name in named if name not in explicit]
    of_recipe = of_recipe or [name for name in remedies if name in recipe.fields and name not in explicit]
    if not given:  # it names a consequence of what was given
        given = [name for name in config.recipe_changes or {} if name in explicit]
    if not given or not of_recipe:
        return ValueError(
            f"{message} (With recipe {recipe.name!r}: {_listed(config, of_recipe or given or recipe.fields)}.)"
        )
    return ValueError(
        f"{message} Two slots conflict: recipe {recipe.name!r} has {_listed(config, of_recipe)}, and given is "
        f"{_listed(config, given)}. Leave the second unset, set the first too, or leave the recipe out."
    )


def _listed(config: Any, names: Collection[str]) -> str:
    return ", ".join(f"{name}={getattr(config, name)!r} (slot {SLOT_OF.get(name, 'other')})" for name in names)


def check_needs(
    recipe: Recipe,
    changes: Mapping[str, Any] | None = None,
    *,
    columns: Collection[str] | None = None,
    has_view: bool = False,
    has_rewards: bool = False,
    num_references: int = 0,
    teachers: str | None = None,
    has_turns: bool = False,
    num_generations: int = 1,
) -> None:
    """
    Check that a run has what its recipe needs.

    Args:
        recipe ([`Recipe`]): The recipe.
        changes (`Mapping[str, Any]`, *optional*): `config.recipe_changes`. A need whose field is changed is skipped.
        columns (`Collection[str]`, *optional*): The training dataset's, where they are known.
        has_view (`bool`, *optional*, defaults to `False`): Whether `teacher_view=` is given.
        has_rewards (`bool`, *optional*, defaults to `False`): Whether `reward_funcs=` or an environment's are.
        num_references (`int`, *optional*, defaults to `0`): Models in `reference_model=`.
        teachers (`str`, *optional*): What `teacher_model=` is: `"one"`, `"self"`, `"remote"`, `"routed"`, `"mixture"`
            or `None` for none.
        has_turns (`bool`, *optional*, defaults to `False`): Whether `tools=`, `rollout_func=` or
            `environment_factory=` is given.
        num_generations (`int`, *optional*, defaults to `1`): Completions a prompt.

    Raises:
        ValueError: Naming the column or argument that is missing.
    """
    unknown = columns is None
    met = {
        "teacher_prompt": has_view or unknown or "teacher_prompt" in (columns or ()),
        "several_teachers": teachers == "routed",
        "mixture": teachers == "mixture",
        "reference_model": num_references >= 1,
        "two_references": num_references >= 2,
        "rewards": has_rewards,
        "demonstrations": unknown or "completion" in (columns or ()),
        "generating_teacher": teachers in ("one", "self", "routed", "mixture"),
        "group": num_generations >= 2,
        "tools": has_turns,
    }
    for need in recipe.needs:
        rule = NEEDS[need]
        if met[need] or any(name in (changes or {}) for name in rule.fields):
            continue
        raise ValueError(
            f"recipe {recipe.name!r} needs {rule.what}, got none. {recipe.title} is not defined without it. "
            f"{rule.give}, or choose another recipe (`trl-opd recipes`)."
        )
