# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
`trl-opd recipes`: the methods of the literature, and how to run each.

    trl-opd recipes                            # the table
    trl-opd recipes --slot target --kind all   # those that change one slot; also --need, --fidelity
    trl-opd recipes gkd                        # one: formula, citation, what it sets, a YAML for `trl-opd train`
    trl-opd recipes gkd --yaml > run.yaml      # the YAML alone
    trl-opd recipes --markdown                 # docs/methods.md
"""

import argparse
import json
import shutil
import sys
import textwrap
from typing import Any

from .recipes import EVIDENCE, FIDELITIES, KINDS, NEEDS, SLOT_OF, SLOTS, TEACHERS, Recipe, get_recipe, list_recipes
from .recipes.markdown import markdown
from .recipes.yaml_file import yaml_of

_KIND_TITLES = {
    "slots": "OnPolicyDistillConfig(recipe=NAME)",
    "pipeline": "With TRL's own trainers (`trl-opd recipes NAME` says how)",
    "not_yet": "Not yet (`trl-opd recipes NAME` says why)",
}
_SHORT = {"as published code": "published code"}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="trl-opd recipes",
        description="The methods of the literature: a table of all of them; or of one its formula, paper, what it "
        "sets and needs, and a YAML for `trl-opd train`.",
    )
    parser.add_argument("name", nargs="?", help="a method: everything about it")
    parser.add_argument(
        "--slot", choices=list(SLOTS), metavar="SLOT", help=f"only those that change this slot: {', '.join(SLOTS)}"
    )
    needs = [*NEEDS, "none"]
    parser.add_argument("--need", choices=needs, metavar="NEED", help=f"only those that need this: {', '.join(needs)}")
    parser.add_argument(
        "--fidelity",
        choices=list(FIDELITIES),
        metavar="CLASS",
        help=f"only those that are as faithful as this: {', '.join(FIDELITIES)}",
    )
    parser.add_argument(
        "--kind",
        choices=[*KINDS, "all"],
        metavar="KIND",
        help=f"how it is reached: {', '.join(KINDS)}, or all (the default)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all that is known, as JSON")
    form.add_argument("--yaml", action="store_true", help="of one method: a file for `trl-opd train` and nothing else")
    form.add_argument("--markdown", action="store_true", help="docs/methods.md")
    args = parser.parse_args(argv)
    if args.markdown:
        print(markdown(), end="")
        return 0
    if args.name is None:
        if args.yaml:
            parser.error("--yaml needs the name of a method")
        filters = {"slot": args.slot, "need": args.need, "fidelity": args.fidelity}
        kind = None if args.kind == "all" else args.kind
        recipes = [get_recipe(name) for name in list_recipes(**filters, kind=kind)]
        print(json.dumps([as_dict(r) for r in recipes], indent=2, ensure_ascii=False) if args.json else table(recipes))
        return 0
    try:
        recipe = get_recipe(args.name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_dict(recipe), indent=2, ensure_ascii=False))
    elif args.yaml and recipe.kind != "slots":
        print(f"{recipe.name} is not a method for `trl-opd train`. {recipe.how}", file=sys.stderr)
        return 2
    else:
        print(yaml_of(recipe) if args.yaml else describe(recipe), end="")
    return 0


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """What is known about a method, for JSON."""
    known = {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}
    return {**known, "slots": recipe.slots, "link": recipe.link, "citation": recipe.citation}


def table(recipes: list[Recipe], width: int | None = None) -> str:
    """
    The methods as a table of plain text, grouped by how they are reached.

    Args:
        recipes (`list[Recipe]`): In the order in which they are shown.
        width (`int`, *optional*): In characters, 80 to 119. Defaults to the terminal's.
    """
    width = min(max(width or shutil.get_terminal_size((119, 24)).columns, 80), 119)
    if not recipes:
        return "No method is all of this. `trl-opd recipes` lists them."
    wide = width >= 110
    head = ["name", "title", "slots", "needs", "fidelity", "arXiv"] if wide else ["name", "slots", "needs", "fidelity"]
    rows = {r.name: _cells(r, wide) for r in recipes}
    fixed = {i: max(len(c[i]) for c in [head, *rows.values()]) for i in range(len(head)) if head[i] not in _WRAPPED}
    room = width - sum(fixed.values()) - 2 * (len(head) - 1)
    shares = {i: share for i, name in enumerate(head) if (share := _WRAPPED.get(name))}
    widths = [fixed.get(i) or room * shares[i] // sum(shares.values()) for i in range(len(head))]
    lines: list[str] = []
    for kind in KINDS:
        chosen = [r for r in recipes if r.kind == kind]
        if chosen:
            lines += [_KIND_TITLES[kind], *_row(head, widths), *_row(["-" * w for w in widths], widths)]
            lines += [line for r in chosen for line in _row(rows[r.name], widths)]
            lines.append("")
    lines.append(f"{len(recipes)} methods. `trl-opd recipes NAME`: formula, paper, fields, and a YAML to run.")
    return "\n".join(lines)


_WRAPPED = {"title": 3, "slots": 3, "needs": 3}  # columns that share the rest of the width, and their shares


def _cells(recipe: Recipe, wide: bool) -> list[str]:
    slots = ", ".join(recipe.slots) or ("-" if recipe.kind == "slots" else "")
    needs = ", ".join(recipe.needs) or "-"
    fidelity = _SHORT.get(recipe.fidelity_class, recipe.fidelity_class)
    if wide:
        return [recipe.name, recipe.title, slots, needs, fidelity, recipe.arxiv or ""]
    return [recipe.name, slots, needs, fidelity]


def _row(cells: list[str], widths: list[int]) -> list[str]:
    wrapped = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for i in range(max(map(len, wrapped))):
        parts = [(w[i] if i < len(w) else "").ljust(width) for w, width in zip(wrapped, widths, strict=True)]
        lines.append("  ".join(parts).rstrip())
    return lines


def describe(recipe: Recipe) -> str:
    """Everything about one method, as plain text."""
    lines = [f"{recipe.name}: {recipe.title}", ""]
    lines += _block(recipe.idea)
    lines += ["", *_block(recipe.formula, "    "), ""]
    source = ", ".join(part for part in (recipe.authors, recipe.venue or str(recipe.year)) if part)
    lines += _block(f"Paper: {recipe.paper}. {source}. {recipe.link or ''}".rstrip())
    if recipe.section:
        lines += _block(f"Survey: arXiv 2604.00626, section {recipe.section}; {recipe.axes}.")
    lines += _block(f"Teacher gives: {', '.join(TEACHERS.get(c, c) for c in recipe.teacher.split(' + '))}.")
    lines += _block(f"Fidelity: {recipe.fidelity or recipe.kind}. The formula is {EVIDENCE[recipe.evidence]}.")
    for label, text in (
        ("Not in it", recipe.left_out),
        ("Sources disagree", recipe.conflict),
        ("Watch", recipe.watch),
        ("How" if recipe.kind == "pipeline" else "Why not", recipe.how),
    ):
        lines += _block(f"{label}: {text}") if text else []
    if recipe.fields:
        lines += ["", "Sets (a field that you give wins):"]
        lines += _pairs(recipe.fields, lambda name: f"[{SLOT_OF[name]}]")
    if recipe.published:
        lines += ["", "Published, and not set:" if recipe.kind == "slots" else "Published:"]
        lines += _pairs(recipe.published, lambda name: "")
    if recipe.needs:
        lines += ["", "Needs:"]
        lines += [line for need in recipe.needs for line in _block(f"- {NEEDS[need].what}", "  ")]
    if recipe.kind == "slots":
        lines += ["", "# ---- run.yaml ----", yaml_of(recipe).rstrip(), "# ------------------"]
    lines += ["", recipe.citation, ""]
    return "\n".join(lines)


def _block(text: str, indent: str = "") -> list[str]:
    rest = indent or "  "
    return textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=rest, break_on_hyphens=False)


def _pairs(values: Any, note: Any) -> list[str]:
    width = max(map(len, values))
    return [f"  {k.ljust(width)}  {json.dumps(v, ensure_ascii=False)}  {note(k)}".rstrip() for k, v in values.items()]
