"""
Training runs with completions that the student does not sample, and those of them that two processes make.

    torchrun --nproc-per-node 2 tests/rollout_runs.py OUTPUT_DIR

writes OUTPUT_DIR/RANK.pt.
"""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from processes import leave
from steps import record
from tiny import make_model, make_prompts, make_tokenizer, trainer_config

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
X = TOKENIZER.convert_tokens_to_ids("x")
PROMPTS = ["abc", "hello world", "x", "the quick brown fox", "12 34", "what is it"]
# Without the letters a to g, which end a completion of `student()`
COMPLETIONS = dict(zip(PROMPTS, ["hij", "hi", "y", "jumps ontop", "56 78", "it"], strict=True))


def ids_of(text):
    return TOKENIZER(text)["input_ids"]


def written(text, limit=8):
    return [*ids_of(text), EOS][:limit]


def make_rows(num=24, several=False):
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(num)]
    values = [[COMPLETIONS[p] + "z" * i for i in range(3)] if several else COMPLETIONS[p] for p in prompts]
    return Dataset.from_dict({"prompt": prompts, "completion": values, "number": list(range(num))})


def student(ends=range(1, 13)):
    model = make_model().double()
    model.generation_config.eos_token_id = list(ends)
    return model


def teacher():
    return make_model(hidden_size=24, seed=1).double()


def build(tmp_path, rows=None, teacher_model=None, callbacks=None, model=None, rewards=None, peft=None, **fields):
    fields = {"max_grad_norm": 0.0, "learning_rate": 1e-3, **fields}
    return OnPolicyDistillTrainer(
        model=student() if model is None else model,
        teacher_model=teacher() if teacher_model is None else teacher_model,
        args=OnPolicyDistillConfig(**trainer_config(tmp_path, **fields)),
        train_dataset=make_rows() if rows is None else rows,
        eval_dataset=make_prompts(4),
        processing_class=make_tokenizer(),
        reward_funcs=rewards,
        callbacks=callbacks,
        peft_config=peft,
    )


def train(tmp_path, **kwargs):
    step = record(build(tmp_path, **kwargs))
    step.trainer.train()
    return step


def pairs(inputs):
    """Prompts and completions of a micro-batch without padding."""
    return [
        tuple(
            tuple(inputs[f"{name}_ids"][i][inputs[f"{name}_mask"][i].bool()].tolist())
            for name in ("prompt", "completion")
        )
        for i in range(len(inputs["prompt_ids"]))
    ]


def completion_of(prompt_ids):
    """The dataset's for a prompt."""
    return next(c for p, c in COMPLETIONS.items() if tuple(ids_of(p)) == tuple(prompt_ids))


EXPECTED = {(tuple(ids_of(p)), tuple(written(c))) for p, c in COMPLETIONS.items()}


TIMES = ("runtime", "per_second", "step_time", "total_flos", "train_loss", "teacher_wait")


def without_times(history):
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in history]


class Judge:
    """Rewards completions by their first token, and counts its calls."""

    __name__ = "judge"

    def __init__(self, accepts):
        self.accepts, self.calls = accepts, 0

    def __call__(self, completion_ids, log_metric, log_extra, **kwargs):
        self.calls += 1
        log_metric("judged", float(self.calls))
        log_extra("call", [self.calls] * len(completion_ids))
        return [float(ids[0] in self.accepts) for ids in completion_ids]


def in_order(trainer, **kwargs):
    """Train, and return the generation batches as they are made, before they are shuffled."""
    outputs = []
    make = trainer._generate_and_score_completions

    def keep(inputs):
        outputs.append(make(inputs))
        return outputs[-1]

    trainer._generate_and_score_completions = keep
    trainer.train(**kwargs)
    return outputs


def summary(outputs):
    return [
        {"pairs": pairs(x), "on_policy": x["on_policy"].tolist(), "sampled_step": x["sampled_step"].tolist()}
        for x in outputs
    ]


def mixed_run(output_dir, **kwargs):
    """A group of four over two processes; student, buffer and dataset in turn."""
    fields = {"student_fraction": 0.4, "replay_fraction": 0.3, "replay_size": 4, "num_generations": 4}
    several = Dataset.from_dict(
        {"prompt": PROMPTS, "completion": [[c + x for x in "hijk"] for c in COMPLETIONS.values()]}
    )
    trainer = build(
        output_dir,
        rows=several,
        per_device_train_batch_size=2,
        max_steps=10,
        save_strategy="steps",
        save_steps=5,
        **fields,
    )
    return summary(in_order(trainer, **kwargs)), without_times(trainer.state.log_history)


def failing_run(output_dir):
    judge = Judge({ids_of(text)[0] for text in COMPLETIONS.values()})
    fields = {"injected_completions": 1, "injected_when": "group_failure", "num_generations": 4}
    trainer = build(output_dir, rewards=judge, per_device_train_batch_size=2, max_steps=6, **fields)
    return summary(in_order(trainer)), judge.calls


def stopped_run(output_dir, rank):
    """The second process's teacher cannot write."""

    def generate(prompt_ids, sampling):
        if rank == 1:
            raise RuntimeError("out of ink")
        return [[5]] * len(prompt_ids)

    trainer = build(output_dir, student_fraction=0.0, off_policy_source="teacher")
    trainer.teacher.generate = generate
    try:
        trainer.train()
    except Exception as error:
        return str(error)


def main(output_dir):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    whole = mixed_run(output_dir / "mixed")
    resumed = mixed_run(output_dir / "mixed", resume_from_checkpoint=str(output_dir / "mixed" / "checkpoint-5"))
    result = {"whole": whole, "resumed": resumed, "failing": failing_run(output_dir / "failing")}
    result["stopped"] = stopped_run(output_dir / "stopped", rank)
    torch.save(result, output_dir / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
