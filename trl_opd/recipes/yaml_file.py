# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""A method as a YAML file for `trl-opd train`."""

import textwrap

import yaml  # type: ignore[import-untyped]

from .entry import NEEDS, Recipe

_COMMON = """\
output_dir: {name}
learning_rate: 1.0e-4
per_device_train_batch_size: 8
max_steps: 200
logging_steps: 5

use_peft: true
lora_r: 64
lora_alpha: 128
lora_target_modules: all-linear
"""
# Script arguments (and comments) that a need asks for
_ARGUMENTS = {
    "rewards": "reward_funcs: [my_rewards.is_correct]  # your module, in the folder you run from",
    "reference_model": "reference_model: [Qwen/Qwen3-1.7B]",
    "two_references": "reference_model: [Qwen/Qwen3-8B-Base, Qwen/Qwen3-1.7B-Base]  # raw teacher, raw student",
}


def yaml_of(recipe: Recipe) -> str:
    """
    A complete file: models and dataset stand for yours.

    Args:
        recipe ([`Recipe`]): Of kind `"slots"`.
    """
    lines = ["# trl-opd train --config run.yaml", f"recipe: {recipe.name}", ""]
    lines += ["model_name_or_path: Qwen/Qwen3-1.7B", _teacher(recipe)]
    lines += [_ARGUMENTS[need] for need in recipe.needs if need in _ARGUMENTS]
    columns = ["prompt", *_columns(recipe)]
    lines += _comment(f"The dataset's columns: {', '.join(columns)}")
    lines.append("dataset_name: your/dataset")
    for need in recipe.needs:
        if need in ("mixture", "tools"):
            lines += _comment(
                f"{NEEDS[need].give} in Python: a YAML file cannot name it. The fields are the same there."
            )
    lines += ["", _COMMON.format(name=recipe.name.replace("_", "-")).rstrip()]
    if recipe.fields:
        lines += ["", *_comment("What the recipe sets. To change a field, uncomment it.")]
        text = yaml.safe_dump(
            dict(recipe.fields), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
        )
        lines += [f"# {line}" for line in text.rstrip().split("\n")]
    return "\n".join(lines) + "\n"


def _teacher(recipe: Recipe) -> str:
    teacher = recipe.teacher_model or ""
    quoted = f"'{teacher}'" if teacher.startswith("{") else teacher
    if recipe.teacher_model == "self":
        return f"teacher_model: {quoted}  # the student itself, as teacher_sync says"
    return f"teacher_model: {quoted}"


def _columns(recipe: Recipe) -> list[str]:
    columns = []
    if "demonstrations" in recipe.needs:
        columns.append("completion")
    if "teacher_prompt" in recipe.needs:
        columns.append("teacher_prompt (what the teacher sees instead; or teacher_view)")
    if "several_teachers" in recipe.needs:
        columns.append("teacher (a key of teacher_model)")
    if "rewards" in recipe.needs:
        columns.append("what your reward reads")
    return columns


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ")
