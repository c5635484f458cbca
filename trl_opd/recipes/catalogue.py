# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""All entries, found by name."""

import difflib
from collections.abc import Mapping

from . import divergences, not_yet, pipelines, rl, rollouts, sampled, self_distillation, targets, weights
from .entry import FIDELITIES, KINDS, NEEDS, SLOTS, Recipe

_ROOMS = (divergences, sampled, targets, weights, rollouts, self_distillation, rl, pipelines, not_yet)
RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for room in _ROOMS for recipe in room.RECIPES}
ALIASES: Mapping[str, str] = {alias: recipe.name for recipe in RECIPES.values() for alias in recipe.aliases}
GROUPS: Mapping[str, tuple[Recipe, ...]] = {room.TITLE: room.RECIPES for room in _ROOMS}


def list_recipes(
    slot: str | None = None, need: str | None = None, fidelity: str | None = None, kind: str | None = "slots"
) -> list[str]:
    """
    Names of the methods, in the order of the catalogue.

    Args:
        slot (`str`, *optional*): Only those that change this slot.
        need (`str`, *optional*): Only those that need this, a key of `NEEDS`; `"none"`: those that need nothing.
        fidelity (`str`, *optional*): Only those of this fidelity, one of `FIDELITIES`.
        kind (`str`, *optional*, defaults to `"slots"`): `"slots"` (values of `OnPolicyDistillConfig(recipe=...)`),
            `"pipeline"`, `"not_yet"`, or `None` for all.

    Returns:
        `list[str]`

    Raises:
        ValueError: If a filter is unknown.
    """
    for name, value, valid in (
        ("slot", slot, list(SLOTS)),
        ("need", need, [*NEEDS, "none"]),
        ("fidelity", fidelity, list(FIDELITIES)),
        ("kind", kind, list(KINDS)),
    ):
        if value is not None and value not in valid:
            raise ValueError(
                f"{name} must be a known name, got {value!r}. No method is filed under it. Set one of: "
                f"{', '.join(valid)}."
            )
    return [
        recipe.name
        for recipe in RECIPES.values()
        if (slot is None or slot in recipe.slots)
        and (need is None or need in recipe.needs or (need == "none" and not recipe.needs))
        and (fidelity is None or recipe.fidelity_class == fidelity)
        and (kind is None or recipe.kind == kind)
    ]


def get_recipe(name: str) -> Recipe:
    """
    The entry of a method.

    Args:
        name (`str`): Its name or an alias; capitals, hyphens and spaces do not matter.

    Returns:
        [`Recipe`]

    Raises:
        ValueError: If there is none; the message has the nearest names.
    """
    key = str(name).strip().lower().replace("-", "_").replace(" ", "_")
    key = ALIASES.get(key, key)
    if key in RECIPES:
        return RECIPES[key]
    raise ValueError(
        f"recipe must be a known name, got {name!r}. There is no such method in the catalogue.{_nearest(key)} "
        "`trl-opd recipes` lists all of them."
    )


def _nearest(key: str) -> str:
    names = [*RECIPES, *ALIASES]
    close = difflib.get_close_matches(key, names, n=6, cutoff=0.75)
    close += [n for n in names if len(key) > 1 and key in n]
    close += difflib.get_close_matches(key, names, n=3, cutoff=0.4)
    # A transposition is no nearer to difflib than another letter is, but likelier
    close.sort(key=lambda n: sorted(n) != sorted(key))
    unique = list(dict.fromkeys(close))[:3]
    return f" Did you mean {' or '.join(repr(n) for n in unique)}?" if unique else ""


def usable_recipe(name: str) -> Recipe:
    """
    The entry of a method that fields of the configuration express.

    Raises:
        ValueError: If there is none, or it is reached in another way; the message says how.
    """
    recipe = get_recipe(name)
    if recipe.kind == "slots":
        return recipe
    reason = "TRL's own trainers run it" if recipe.kind == "pipeline" else "it needs a mechanism that is not here yet"
    raise ValueError(
        f"recipe must be a method that fields of the configuration express, got {name!r}. {recipe.title}: {reason}. "
        f"{recipe.how}"
    )
