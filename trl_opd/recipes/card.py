# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What a model card says about the recipe."""

import json
import os
from typing import Any

from .catalogue import get_recipe
from .entry import EVIDENCE, Recipe

_HEADING = "### Recipe"
_NEXT = "### Framework versions"


def paper_of(recipe: Recipe | str) -> dict[str, str]:
    """The method's paper as a trainer's `_paper`, from which TRL writes the model card."""
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    paper = {"title": recipe.paper, "citation": recipe.citation}
    if recipe.arxiv is not None:
        paper["id"] = recipe.arxiv
    return paper


def model_card_section(config: Any) -> str:
    """
    The recipe of a run in Markdown: its paper, its fidelity, and the fields that were changed.

    Args:
        config ([`OnPolicyDistillConfig`]): Of the run.

    Returns:
        `str`: Empty without a recipe.
    """
    if config.recipe is None:
        return ""
    recipe = get_recipe(config.recipe)
    source = f"[{recipe.paper}]({recipe.link})" if recipe.link else recipe.paper
    lines = [
        _HEADING,
        "",
        f"`recipe: {recipe.name}` ({recipe.title}), after {source} ({recipe.authors}; {recipe.year}).",
        "",
        f"- Fidelity: {recipe.fidelity}. The formula is {EVIDENCE[recipe.evidence]}.",
    ]
    if recipe.left_out:
        lines.append(f"- Not in it: {recipe.left_out}")
    if recipe.conflict:
        lines.append(f"- Sources disagree: {recipe.conflict}")
    changes = config.recipe_changes or {}
    if changes:
        lines += ["- Changed in this run:", "", "  | field | recipe | this run |", "  |---|---|---|"]
        lines += [f"  | `{name}` | {_cell(before)} | {_cell(after)} |" for name, (before, after) in changes.items()]
    else:
        lines.append("- Changed in this run: nothing that the recipe sets.")
    return "\n".join([*lines, "", "```bibtex", recipe.citation, "```", ""])


def _cell(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not callable(value) else getattr(value, "__name__", "a function")
    return "`" + text.replace("|", "\\|") + "`"


def add_to_model_card(config: Any, path: str | os.PathLike[str]) -> None:
    """
    Put [`model_card_section`] into a model card that TRL has written, before its framework versions.

    Args:
        config ([`OnPolicyDistillConfig`]): Of the run.
        path (`str`): The card, `README.md`. Without a recipe, or where the section stands already, it is left alone.
    """
    section = model_card_section(config)
    if not section or not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        card = file.read()
    if _HEADING in card:
        return
    before, heading, after = card.partition(_NEXT)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{before}{section}\n{heading}{after}")
