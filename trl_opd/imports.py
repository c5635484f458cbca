# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Objects by their import path, as configuration files name them."""

import importlib
import os
import sys
from typing import Any


def load_object(name: str, rule: str) -> Any:
    """What a dotted import path names, the working directory included; `rule` begins the message if it fails."""
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"{rule}, got {name!r}. It cannot be imported. Write it as 'my_module.my_function'.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{rule}, got {name!r}: {error}. Run from the folder that holds the module, or install it."
        ) from error
