# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Fields that change during a run: the field `schedules` of a configuration. Torch only.

It is a dict from a field, or `field.key` for a number inside a dict field, to a schedule: a number (constant), a dict
with `type` and the parameters of a class of `TYPES`, a function of [`ScheduleState`], or the import path of one.

```python
schedules={
    "max_completion_length": {"type": "piecewise", "points": [[0, 256], [0.5, 1024], [0.8, 4096]]},
    "divergence_kwargs.beta": {"type": "anneal", "start": 5e-3, "end": 1e-3, "change_per_step": 5e-5},
    "distill_coef": {"type": "cosine", "start": 1.0, "end": 0.0, "begin": 100, "finish": 500, "unit": "steps"},
}
```

Positions have one unit, which is never guessed. `unit="fraction"`, the default: shares of the run in [0, 1], where the
step after k of n others is at k / n, as with learning rates (1 is reached when the last step is done). `unit="steps"`:
whole numbers of optimizer steps taken before, 0 at the first step.

A schedule that follows a metric is told each new measurement once: a metric of training after every optimizer step
(whatever `logging_steps` is), one of evaluation (`eval_...`) after every evaluation. Both are means over all
processes, as they are logged, so that all processes have the same schedule.
"""

from .base import Schedule, ScheduleState
from .fields import SCHEDULABLE, SCHEDULABLE_DICTS, resolve_schedules, value_range
from .spec import TYPES, make_schedule

__all__ = [
    "SCHEDULABLE",
    "SCHEDULABLE_DICTS",
    "TYPES",
    "Schedule",
    "ScheduleState",
    "make_schedule",
    "resolve_schedules",
    "value_range",
]
