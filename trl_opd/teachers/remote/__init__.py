# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Teachers behind an HTTP server."""

from .teacher import RemoteTeacher

__all__ = ["RemoteTeacher"]
