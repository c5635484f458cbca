# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The YAML file of a run: read as people write it, each value checked against its field's type."""

import argparse
import datetime
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_config(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """
    The values of a YAML (or JSON) file, and the text of those that are single words or numbers.

    Args:
        path (`str`): The file.

    Raises:
        ValueError: If it is missing, is no YAML mapping, or names a field twice.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"config must be a YAML file, got {path!r}, which {'is a folder' if file.is_dir() else 'does not exist'}."
            f"{near_file(str(file), ('.yaml', '.yml', '.json'))}"
        )
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = str(error).replace('"<unicode string>"', path)
        raise ValueError(f"config must be a YAML file, got {path!r}, which cannot be read: {what}") from error
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"config must hold a YAML mapping (lines of `field: value`), got {path!r}, which does not.")
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
    lines: dict[str, int] = {}
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in lines:
            raise ValueError(f"{key} must be given once, got it in lines {lines[key]} and {line} of {path}.")
        lines[key] = line
        values[key] = loader.construct_object(value_node, deep=True)
        if isinstance(value_node, yaml.ScalarNode):
            texts[key] = value_node.value
    return values, texts


def near_file(path: str, suffixes: tuple[str, ...] = ()) -> str:
    """A sentence that names the most similar file beside a missing one; empty if none is near."""
    folder = os.path.dirname(path) or "."
    try:
        names = os.listdir(folder)
    except OSError:
        parent = os.path.dirname(os.path.abspath(folder))
        if os.path.isdir(parent):
            return f" Its folder {folder!r} does not exist." + near_name(os.path.basename(folder), os.listdir(parent))
        return f" Its folder {folder!r} does not exist."
    chosen = [name for name in names if not suffixes or name.endswith(suffixes)]
    hint = near_name(os.path.basename(path), chosen)
    if not hint and suffixes and 0 < len(chosen) <= 5:
        hint = f" In {folder!r} there is {', '.join(sorted(chosen))}."
    return hint


def near_name(name: str, valid: Iterable[Any]) -> str:
    """The end of an error message: the nearest valid name; empty if none is near."""
    close = difflib.get_close_matches(name, [str(v) for v in valid], n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def coerce(name: str, value: Any, text: str | None, hint: Any, action: argparse.Action) -> Any:
    """
    A value of a file as its field takes it.

    Args:
        name (`str`): Of the field.
        value: As YAML reads it.
        text (`str`, *optional*): As it is written, if it is a single word or number: `no` is a text to a field that
            holds texts, and `False` to one that holds truth values.
        hint: The field's type.
        action (`argparse.Action`): Its command-line argument, which converts texts and knows the choices.

    Raises:
        ValueError: If it does not take it.
    """
    kinds = _kinds(hint)
    if value is not None and not _fits(value, kinds):
        value = _convert(name, value, text, kinds, action)
    elif value is None and type(None) not in kinds and Any not in kinds:
        raise ValueError(f"{name} must be {_expected(kinds)}, got nothing.")
    if action.choices is not None and value is not None and not isinstance(value, list):
        choices = [getattr(choice, "value", choice) for choice in action.choices]
        if getattr(value, "value", value) not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}.{near_name(str(value), choices)}")
    return value


def _convert(name: str, value: Any, text: str | None, kinds: set[Any], action: argparse.Action) -> Any:
    simple = isinstance(value, (bool, int, float, datetime.date))
    if str in kinds and simple and text is not None:
        return text
    if any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds) and text is not None:
        return text
    if list in kinds and (isinstance(value, str) or simple):
        return [text if text is not None else value]
    if int in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and callable(action.type):
        try:
            return action.type(value)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            pass
    raise ValueError(f"{name} must be {_expected(kinds)}, got {value!r}.")


def _kinds(hint: Any) -> set[Any]:
    """The plain types that a type hint allows."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_kinds(inner) for inner in typing.get_args(hint)))
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    return {origin or hint}


def _fits(value: Any, kinds: set[Any]) -> bool:
    if Any in kinds:
        return True
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return any(isinstance(kind, type) and isinstance(value, kind) for kind in kinds)


def _expected(kinds: set[Any]) -> str:
    words = [word for kind, word in _WORDS.items() if kind in kinds] or [str(kinds)]
    return " or ".join(words)


def unknown_names(unknown: list[str], known: Iterable[str], where: str) -> str:
    """A sentence for each field that does not exist, with the nearest that does."""
    return " ".join(f"{where} has no field {name!r}.{near_name(name, known)}" for name in unknown)
