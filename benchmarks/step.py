# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
A whole training step, and where its seconds go: OnPolicyDistillTrainer beside TRL's DistillationTrainer.

    python benchmarks/step.py                    # one thread, Qwen3 shapes, hidden 128 and 256, 32k vocabulary
    python benchmarks/step.py --device cuda --student-hidden 1024 --teacher-hidden 2048 --layers 28 --vocab 151936

The same as `trl-opd bench step`, from a checkout. `--help` explains the columns and all options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trl_opd.bench.step import main

if __name__ == "__main__":
    main(prog="python benchmarks/step.py")
