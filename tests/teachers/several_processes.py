"""
Runs of routed teachers and self-teachers that come out the same in one process, in two, and in two with shards.

    torchrun --nproc-per-node 2 tests/teachers/several_processes.py OUTPUT_DIR [sharded]

writes OUTPUT_DIR/NAME.RANK.pt for every run.
"""

import functools
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from processes import leave
from routed_runs import Recorder, topk_teacher, wide, wider
from test_sharding import FSDP, take_the_cpu_for_an_accelerator
from tiny import make_tokenizer, trainer_config
from two_processes import GLOBAL_BATCH, PG, PROMPTS, make_student, rollouts, trainable_weights

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer

# The first two of each four go to the first process: in the first batch it has no sample of "b", then both have both
TEACHERS = ["a", "a", "b", "b", "b", "a", "a", "b"]


def hinted():
    return {"prompt": PROMPTS, "teacher_prompt": [f"be brief {prompt}" for prompt in PROMPTS]}


def routed():
    return {"prompt": PROMPTS, "teacher": TEACHERS}


def lora():
    return LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


SELF = {"teacher": lambda: "self", "columns": hinted}
RUNS = {
    "two models": {"teacher": lambda: {"a": wide(), "b": wider()}},
    "model and top-k": {"teacher": lambda: {"a": wide(), "b": topk_teacher}},
    "top-k and model": {"teacher": lambda: {"a": Recorder(), "b": wide()}},
    "two models, policy gradient": {"teacher": lambda: {"a": wide(), "b": wider()}, **PG},
    "model and top-k, policy gradient": {"teacher": lambda: {"a": wide(), "b": topk_teacher}, **PG},
    "two models, two steps per generation": {
        "teacher": lambda: {"a": wide(), "b": topk_teacher},
        "steps_per_generation": 2,
        "columns": lambda: {k: v[:4] * 2 for k, v in routed().items()},
    },
    "ema": {**SELF, "teacher_sync": "ema", "teacher_sync_rate": 0.3},
    "ema, lora": {**SELF, "teacher_sync": "ema", "teacher_sync_rate": 0.3, "peft_config": lora, "learning_rate": 0.01},
    "every_n": {**SELF, "teacher_sync": "every_n", "teacher_sync_steps": 2},
    "live": {**SELF, "teacher_sync": "live"},
    "live, policy gradient": {**SELF, "teacher_sync": "live", **PG},
    "self and model": {"teacher": lambda: {"a": "self", "b": wide()}, "teacher_sync": "ema"},
}
SHARDED = (
    "two models",
    "model and top-k",
    "two models, policy gradient",
    "model and top-k, policy gradient",
    "live",
    "live, policy gradient",
)


def make_trainer(output_dir, world=1, *, teacher, columns=routed, peft_config=None, **fields):
    defaults = {
        "per_device_train_batch_size": GLOBAL_BATCH // world,
        "max_steps": 4,
        "shuffle_dataset": False,
        # The update is linear in the gradient, so equal weights are equal gradients
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "ddp_timeout": 30,
    }
    return OnPolicyDistillTrainer(
        model=make_student(),
        teacher_model=teacher(),
        args=OnPolicyDistillConfig(**trainer_config(output_dir, **{**defaults, **fields})),
        train_dataset=Dataset.from_dict(columns()),
        processing_class=make_tokenizer(),
        peft_config=peft_config and peft_config(),
        rollout_func=rollouts,
    )


def train(output_dir, world=1, **fields):
    trainer = make_trainer(output_dir, world, **fields)
    trainer.train()
    return {"logs": trainer.state.log_history, "weights": trainable_weights(trainer.model)}


@functools.cache
def one_process(name):
    with tempfile.TemporaryDirectory() as output_dir:
        return train(output_dir, **RUNS[name])


def an_unknown_name(output_dir, world):
    """In the second step a sample of the second process names nobody."""
    trainer = make_trainer(output_dir, world, **RUNS["two models"])
    route, calls = trainer.teacher.route, []

    def misroute(examples):
        calls.append(examples)
        wrong = os.environ["RANK"] == "1" and len(calls) == 2
        return route([{**example, "teacher": "ab"} for example in examples] if wrong else examples)

    trainer.teacher.route = misroute
    try:
        trainer.train()
    except Exception as error:
        return {"message": str(error), "step": trainer.state.global_step}


def main(output_dir, sharded):
    torch.set_num_threads(1)
    if sharded:
        take_the_cpu_for_an_accelerator()
    rank = int(os.environ["RANK"])
    jobs = {name: functools.partial(train, **RUNS[name]) for name in (SHARDED if sharded else RUNS)}
    if sharded:
        jobs = {name: functools.partial(job, **FSDP) for name, job in jobs.items()}
    else:
        jobs["unknown name"] = an_unknown_name
    for name, job in jobs.items():
        try:
            result = job(output_dir / name.replace(" ", "_"), world=2)
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, output_dir / f"{name}.{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sharded=os.environ.get("SHARDED") == "1")
