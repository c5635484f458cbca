"""What a self-teacher keeps: its weights and no other, over checkpoints, kills and failures."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from self_runs import adapted, hinted_prompts, run, trained, weights_of
from steps import build, student
from tiny import make_model, make_tokenizer, trainer_config
from torch._subclasses.fake_tensor import FakeTensor
from transformers import TrainerCallback

import trl_opd
from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer
from trl_opd.teachers import SelfTeacher, TeacherScoreError

SYNCS = {
    "frozen": {"teacher_sync": "frozen"},
    "ema": {"teacher_sync": "ema", "teacher_sync_steps": 2, "teacher_sync_rate": 0.3},
    "every_n": {"teacher_sync": "every_n", "teacher_sync_steps": 2},
    "live": {"teacher_sync": "live"},
}


def make_trainer(output_dir, peft=False, seed=0, adapter=0, callbacks=None, dtype=torch.float32, **fields):
    """Six steps of sampled completions with Adam, a checkpoint after three."""
    model = make_model(seed=seed).to(dtype)
    torch.manual_seed(adapter)
    defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-2}
    return OnPolicyDistillTrainer(
        model=model,
        teacher_model="self",
        args=OnPolicyDistillConfig(**trainer_config(output_dir, **{**defaults, **fields})),
        train_dataset=hinted_prompts(),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False) if peft else None,
        callbacks=callbacks,
    )


class StopAfter(TrainerCallback):
    def __init__(self, step, kill=False):
        self.step, self.kill = step, kill

    def on_step_begin(self, args, state, control, **kwargs):
        if self.kill and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = not self.kill and state.global_step >= self.step


def assert_same_run(resumed, whole):
    assert resumed.state.global_step == whole.state.global_step == 6
    lines = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (resumed, whole)]
    assert lines[0] == lines[1] and max(lines[0]) > 1e-3
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("sync", SYNCS)
def test_a_resumed_run_has_the_same_teacher(tmp_path, sync, peft, dtype):
    fields = {"peft": peft, "dtype": dtype, **SYNCS[sync]}
    whole = make_trainer(tmp_path / "whole", **fields)
    whole.train()
    make_trainer(tmp_path / "stopped", callbacks=[StopAfter(3)], **fields).train()
    resumed = make_trainer(tmp_path / "stopped", adapter=7, **fields)  # a new adapter is another one
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


@pytest.mark.parametrize(("sync", "peft"), [("ema", False), ("frozen", True)])
def test_a_killed_process_resumes_with_the_same_teacher(tmp_path, sync, peft):
    path = os.pathsep.join([str(Path(trl_opd.__file__).parents[1]), *(str(Path(__file__).parents[i]) for i in (0, 1))])
    killed = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "killed"), sync, str(int(peft))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole = make_trainer(tmp_path / "whole", peft=peft, **SYNCS[sync])
    whole.train()
    resumed = make_trainer(tmp_path / "killed", peft=peft, **SYNCS[sync])
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


def test_an_adapter_that_starts_at_random_is_taken_from_the_checkpoint(tmp_path):
    make_trainer(tmp_path, peft=True, callbacks=[StopAfter(3)]).train()
    saved = load_file(tmp_path / "checkpoint-3" / "teacher.safetensors")
    torch.manual_seed(99)
    resumed = build(tmp_path, teacher="self", model=adapted().float(), max_steps=3)
    assert resumed.teacher._weights.keys() == saved.keys()
    resumed.teacher.load_state(str(tmp_path / "checkpoint-3"))
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, saved[name])


REFUSALS = {
    "frozen": ("frozen", "ema", r"must hold teacher.safetensors .*teacher_sync='ema', but does not"),
    "ema": ("ema", "frozen", r"must hold teacher_fingerprint.json .*teacher_sync='frozen', but does not"),
    "live": ("live", "every_n", r"must hold teacher.safetensors .*teacher_sync='every_n', but does not"),
}


@pytest.mark.parametrize(("first", "then", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_checkpoint_of_another_teacher_is_refused(tmp_path, first, then, message):
    make_trainer(tmp_path, callbacks=[StopAfter(3)], **SYNCS[first]).train()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **SYNCS[then]).train(resume_from_checkpoint=True)


def test_another_start_is_refused(tmp_path):
    make_trainer(tmp_path, callbacks=[StopAfter(3)]).train()
    with pytest.raises(ValueError, match=r"model must be the one that the run in .*checkpoint-3 started from"):
        make_trainer(tmp_path, seed=1).train(resume_from_checkpoint=True)


def test_another_adapter_is_refused(tmp_path):
    make_trainer(tmp_path, peft=True, callbacks=[StopAfter(3)]).train()
    other = build(tmp_path, teacher="self", model=adapted(target_modules=["q_proj"]).float())
    with pytest.raises(ValueError, match=r"must have the student's trained parameters, but they differ in \['base_"):
        other.teacher.load_state(str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("sync", SYNCS)
def test_the_saved_student_is_the_student_alone(tmp_path, sync, peft):
    trainer = make_trainer(tmp_path, peft=peft, max_steps=3, **SYNCS[sync])
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    weights = "adapter_model.safetensors" if peft else "model.safetensors"
    teacher = {"frozen": "teacher.safetensors" if peft else "teacher_fingerprint.json", "live": None}
    expected = {teacher.get(sync, "teacher.safetensors")} - {None}
    files = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert {name for name in files if name.startswith("teacher")} == expected
    assert not [path.name for path in (tmp_path / "final").iterdir() if path.name.startswith("teacher")]
    theirs = {name.replace(".default", ""): p for name, p in trained(trainer.model).items()}
    for folder in ("checkpoint-3", "final"):
        with safe_open(tmp_path / folder / weights, "pt") as file:
            assert set(file.keys()) == theirs.keys()
            for name in file.keys():  # noqa: SIM118
                assert torch.equal(file.get_tensor(name), theirs[name])


def test_the_average_of_bfloat16_weights_moves_by_less_than_they_can(tmp_path):
    """The average is that of the weights that the student had, to the rounding of the last cast."""
    rate, seen = 0.001, []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append({name: p.detach().double() for name, p in trained(model).items()})

    start = {name: p.detach().double() for name, p in trained(make_model().bfloat16()).items()}
    trainer = make_trainer(
        tmp_path,
        dtype=torch.bfloat16,
        save_strategy="no",
        teacher_sync="ema",
        teacher_sync_rate=rate,
        learning_rate=1e-2,
        max_steps=12,
        callbacks=[Keep()],
    )
    trainer.train()
    moved = 0
    for name, weight in start.items():
        average = weight.clone()
        for weights in seen:
            average = (1 - rate) * average + rate * weights[name]
        ours = weights_of(trainer)[name]
        assert ours.dtype == torch.bfloat16
        # Half a unit in the last place, and float32's own error
        torch.testing.assert_close(ours.double(), average, rtol=2**-8 * 1.01, atol=1e-8)
        moved += int((ours != start[name]).sum())
    assert moved > 100


def bytes_of_tensors():
    """Of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # isinstance would wake lazy objects; what compiling left behind has no memory
        if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), FakeTensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


COSTS = {"frozen": 1, "ema": 1, "every_n": 1, "live": 0}


@pytest.mark.parametrize("make", [student, adapted], ids=["full", "lora"])
@pytest.mark.parametrize(("sync", "copies"), COSTS.items())
def test_only_what_is_trained_exists_twice(tmp_path, make, sync, copies):
    model = make()
    trainer = build(tmp_path, teacher=SelfTeacher(sync="live"), model=model)
    teacher = SelfTeacher(sync=sync)
    before = bytes_of_tensors()
    teacher.prepare(trainer)
    size = sum(p.numel() * p.element_size() for p in trained(model).values())
    assert bytes_of_tensors() - before == copies * size


class Broken(Exception):
    pass


@pytest.mark.parametrize("make", [student, adapted], ids=["full", "lora"])
@pytest.mark.parametrize("sync", ["frozen", "ema", "live"])
def test_the_student_gets_its_weights_back_when_the_teacher_fails(tmp_path, make, sync):
    model, after = make().float(), {}
    trained_names = trained(model).keys()

    def fail(module, args, output):
        if trainer.state.global_step == 2 and not torch.is_grad_enabled() and not model.training and in_loss:
            raise Broken

    in_loss = []
    trainer = build(
        tmp_path,
        teacher="self",
        model=model,
        teacher_sync=sync,
        max_steps=4,
        learning_rate=1e-2,
        arguments={"train_dataset": hinted_prompts()},
    )
    compute_loss = trainer._compute_loss

    def note(model, inputs):
        in_loss.append(True)
        after.update({name: p.detach().clone() for name, p in trained(model).items()})
        try:
            return compute_loss(model, inputs)
        finally:
            in_loss.clear()

    trainer._compute_loss = note
    (model.get_base_model() if hasattr(model, "get_base_model") else model).model.norm.register_forward_hook(fail)
    with pytest.raises(TeacherScoreError, match=r"Broken.*A checkpoint of step 2"):
        trainer.train()
    assert trainer.model.training
    assert trained(trainer.model).keys() == trained_names
    for name, weight in trained(trainer.model).items():
        assert torch.equal(weight, after[name])
    saved = next((tmp_path / "checkpoint-2").glob("*model.safetensors"))
    for name, weight in load_file(saved).items():
        assert torch.equal(weight, next(w for n, w in after.items() if n.replace(".default", "") == name))


def test_an_answer_leaves_the_student_as_it_was(tmp_path):
    trainer, events = run(tmp_path, student(), teacher_sync="ema", max_steps=1)
    side = trainer._teacher_side
    question = side.question(events[0].inputs, trainer.distill_mask(events[0].inputs))
    for training in (True, False):
        trainer.model.train(training)
        before = {name: (p.clone(), p.data_ptr()) for name, p in trainer.model.named_parameters()}
        scores = trainer.teacher(question)
        assert trainer.model.training is training
        assert not scores.hidden_states.requires_grad and not scores.head.weight.requires_grad
        for name, p in trainer.model.named_parameters():
            assert torch.equal(p, before[name][0]) and p.data_ptr() == before[name][1] and p.requires_grad


def test_autocast_does_not_lend_the_students_weights_to_the_teacher(tmp_path):
    trainer, events = run(tmp_path, student().float(), max_steps=2)
    question = trainer._teacher_side.question(events[0].inputs, trainer.distill_mask(events[0].inputs))
    ids = events[0].inputs["prompt_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = trainer.teacher(question).hidden_states
    with torch.autocast("cpu", torch.bfloat16):
        trainer.model(input_ids=ids)
        assert torch.equal(trainer.teacher(question).hidden_states, expected)


@pytest.mark.parametrize("sync", ["frozen", "ema", "every_n"])
@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_weights_are_refused(tmp_path, monkeypatch, engine, sync):
    trainer = build(tmp_path, teacher="self", teacher_sync="live")
    monkeypatch.setattr(trainer, engine, True)
    SelfTeacher(sync="live").prepare(trainer)
    with pytest.raises(ValueError, match=f"teacher_sync must be 'live' .* under FSDP or DeepSpeed, got '{sync}'"):
        SelfTeacher(sync=sync).prepare(trainer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sync": "emma"}, "teacher_sync must be a known name, got 'emma'. Did you mean 'ema'"),
        ({"sync": "ema", "steps": 0}, "teacher_sync_steps must be a whole number of at least 1, got 0"),
        ({"sync": "ema", "rate": 0.0}, r"teacher_sync_rate must be in \(0, 1\], got 0.0"),
        ({"sync": "ema", "rate": 1.5}, r"teacher_sync_rate must be in \(0, 1\], got 1.5"),
    ],
)
def test_arguments_are_checked_without_a_config_too(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelfTeacher(**arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, sync, peft = sys.argv[1:]
    make_trainer(folder, peft=bool(int(peft)), callbacks=[StopAfter(3, kill=True)], **SYNCS[sync]).train()
