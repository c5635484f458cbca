# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The methods of the literature, by name: `OnPolicyDistillConfig(recipe="gkd")`.

Each is one declarative entry: the fields it sets, its paper, what it needs, how faithful it is and what is left out.
"""

from typing import Any

from . import apply as _apply
from .card import add_to_model_card, model_card_section, paper_of
from .catalogue import ALIASES, GROUPS, RECIPES, get_recipe, list_recipes, usable_recipe
from .entry import EVIDENCE, FIDELITIES, KINDS, NEEDS, SLOT_OF, SLOTS, TEACHERS, Recipe
from .explicit import RecipeParser, explicit_fields, named_fields, passed_fields


def apply_recipe(config: Any) -> None:
    """
    Set the fields of `config.recipe` that were not given, see [`apply.apply_recipe`].

    Args:
        config ([`OnPolicyDistillConfig`]): At the beginning of its `__post_init__`.

    Raises:
        ValueError: If the recipe is unknown, or fields do not express it.
    """
    if config.recipe is None:
        config.recipe_changes = None
        return
    recipe = usable_recipe(config.recipe)
    config.recipe = recipe.name
    _apply.apply_recipe(config, recipe)


def explain_conflict(error: ValueError, config: Any) -> ValueError:
    """The error of a check, naming the slots that the recipe and the person have set; as it is without a recipe."""
    if config.recipe is None:
        return error
    return _apply.explain_conflict(error, config, get_recipe(config.recipe))


def check_needs(config: Any, **given: Any) -> None:
    """
    Check that a run has what `config.recipe` needs, see [`apply.check_needs`].

    Raises:
        ValueError: Naming the dataset column or the argument that is missing.
    """
    if config.recipe is not None:
        given.setdefault("num_generations", config.num_generations)
        _apply.check_needs(get_recipe(config.recipe), config.recipe_changes, **given)


__all__ = [
    "ALIASES",
    "EVIDENCE",
    "FIDELITIES",
    "GROUPS",
    "KINDS",
    "NEEDS",
    "RECIPES",
    "SLOTS",
    "SLOT_OF",
    "TEACHERS",
    "Recipe",
    "RecipeParser",
    "add_to_model_card",
    "apply_recipe",
    "check_needs",
    "explain_conflict",
    "explicit_fields",
    "get_recipe",
    "list_recipes",
    "model_card_section",
    "named_fields",
    "paper_of",
    "passed_fields",
]
