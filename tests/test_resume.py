"""A run resumed from a checkpoint goes on as if it had never stopped, and its checkpoints hold the student alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from tiny import make_model, make_prompts, make_tokenizer, trainer_config
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

import trl_opd
from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer
from trl_opd.prompt_order import EpochSampler

TIMES = ("runtime", "per_second", "step_time", "total_flos", "train_loss")
PG = {"credit": "policy_gradient", "support": "sampled"}


def make_trainer(output_dir, teacher=None, peft=False, callbacks=None, num_prompts=16, **fields):
    """Four steps of sampled completions, with dropout, Adam and a decaying learning rate."""
    return OnPolicyDistillTrainer(
        model=make_model(attention_dropout=0.1),
        teacher_model=teacher or make_model(hidden_size=24, seed=1),
        args=OnPolicyDistillConfig(
            **trainer_config(output_dir, **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **fields})
        ),
        train_dataset=make_prompts(num_prompts),
        eval_dataset=make_prompts(4),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear") if peft else None,
        callbacks=callbacks,
    )


def without_times(history):
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in history]


def assert_same_run(trainer, expected):
    assert trainer.state.global_step == expected.state.global_step == 4
    assert without_times(trainer.state.log_history) == without_times(expected.state.log_history)
    theirs = expected.model.state_dict()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class KillAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


CASES = {
    "full": {},
    "lora": {"peft": True},
    "lora, base teacher": {"peft": True, "teacher": "base"},
    "policy gradient": PG,
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "two iterations": {**PG, "num_iterations": 2},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, fields):
    whole = make_trainer(tmp_path / "whole", **fields)
    whole.train()
    assert whole.state.log_history[0]["grad_norm"] > 0

    stopped = make_trainer(tmp_path / "stopped", callbacks=[StopAfter(2)], **fields)
    stopped.train()
    assert stopped.state.global_step == 2

    torch.manual_seed(99)  # the state of the generators must come from the checkpoint
    resumed = make_trainer(tmp_path / "stopped", **fields)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("step", [2, 3], ids=["at its beginning", "inside it"])
def test_a_run_resumed_in_its_second_epoch_sees_the_prompts_that_it_would_have_seen(tmp_path, step):
    fields = {"num_prompts": 8, "save_steps": step}  # two steps an epoch
    whole = make_trainer(tmp_path / "whole", **fields)
    whole.train()
    make_trainer(tmp_path / "stopped", callbacks=[StopAfter(step)], **fields).train()
    resumed = make_trainer(tmp_path / "stopped", **fields)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


def test_the_order_of_the_prompts_is_that_of_trl():
    arguments = {"data_source": range(10), "mini_repeat_count": 2, "batch_size": 2, "seed": 3}
    theirs, ours = RepeatSampler(**arguments), EpochSampler(**arguments)
    for epoch in range(3):
        order = list(theirs)
        ours.set_epoch(epoch)
        assert list(ours) == order


def test_a_killed_process_resumes_from_its_checkpoint(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(trl_opd.__file__).parents[1])}
    killed = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "killed")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-2"]

    whole = make_trainer(tmp_path / "whole")
    whole.train()
    resumed = make_trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


def tensors_of(checkpoint):
    shapes = {}
    for path in checkpoint.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_checkpoint_holds_the_student_alone(tmp_path, peft):
    trainer = make_trainer(tmp_path, peft=peft, max_steps=2)
    trainer.train()
    trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    checkpoint = tmp_path / "checkpoint-2"
    saved = tensors_of(checkpoint)
    assert saved == {name.replace(".default", ""): tuple(p.shape) for name, p in trained}
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(trained)
    # What a second model of the teacher's size would add cannot hide in any other file
    weights = sum(p.numel() * p.element_size() for _, p in trained)
    assert sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors")) < weights + 20_000
    assert sum(path.stat().st_size for path in checkpoint.rglob("optimizer.pt")) < 2 * weights + 40_000


def test_the_teacher_does_not_move(tmp_path):
    teacher = make_model(hidden_size=24, seed=1)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    make_trainer(tmp_path, teacher=teacher).train()
    for name, weight in teacher.state_dict().items():
        assert torch.equal(weight, before[name])
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_trainer(sys.argv[1], callbacks=[KillAfter(2)]).train()
