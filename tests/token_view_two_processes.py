"""torchrun --nproc-per-node 2 tests/token_view_two_processes.py OUTPUT_DIR: two steps with the completions log."""

import sys

import conftest  # noqa: F401
from processes import leave
from steps import build
from tiny import make_model

if __name__ == "__main__":
    trainer = build(
        sys.argv[1],
        teacher=make_model(hidden_size=24, seed=1).double(),
        learning_rate=0.0,
        optim="sgd",
        max_steps=2,
        num_generations=2,
        log_completions=True,
    )
    trainer.train()
    leave()
