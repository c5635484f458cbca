"""
Training runs that come out the same in one process and in two, and the launch of two gloo processes that runs them.

    torchrun --nproc-per-node 2 tests/two_processes.py OUTPUT_DIR

writes OUTPUT_DIR/NAME.RANK.pt for every run.
"""

import functools
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from processes import launch_two, leave
from safetensors.torch import load_file
from tiny import VOCAB_SIZE, make_model, make_tokenizer, trainer_config
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer, diagnostics
from trl_opd.collators import TeacherScores
from trl_opd.teachers import TeacherScoreError

GLOBAL_BATCH = 4
LEARNING_RATE = 0.1
# The first two rows of each batch of four go to the first process, the others to the second
PROMPTS = ["abc", "hello world", "the quick", "x", "12 34", "what is it", "zz", "quiet"]
MASKED_PROMPTS = ["abc", "hello world", "mask", "mask this", "12 34", "what is it", "masked", "mask it"]
TEACHER_PROMPTS = ["the answer is 42. abc", "h", None, "x", "12 34 56 78", None, "z", "be quiet"]
THINK = 4


def complete(prompt):
    """A completion that depends on its prompt alone, of 1 to 8 tokens; of `<think>` only if the prompt says "mask"."""
    seed = sum(map(ord, prompt))
    length = 1 + seed % 8
    if prompt.startswith("mask"):
        return [THINK] * length
    return [6 + (seed * (i + 3) + i * i) % (VOCAB_SIZE - 6) for i in range(length - 1)] + [1]


def rollouts(prompts, trainer):
    encoded = trainer.processing_class(prompts)["input_ids"]
    return {"prompt_ids": encoded, "completion_ids": [complete(p) for p in prompts], "logprobs": None}


def rollouts_of_a_tool(prompts, trainer):
    """As `rollouts`, but the `<think>` tokens count as a tool's, outside GRPO's own loss too."""
    output = rollouts(prompts, trainer)
    output["env_mask"] = [[int(token != THINK) for token in ids] for ids in output["completion_ids"]]
    return output


def rollouts_of_siblings(prompts, trainer):
    """As `rollouts`, but every completion of a prompt is another one, wherever it is made."""
    first = len(prompts) * int(os.environ.get("RANK", "0"))
    encoded = trainer.processing_class(prompts)["input_ids"]
    completions = [complete(f"{p}{i}") for i, p in enumerate(prompts, first)]
    return {"prompt_ids": encoded, "completion_ids": completions, "logprobs": None}


def sibling_view(example, completion, reward, group):
    """The prompt after the best of the other completions; none where the reward is 0."""
    best = max(group, key=lambda sibling: (sibling["reward"], sibling["completion"]))
    return None if reward == 0 else f"{best['completion']} {reward} {example['prompt']}"


def topk_teacher(batch):
    """Two entries a token that depend on the sampled token alone."""
    ids = torch.stack([batch.completion_ids, (batch.completion_ids + 1) % VOCAB_SIZE], dim=-1)
    logprobs = torch.log(torch.tensor([0.6, 0.3])).expand(ids.shape)
    return TeacherScores(topk_ids=ids, topk_logprobs=logprobs)


def num_tokens_reward(completion_ids, **kwargs):
    return [float(len(ids) % 3) for ids in completion_ids]


def make_student():
    # In float64, so that only a difference in the mathematics is seen (RMSNorm stays in float32)
    return make_model().double()


def make_teacher():
    return make_model(hidden_size=24, seed=1).double()


def lora():
    return LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


PG = {"credit": "policy_gradient", "support": "sampled"}
MASKED = {"prompts": MASKED_PROMPTS, "special_token_masking": ["<think>"]}
TOOL = {"prompts": MASKED_PROMPTS, "rollout_func": rollouts_of_a_tool}

TOO_LONG = {
    "teacher_prompts": [*TEACHER_PROMPTS[:6], "a" * 40, "b" * 50],
    "teacher_max_length": 40,
    "teacher_overflow": "skip",
}

REWARDED = {"reward_funcs": num_tokens_reward, "rollout_func": rollouts_of_siblings, "num_generations": 2}


def no_weight(stats):
    """Token weights of 0."""
    return torch.zeros_like(stats.student_entropy)


# Runs that must be equal in one process and two
RUNS = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "policy gradient, dapo": PG,
    "policy gradient, grpo, discount": {**PG, "loss_type": "grpo", "discount": 0.9},
    "policy gradient, two iterations": {**PG, "num_iterations": 2, "max_steps": 4},
    "lora": {"peft_config": lora},
    "lora, policy gradient": {"peft_config": lora, **PG},
    "lora, base teacher": {"peft_config": lora, "teacher": "base"},
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 2},
    "accumulation, grpo": {"gradient_accumulation_steps": 2, "max_steps": 2, "loss_type": "grpo"},
    "two steps per generation": {"steps_per_generation": 2, "max_steps": 4, "prompts": PROMPTS[:4] * 2},
    "top-k teacher": {"teacher": topk_teacher},
    "rewards": {"reward_funcs": num_tokens_reward, "num_generations": 2, "reward_coef": 0.5, "distill_coef": 0.7},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2},
    "masked rank, dapo": MASKED,
    "masked rank, grpo": {**MASKED, "loss_type": "grpo"},
    "masked rank, policy gradient": {**MASKED, **PG},
    "masked rank, top-k teacher": {**MASKED, "teacher": topk_teacher},
    "tool rank, dapo": TOOL,
    "tool rank, grpo": {**TOOL, "loss_type": "grpo"},
    "tool rank, policy gradient": {**TOOL, **PG},
    "teacher prompts": {"teacher_prompts": TEACHER_PROMPTS},
    "teacher prompts, policy gradient": {"teacher_prompts": TEACHER_PROMPTS, **PG},
    "rank that is too long for the teacher": TOO_LONG,
    "rank that is too long for the teacher, policy gradient": {**TOO_LONG, **PG},
    "view of siblings on both processes": {
        "teacher_view": sibling_view,
        "rollout_func": rollouts_of_siblings,
        "reward_funcs": num_tokens_reward,
        "num_generations": 4,
    },
    "all masked": {"special_token_masking": ["<think>"], "prompts": ["mask", "mask it"] * 4},
    "local weights": {"token_weighting": "idft"},
    "weights of positions": {"token_weighting": "position", **PG},
    "target": {"target": "veto", "divergence": "forward_kl"},
    "both credits": {"credit": "combined", "divergence": "forward_kl", "discount": 0.9, "return_from_next": True},
    "whitened": {**PG, "advantage_whitening": "distill"},
    "whitened with rewards": {**PG, **REWARDED, "advantage_whitening": "mixed", "scale_rewards": "none"},
    "gate": {
        **REWARDED,
        "reward_coef": 0.0,
        "reward_mix": "gate",
        "reward_mix_kwargs": {"on": "group_success", "threshold": 1.0},
        "max_steps": 4,
    },
    "pass rates": {**REWARDED, "reward_coef": 0.0, "sample_weighting": "beta_kernel", "max_steps": 4},
    "no weights at all": {"token_weighting": "two_processes.no_weight", "weight_decay": 0.5},
    "schedule": {"schedules": {"distill_coef": {"type": "linear", "start": 1.0, "end": 0.2}}},
}


def make_trainer(
    output_dir,
    world=1,
    *,
    teacher=None,
    prompts=PROMPTS,
    peft_config=None,
    rollout_func=rollouts,
    reward_funcs=None,
    callbacks=None,
    dtype=torch.float64,
    teacher_prompts=None,
    teacher_names=None,
    teacher_view=None,
    **fields,
):
    """A trainer that sees the same global batches in any number of processes."""
    defaults = {
        "per_device_train_batch_size": GLOBAL_BATCH // world,
        "per_device_eval_batch_size": GLOBAL_BATCH // world,
        "max_steps": 2,
        "shuffle_dataset": False,
        # The update is linear in the gradient, so equal weights are equal gradients
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "ddp_timeout": 30,
    }
    columns = {"teacher_prompt": teacher_prompts, "teacher": teacher_names}
    columns = {name: column for name, column in columns.items() if column is not None}
    trainer = OnPolicyDistillTrainer(
        model=make_student().to(dtype),
        teacher_model=teacher or make_teacher().to(dtype),
        reward_funcs=reward_funcs,
        args=OnPolicyDistillConfig(**trainer_config(output_dir, **{**defaults, **fields})),
        train_dataset=Dataset.from_dict({"prompt": prompts, **columns}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS, **columns}),
        processing_class=make_tokenizer(),
        peft_config=peft_config and peft_config(),
        rollout_func=rollout_func,
        callbacks=callbacks,
        teacher_view=teacher_view,
    )
    assert trainer.accelerator.num_processes == world
    return trainer


def train(output_dir, world=1, resume=None, **fields):
    """Logs and weights after training."""
    trainer = make_trainer(output_dir, world, **fields)
    trainer.train(resume_from_checkpoint=resume)
    return {"logs": trainer.state.log_history, "weights": trainable_weights(trainer.model)}


def trainable_weights(model):
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: w.full_tensor() if isinstance(w, DTensor) else w.clone() for name, w in weights.items()}


@functools.cache
def one_process(name):
    """Result of a run of `RUNS` in this process."""
    with tempfile.TemporaryDirectory() as output_dir:
        return train(output_dir, **RUNS[name])


@functools.cache
def two_processes():
    """Launch two gloo processes for all runs. `{name: [result of each rank]}`; a run that did not end has none."""
    with tempfile.TemporaryDirectory() as output_dir:
        command, environment = launch_two(__file__, output_dir)
        with open(Path(output_dir) / "output.txt", "w+") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                process.wait(timeout=150)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its workers
                process.wait(timeout=60)
            output.seek(0)
            text = output.read()
        files = {path: torch.load(path, weights_only=False) for path in sorted(Path(output_dir).glob("*.pt"))}
    results: dict[str, list] = {"output": [text]}
    for path, result in files.items():
        results.setdefault(path.name.split(".")[0], []).append(result)
    return results


def result_of(name):
    """Results of a run on both processes."""
    results = two_processes()
    assert len(results.get(name, [])) == 2, f"{name!r} did not end on both processes:\n{results['output'][0][-3000:]}"
    for result in results[name]:
        assert "error" not in result, result["error"]
    return results[name]


# Failures of the teacher on the second process alone, in the second step


class FailingTeacher:
    """A top-k teacher whose second answer on the second process is bad."""

    name = "failing"

    def __init__(self, kind):
        self.kind = kind
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        scores = topk_teacher(batch)
        if os.environ["RANK"] == "1" and self.calls == 2:
            if self.kind == "raises":
                raise ConnectionError("the server is gone")
            if self.kind == "shape":
                scores.topk_logprobs = scores.topk_logprobs[:, :-1]
            if self.kind == "nan":
                scores.topk_logprobs = scores.topk_logprobs.clone()
                scores.topk_logprobs[1, 0] = torch.nan
        return scores


class FailingView:
    """A `teacher_view` that fails once on the second process alone, in the second step."""

    def __init__(self):
        self.calls = 0

    def __call__(self, example, completion, reward, group):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 3:
            raise KeyError("answers")
        return example["prompt"]


class BreakTeacher(TrainerCallback):
    """After the first step, weights of the second process's local teacher (or of its shard) become NaN."""

    def __init__(self, teacher):
        self.teacher = teacher

    def on_step_end(self, args, state, control, **kwargs):
        if os.environ["RANK"] == "1" and state.global_step == 1:
            weight = self.teacher.model.norm.weight
            (weight.to_local() if isinstance(weight, DTensor) else weight).data.fill_(torch.nan)


class RememberWeights(TrainerCallback):
    """The trained weights after each step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after[state.global_step] = trainable_weights(model)


FAILURES = {
    "nan": {"teacher": lambda: FailingTeacher("nan")},
    "shape": {"teacher": lambda: FailingTeacher("shape")},
    "raises": {"teacher": lambda: FailingTeacher("raises")},
    "view": {
        "teacher": lambda: {name: FailingTeacher("not") for name in ("a", "b")},
        "teacher_names": ["a", "b"] * 4,
        "teacher_view": FailingView(),
    },
    "local": {"teacher": make_teacher},
    "local, policy gradient": {"teacher": make_teacher, **PG},
}


def fail_and_resume(output_dir, world, teacher, **fields):
    """What a failure in the second step leaves, and the run that goes on from there with a healthy teacher."""
    failing, memory = teacher(), RememberWeights()
    scripted = isinstance(failing, (FailingTeacher, dict))
    callbacks = [memory] if scripted else [memory, BreakTeacher(failing)]
    trainer = make_trainer(output_dir, world, teacher=failing, callbacks=callbacks, **fields)
    try:
        trainer.train()
        message = ""
    except TeacherScoreError as error:
        message = str(error)
    result = {
        "message": message,
        "checkpoints": sorted(path.name for path in Path(output_dir).glob("checkpoint-*")),
        "saved": load_file(Path(output_dir) / "checkpoint-1" / "model.safetensors"),
        "before": memory.after[1],
    }
    healthy = topk_teacher if scripted else make_teacher()
    return result | train(output_dir, world, resume=True, teacher=healthy, **fields)


def resume(output_dir, world):
    """Sampled completions: four steps, and two and two."""
    fields = {"rollout_func": None, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train(output_dir / "whole", world, **fields)
    resumed = train(output_dir / "whole", world, resume=str(output_dir / "whole" / "checkpoint-2"), **fields)
    return {"whole": whole, "resumed": resumed}


def fail_to_read(output_dir, world):
    """The text of the completions cannot be read on the second process."""

    def read(*args):
        raise UnicodeError("what is this")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if os.environ["RANK"] == "1":
            patch.setattr(diagnostics, "add_completions", read)
        result = train(output_dir, world)
    return result | {"warnings": [str(w.message) for w in caught if "what is this" in str(w.message)]}


def main(output_dir):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    jobs = {name: functools.partial(train, **fields) for name, fields in RUNS.items()}
    jobs |= {"resume": resume, "unreadable": fail_to_read}
    jobs |= {f"failure, {name}": functools.partial(fail_and_resume, **fields) for name, fields in FAILURES.items()}
    for name, job in jobs.items():
        try:
            result = job(output_dir / name.replace(" ", "_"), world=2)
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, output_dir / f"{name}.{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
