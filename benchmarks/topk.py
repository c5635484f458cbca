# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a top-k teacher costs in accuracy: the student's gradient from K entries beside that from the whole vocabulary.

    python benchmarks/topk.py                                                   # a pair that is trained first
    python benchmarks/topk.py --student PATH --teacher PATH --prompts FILE      # your models

The same as `trl-opd bench topk`, from a checkout. `--help` explains the columns and all options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trl_opd.bench.topk import main

if __name__ == "__main__":
    main(prog="python benchmarks/topk.py")
