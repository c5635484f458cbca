# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Which fields of a configuration a person has given.

In Python those are the keywords of the call. TRL's parser passes every field, so [`RecipeParser`] notes the names in
the YAML file and on the command line before it does.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from trl import TrlParser

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
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._in_file: frozenset[str] = frozenset()

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        self._in_file |= frozenset(kwargs)
        return super().set_defaults_with_config(**kwargs)

    def parse_args_into_dataclasses(self, args: Any = None, **kwargs: Any) -> Any:
        # argparse leaves what a namespace holds already: what is still unset after parsing was not on the command line
        unset = object()
        namespace = argparse.Namespace(**{action.dest: unset for action in self._actions})
        self.parse_known_args(args, namespace)
        given = {name for name, value in vars(namespace).items() if value is not unset}
        with named_fields(self._in_file | given):
            return super().parse_args_into_dataclasses(args, **kwargs)
