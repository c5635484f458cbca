# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""How the `teacher_model=` argument becomes a teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .adapter import AdapterTeacher
from .cached import CachedTeacher
from .local import LocalTeacher
from .remote import RemoteTeacher
from .routed import RoutedTeacher
from .self_teacher import SelfTeacher

ACCEPTED = (
    "a path, a hub id, 'base', 'adapter:NAME', 'self', 'cache:DIR', a URL or a list of URLs, a dict of teachers, a "
    "model or a callable"
)


def resolve_teacher(
    teacher_model: Any,
    init_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    *,
    memory: Mapping[str, Any] | None = None,
    sync: Mapping[str, Any] | None = None,
) -> Any:
    """
    Turn the `teacher_model=` argument into a [`Teacher`].

    Args:
        teacher_model:
            Path or hub id ([`LocalTeacher`]); `"base"` or `"adapter:NAME"` ([`AdapterTeacher`]); `"self"`
            ([`SelfTeacher`]); `"cache:DIR"` ([`CachedTeacher`]); a URL or several ([`RemoteTeacher`]); a dict of these
            ([`RoutedTeacher`]); a model; any callable.
        init_kwargs (`Mapping[str, Any]`, *optional*):
            For `from_pretrained`, or for [`RemoteTeacher`] if it is a URL.
        trust_remote_code (`bool`): For `from_pretrained`.
        memory (`Mapping[str, Any]`, *optional*): Arguments of [`LocalTeacher`] about memory.
        sync (`Mapping[str, Any]`, *optional*): Arguments of [`SelfTeacher`].

    Raises:
        ValueError, TypeError: If it is none of these.
    """
    init_kwargs, memory = dict(init_kwargs or {}), {k: v for k, v in (memory or {}).items() if v is not None}
    if isinstance(teacher_model, str):
        return _from_string(teacher_model, init_kwargs, trust_remote_code, memory, sync or {})
    if isinstance(teacher_model, Mapping):
        return _from_mapping(teacher_model, init_kwargs, trust_remote_code, memory, sync)
    if isinstance(teacher_model, Sequence):
        return _from_urls(list(teacher_model), init_kwargs)
    if isinstance(teacher_model, nn.Module) and hasattr(teacher_model, "config"):
        if init_kwargs:
            raise ValueError(
                "teacher_model_init_kwargs must be unset when teacher_model is an instantiated model. They would be "
                "ignored. Load the model with them yourself, or pass its path."
            )
        return LocalTeacher(teacher_model, **memory)
    if callable(teacher_model):
        return teacher_model
    raise TypeError(f"teacher_model must be {ACCEPTED}, got {type(teacher_model).__name__}.")


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _from_string(
    name: str,
    init_kwargs: dict[str, Any],
    trust_remote_code: bool,
    memory: dict[str, Any],
    sync: Mapping[str, Any],
) -> Any:
    if name == "base" or name.startswith("adapter:"):
        return AdapterTeacher.from_string(name)
    if name == "self":
        return SelfTeacher(**sync)
    if name.startswith("cache:"):
        return CachedTeacher(name.removeprefix("cache:"))
    if is_url(name):
        return _from_urls(name.split(","), init_kwargs)
    return LocalTeacher(name, **memory, **{"trust_remote_code": trust_remote_code, **init_kwargs})


def _from_urls(urls: list[Any], init_kwargs: dict[str, Any]) -> Any:
    if not urls or not all(isinstance(url, str) and is_url(url.strip()) for url in urls):
        raise ValueError(
            f"teacher_model as a list must hold URLs of servers with the same model, got {urls!r}. Different teachers "
            "have different scores. Pass a dict to send each sample to its own teacher, or a MixtureTeacher."
        )
    return RemoteTeacher([url.strip() for url in urls], **init_kwargs)


def _from_mapping(
    teachers: Mapping[Any, Any],
    init_kwargs: dict[str, Any],
    trust_remote_code: bool,
    memory: dict[str, Any],
    sync: Mapping[str, Any] | None,
) -> RoutedTeacher:
    loaded: dict[str, Any] = {}  # the same path under two names is one teacher
    members = {}
    for name, teacher in teachers.items():
        if not isinstance(teacher, str):
            kwargs = {} if isinstance(teacher, nn.Module) else init_kwargs
            members[name] = resolve_teacher(teacher, kwargs, trust_remote_code, memory=memory, sync=sync)
            continue
        if teacher not in loaded:
            loaded[teacher] = resolve_teacher(teacher, init_kwargs, trust_remote_code, memory=memory, sync=sync)
        members[name] = loaded[teacher]
    return RoutedTeacher(members)
