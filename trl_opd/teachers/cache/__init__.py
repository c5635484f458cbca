# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Scores on disk: what identifies them, how they are encoded, written and read."""

from .format import Answer, CacheMeta, Question, prompt_hash
from .reader import CacheReader
from .writer import CacheWriter

__all__ = ["Answer", "CacheMeta", "CacheReader", "CacheWriter", "Question", "prompt_hash"]
