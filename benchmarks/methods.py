# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The methods side by side: each trains a copy of one start on the demo's task, for equally many tokens.

    python benchmarks/methods.py                      # every recipe that the task can feed, three seeds
    python benchmarks/methods.py gkd opsd --seeds 5   # these beside the baselines

The same as `trl-opd bench methods`, from a checkout. `--help` explains the table and all options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trl_opd.bench.methods import main

if __name__ == "__main__":
    main(prog="python benchmarks/methods.py")
