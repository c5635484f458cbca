# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What it costs to make a teacher fit: quantized, offloaded, in smaller batches, on another device.

    python benchmarks/teacher.py                        # one thread, a random Qwen3, hidden 512, 32k vocabulary
    python benchmarks/teacher.py --model Qwen/Qwen3-8B --device cuda --weights bfloat16 --micro-batch 8 --generation 64

The same as `trl-opd bench teacher`, from a checkout. `--help` explains the columns and all options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trl_opd.bench.teacher import main

if __name__ == "__main__":
    main(prog="python benchmarks/teacher.py")
