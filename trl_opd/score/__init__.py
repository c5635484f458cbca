# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
`trl-opd score`: a teacher's log-probs of fixed completions, written once for training without the teacher.

    trl-opd score --teacher PATH_OR_URL --dataset data.jsonl --output scores
    trl-opd train --teacher_model cache:scores ...

A run that was stopped, however it was stopped, goes on where it was, to the same bytes; further rows at the end of the
dataset are added.
"""

from .arguments import ScoreArguments
from .run import main, score_dataset

__all__ = ["ScoreArguments", "main", "score_dataset"]
