# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What `run.json` says of a run: configuration, models, versions; in plain JSON, without secrets."""

import json
import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_model_param_count
from trl.trainer.utils import get_config_model_id

from .recipes import get_recipe
from .teachers.base import leaves, teacher_name

if TYPE_CHECKING:
    from .trainer import OnPolicyDistillTrainer

# Of the output folder. Transformers uploads nothing whose name begins so to the hub: no data with the model
FOLDER = "_opd"
PACKAGES = ("trl-opd", "trl", "transformers", "torch", "peft", "accelerate", "datasets", "liger-kernel", "vllm")
_HIDDEN = "***"
_SECRET = re.compile(
    r"(?:^|[_\-.])(?:token|api[_\-]?key|secret|password|passwd|authorization|credentials?|(?:access|private)[_\-]key)$",
    re.I,
)
_NO_SECRET = re.compile(r"(?:pad|eos|bos|unk|sep|cls|mask|image|video|boi|eoi)_token$", re.I)  # a tokenizer's


# Plain values without secrets


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite are `None`, secrets are `"***"`, the rest is its name."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _HIDDEN if _is_hidden(str(k), v) else plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if callable(getattr(value, "to_dict", None)) and not isinstance(value, type):
        return plain(value.to_dict())
    if callable(value) or isinstance(value, type):
        return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', type(value).__name__)}"
    text = str(value)
    return type(value).__name__ if " at 0x" in text else hide(text)


def _is_hidden(name: str, value: Any) -> bool:
    return bool(value) and not isinstance(value, int | float) and is_secret(name)


def is_secret(name: str) -> bool:
    """Whether a field, key or variable of this name holds something that no file should."""
    return bool(_SECRET.search(name)) and not _NO_SECRET.search(name)


def hide(text: str) -> str:
    """Text without credentials in addresses and without the values of secret environment variables."""
    text = re.sub(r"(://)[^/@\s'\"]+@", rf"\1{_HIDDEN}@", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and is_secret(name) and value in text:
            text = text.replace(value, _HIDDEN)
    return text


def command() -> list[str]:
    """The command line that started this process, without secrets."""
    words: list[str] = []
    for word in sys.argv:
        name, equals, value = word.partition("=")
        if words and is_secret(words[-1]) and words[-1].startswith("-") and not word.startswith("-"):
            words.append(_HIDDEN)
        elif equals and value and is_secret(name):
            words.append(f"{name}={_HIDDEN}")
        else:
            words.append(_without_keys(word))
    return words


def _without_keys(word: str) -> str:
    """A word of the command line that may be a dict."""
    if word.startswith("{"):
        try:
            return json.dumps(plain(json.loads(word)))
        except ValueError:
            pass
    return hide(word)


# The parts of run.json


def config_facts(args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """All fields of a configuration, and those of them that a person has set to something else than the default."""
    shown = [f for f in fields(args) if f.init]
    config = plain({f.name: getattr(args, f.name) for f in shown})
    differing = [f.name for f in shown if getattr(args, f.name) != _default(f)]
    # Other fields differ because the configuration derives them; of a promoted GRPOConfig, which ones is not known
    state = vars(args)
    given = state.get("_explicit_fields") or state.get("_passed_fields") or frozenset(differing)
    if args.recipe is not None:
        given = given | frozenset(get_recipe(args.recipe).fields) | frozenset(args.recipe_changes or {})
    changed = {name: config[name] for name in differing if name in given and name != "recipe_changes"}
    return config, changed


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def recipe_facts(args: Any) -> dict[str, Any] | None:
    """The recipe of a run, its paper, and what was changed of it."""
    if args.recipe is None:
        return None
    recipe = get_recipe(args.recipe)
    names = ("name", "title", "paper", "link", "authors", "year", "citation", "fidelity")
    facts = {name: plain(getattr(recipe, name, None)) for name in names}
    changes = {name: list(pair) for name, pair in (args.recipe_changes or {}).items()}
    return facts | {"changes": plain(changes)}


def student_facts(trainer: "OnPolicyDistillTrainer") -> dict[str, Any]:
    """The student. To be called before accelerate shards it: the counts are those of the whole model."""
    model: Any = trainer.model
    base = model.get_base_model() if is_peft_model(model) else model
    partitioned = any(hasattr(p, "ds_numel") for p in model.parameters())
    # Four-bit weights count as what they stand for
    total = get_model_param_count(model) if partitioned else base.num_parameters()
    return {
        "name": hide(str(get_config_model_id(base.config) or type(base).__name__)),
        "class": type(base).__name__,
        "parameters": int(total),
        "trainable_parameters": int(get_model_param_count(model, trainable_only=True)),
        "adapter": _adapter(model),
    }


def _adapter(model: Any) -> str | None:
    if not is_peft_model(model):
        return None
    name = model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapters[0]
    config = model.peft_config[name]
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    known = {"r": "r", "alpha": "lora_alpha"}
    parts = [f"{name}={getattr(config, field)}" for name, field in known.items() if hasattr(config, field)]
    modules = getattr(config, "target_modules", None)
    if modules:
        names = [modules] if isinstance(modules, str) else sorted({name.rpartition(".")[2] for name in modules})
        parts.append("on " + ", ".join(names))
    return " ".join([kind, *parts])


def teacher_facts(trainer: "OnPolicyDistillTrainer") -> dict[str, Any]:
    """The teacher, and those that it is made of."""
    teacher = trainer.teacher
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    members = [_member(member, sharded) for member in leaves(teacher)]
    return {"name": hide(teacher_name(teacher)), "kind": type(teacher).__name__, "members": members}


def _member(teacher: Any, sharded: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": hide(teacher_name(teacher)), "kind": type(teacher).__name__}
    model = getattr(teacher, "model", None)
    if isinstance(model, PreTrainedModel) and not sharded:  # of a shard, the count would not be the model's
        facts["parameters"] = int(model.num_parameters())
    for name in ("quantization", "offload", "sync", "max_length", "vocab_size"):
        value = getattr(teacher, name, None)
        if isinstance(value, str | int):
            facts[name] = value
    return facts


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run does, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "trl-opd" not in found:  # imported from a checkout
        from . import __version__

        found["trl-opd"] = __version__
    return found


def device_name(device: torch.device) -> str:
    """A device's name for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type
