# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Which fields of a configuration a person has given.

In Python those are the keywords of the call. TRL's parser passes every field, so [`RecipeParser`] notes the names in
the YAML file and on the command line before it does.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NoReturn, get_type_hints

from trl import TrlParser

from ..config_file import coerce, read_config, unknown_names

_named: ContextVar[frozenset[str] | None] = ContextVar("named_fields", default=None)


@contextmanager
def named_fields(names: Iterable[str]) -> Iterator[None]:
    """Inside, a configuration that is given all of its fields takes these as the explicit ones."""
    token = _named.set(frozenset(names))
    try:
        yield
    finally:
        _named.reset(token)


def passed_fields(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Names of the fields in a call `cls(*args, **kwargs)`."""
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    return frozenset(names[: len(args)]) | frozenset(kwargs)


def explicit_fields(config: Any) -> frozenset[str]:
    """
    Fields of a configuration that count as given.

    Those of the call that made it. If the call passed all fields, as parsers do: those that a [`RecipeParser`] has
    noted, and without one those that differ from their default.

    Args:
        config (`Any`): A dataclass whose `__new__` has stored [`passed_fields`] as `_passed_fields`.
    """
    fields = [f for f in dataclasses.fields(config) if f.init]
    everything = frozenset(f.name for f in fields)
    passed = vars(config).get("_passed_fields", frozenset()) & everything
    if passed != everything:
        return passed
    named = _named.get()
    if named is not None:
        return named & everything
    return frozenset(f.name for f in fields if getattr(config, f.name) != _default(f))


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


class RecipeParser(TrlParser):
    """
    A [`~trl.TrlParser`] under which fields named in the YAML file or on the command line win over a recipe's, also
    where they are given their default value.

    Mistakes end the program with exit code 2 and one sentence each: a field that does not exist (with the nearest that
    does), a value of another type than its field's, a file that is not there.
    """

    # Fields of texts that a file may also give as a list or a mapping
    structured: ClassVar[dict[str, tuple[type, ...]]] = {"teacher_model": (dict, list), "dataset_name": (dict, list)}

    def __init__(self, *args: Any, **kwargs: Any):
        # A shortened name would be another field's with the next release that adds one
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._in_file: frozenset[str] = frozenset()
        self._texts: dict[str, str] = {}

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}\nSee `{self.prog} --help`.", file=sys.stderr)
        raise SystemExit(2)

    def parse_args_and_config(self, args: Iterable[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        if given[-1:] == ["--config"]:
            self.error("--config must be followed by a YAML file.")
        path, given = _take_option(given, "--config")
        values: dict[str, Any] = {}
        try:
            if path is not None:
                values, self._texts = read_config(path)
            environment = values.pop("env", None) or {}
            if not isinstance(environment, dict):
                raise ValueError(f"env must be a mapping of environment variables, got {environment!r}.")
            os.environ.update({str(key): str(value) for key, value in environment.items()})
            unknown = self.set_defaults_with_config(**values)[::2]
        except ValueError as error:
            self.error(str(error))
        if unknown and kwargs.get("fail_with_unknown_args", True):
            self.error(unknown_names([name.removeprefix("--") for name in unknown], self._fields, str(path)))
        return super().parse_args_and_config(given, *rest, **kwargs)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        self._in_file |= frozenset(kwargs)
        hints: dict[str, Any] = {}
        for cls in self.dataclass_types:
            hints |= get_type_hints(cls)
        for name, action in self._fields.items():
            if name in kwargs and not isinstance(kwargs[name], self.structured.get(name, ())):
                kwargs[name] = coerce(name, kwargs[name], self._texts.get(name), hints.get(name, Any), action)
        return super().set_defaults_with_config(**kwargs)

    def parse_args_into_dataclasses(self, args: Any = None, **kwargs: Any) -> Any:
        # argparse leaves what a namespace holds already: what is still unset after parsing was not on the command line
        unset = object()
        namespace = argparse.Namespace(**{action.dest: unset for action in self._actions})
        _, remaining = self.parse_known_args(args, namespace)
        if remaining and not kwargs.get("return_remaining_strings"):
            self.error(self._explain(remaining))
        given = {name for name, value in vars(namespace).items() if value is not unset}
        with named_fields(self._in_file | given):
            return super().parse_args_into_dataclasses(args, **kwargs)

    @property
    def _fields(self) -> dict[str, argparse.Action]:
        """The arguments by their fields' names; of two for one field, the one that takes a value."""
        return {action.dest: action for action in reversed(self._actions) if action.dest != "help"}

    def _explain(self, remaining: list[str]) -> str:
        names = [text.partition("=")[0].lstrip("-").replace("-", "_") for text in remaining if text.startswith("--")]
        if names:
            return unknown_names(names, [*self._fields, "config", "help_all"], "The configuration")
        first = remaining[0]
        if first.endswith((".yaml", ".yml", ".json")):
            return f"Arguments must be named, got {first!r}. Did you mean --config {first}?"
        return f"Arguments must be named (--field value), got {' '.join(remaining)!r}."


def _take_option(args: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of `option VALUE` or `option=VALUE`, and the other arguments."""
    for i, text in enumerate(args):
        if text == option and i + 1 < len(args):
            return args[i + 1], [*args[:i], *args[i + 2 :]]
        if text.startswith(f"{option}="):
            return text.partition("=")[2], [*args[:i], *args[i + 1 :]]
    return None, args
