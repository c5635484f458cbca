# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""`trl-opd train --help-all`: every field, in the groups in which the configurations' docstrings describe them."""

import argparse
import dataclasses
import inspect
import re
import textwrap
from typing import Any

from transformers import TrainingArguments
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig
from trl.scripts.grpo import GRPOScriptArguments

from .config import OnPolicyDistillConfig

_OURS, _TRL, _HF = "Distillation", "TRL (GRPO)", "transformers"


def all_fields(parser: argparse.ArgumentParser, script_class: type, width: int = 80) -> str:
    """
    The fields of a parser, in groups.

    Args:
        parser (`argparse.ArgumentParser`): Of [`train.make_parser`].
        script_class (`type`): The script arguments, which come first.
        width (`int`): Characters of a line.
    """
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    lines = ["All fields of `trl-opd train`. `trl-opd train --help` explains those to know.", ""]
    for title, names in _groups(script_class):
        shown = [name for name in names if name in actions]
        if not shown:
            continue
        lines += [*textwrap.wrap(title, width), "-" * min(len(title), width)]
        for name in shown:
            lines += _entry(actions.pop(name), width)
        lines.append("")
    if actions:
        lines += ["Other", "-----", *(line for action in actions.values() for line in _entry(action, width)), ""]
    return "\n".join(lines)


def _groups(script_class: type) -> list[tuple[str, list[str]]]:
    """Titles with the names of their fields; a field is in the first group that has it."""
    groups: list[tuple[str, list[str]]] = []
    own = [f.name for f in dataclasses.fields(script_class)]
    inherited = [f.name for f in dataclasses.fields(GRPOScriptArguments)]
    groups.append(("This command", [n for n in own if n not in inherited]))
    groups.append(("Data and rewards", [*inherited, *(f.name for f in dataclasses.fields(DatasetMixtureConfig))]))
    groups.append(("Student and adapter", [f.name for f in dataclasses.fields(ModelConfig)]))
    for cls, label in ((OnPolicyDistillConfig, _OURS), (GRPOConfig, _TRL), (TrainingArguments, _HF)):
        groups += [(f"{label}: {title}", names) for title, names in _documented(cls)]
        groups.append(
            (
                f"{label}: further fields",
                [f.name for f in dataclasses.fields(cls) if f.name in vars(cls)["__annotations__"]],
            )
        )
    return groups


def _documented(cls: type) -> list[tuple[str, list[str]]]:
    """The groups of a docstring: lines `> Title`, and under them `name (type): ...`."""
    groups: list[tuple[str, list[str]]] = [("general", [])]
    for line in inspect.getdoc(cls).split("\n"):  # type: ignore[union-attr]
        title = re.match(r" {4}> (?:Parameters that control )?([^\[].*)$", line)
        if title:
            groups.append((title[1], []))
        elif re.match(r" {4}\w[\w, ]* ?\(`", line):
            groups[-1][1].extend(re.findall(r"(?:^|, )\s*(\w+)(?= ?[,(])", line.partition("(`")[0] + "("))
    return groups


def _entry(action: argparse.Action, width: int) -> list[str]:
    default = "" if action.default in (None, "", []) else f" (default: {_plain(action.default)})"
    help_text = " ".join((action.help or "").split()) + default
    head = f"  --{action.dest}"
    lines = textwrap.wrap(help_text, width - 6, break_on_hyphens=False, break_long_words=True)
    return [head, *(f"      {line}" for line in lines)]


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
