# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Fused projection, divergence and gradient. The one public name is [`fused_linear_divergence`]."""

from .dispatch import fused_linear_divergence
from .result import FusedDivergence

__all__ = ["FusedDivergence", "fused_linear_divergence"]
