# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Short names for what a teacher is, so that stored scores are never taken for another's."""

import hashlib
import os
from pathlib import Path
from typing import Any

from .base import teacher_name

_SAMPLES, _SAMPLE_BYTES = 256, 4096


def model_name(teacher: Any) -> str:
    """The model that a server serves, wherever it stands; else the teacher's name."""
    return getattr(teacher, "served_model", None) or teacher_name(teacher)


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Of a tokenizer's ids and tokens; `None` without one."""
    if tokenizer is None:
        return None
    pairs = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return hashlib.blake2b(repr(pairs).encode(), digest_size=16).hexdigest()


def weights_fingerprint(teacher: Any) -> str | None:
    """
    Of the weight files at a teacher's path: their sizes, and blocks of 4 KiB spread evenly over each. `None` if the
    teacher is not a folder here.
    """
    name = teacher_name(teacher)
    folder = Path(os.path.expanduser(name))
    if not (isinstance(name, str) and folder.is_dir()):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".safetensors", ".bin") and path.name not in ("config.json", "adapter_config.json"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as f:
            for i in range(min(_SAMPLES, size // _SAMPLE_BYTES + 1)):
                f.seek(max(0, size - _SAMPLE_BYTES) * i // _SAMPLES if size > _SAMPLES * _SAMPLE_BYTES else i * 4096)
                digest.update(f.read(_SAMPLE_BYTES))
    return digest.hexdigest()
