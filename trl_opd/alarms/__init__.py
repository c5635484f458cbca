# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Alarms: what precedes a collapse, found in the log.

[`AlarmCallback`] reads each training line that is logged; the rules are pure functions of the lines so far
(`trl_opd.alarms.rules`), their thresholds a table (`trl_opd.alarms.thresholds`), which `alarm_thresholds` changes:

```python
OnPolicyDistillConfig(on_alarm="stop", alarm_thresholds={"kl_spike.factor": 5, "overlap_stalled.on": 0})
```
"""

from .alarm import ALARMS, Alarm
from .callback import AlarmCallback, check_on_alarm
from .thresholds import THRESHOLDS, Threshold, check_thresholds
from .watch import Watch

__all__ = [
    "ALARMS",
    "THRESHOLDS",
    "Alarm",
    "AlarmCallback",
    "Threshold",
    "Watch",
    "check_on_alarm",
    "check_thresholds",
]
