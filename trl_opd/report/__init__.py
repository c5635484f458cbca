# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""`trl-opd report`: a run, or several over each other, as one HTML file."""

from .load import NoRunError, Run, load_run, load_runs
from .page import write_report

__all__ = ["NoRunError", "Run", "load_run", "load_runs", "write_report"]
