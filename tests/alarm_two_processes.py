"""
Two processes of one run whose alarm stops it.

    torchrun --nproc-per-node 2 tests/alarm_two_processes.py OUTPUT_DIR
"""

import json
import os
import sys
from pathlib import Path

import torch
from alarm_runs import Listener, empty_rollouts, make_trainer
from processes import leave


def main(output_dir):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    result = {}
    for name in ("stop", "callable"):
        listener = Listener("stop") if name == "callable" else None
        trainer = make_trainer(
            output_dir / name,
            listener,
            on_alarm="warn" if listener else "stop",
            max_steps=8,
            per_device_train_batch_size=2,
            arguments={"rollout_func": empty_rollouts},
        )
        trainer.train()
        result[name] = {
            "step": trainer.state.global_step,
            "heard": [] if listener is None else [alarm.alarm for alarm in listener.alarms],
        }
    (output_dir / f"{rank}.json").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
