# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The divergence head alone, forward and backward: ours beside TRL's, Liger's, full logits and the bare GEMMs.

    python benchmarks/divergence_head.py                                 # 1024 tokens x 32k, hidden 256 and 512
    python benchmarks/divergence_head.py --student-hidden 1024 --teacher-hidden 2048 --tokens 512 --vocab 151936
    python benchmarks/divergence_head.py --grid --device cuda --dtype bfloat16 --time-budget 540 --json head.json

The same as `trl-opd bench head`, from a checkout. `--help` explains the columns and all options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trl_opd.bench.head import main

if __name__ == "__main__":
    main(prog="python benchmarks/divergence_head.py")
