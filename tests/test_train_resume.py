"""The same command line goes on where a run stopped, refuses another's checkpoints, and is done when it is done."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer, trainer_config

import trl_opd
from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer
from trl_opd.cli import main
from trl_opd.resume import (
    CONFIG_FILE,
    decide_start,
    describe_config,
    differing,
    last_checkpoint,
    move_aside,
    save_from_checkpoint,
    why_not_whole,
    write_config,
)


def write_checkpoint(folder, step, max_steps=6, epochs=1, weights="model.safetensors", **state):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if weights:
        save_file({"a": torch.full((10,), float(step))}, path / weights)
    known = {"global_step": step, "max_steps": max_steps, "num_train_epochs": epochs, **state}
    (path / "trainer_state.json").write_text(json.dumps(known))
    return path


def arguments(folder, **fields):
    defaults = {
        "max_steps": 6,
        "num_train_epochs": 1.0,
        "resume_from_checkpoint": None,
        "load_best_model_at_end": False,
    }
    return SimpleNamespace(output_dir=str(folder), **{**defaults, **fields})


CONFIG = {"learning_rate": 1e-4, "divergence": "reverse_kl", "max_steps": 6, "num_processes": 1}


def start_of(folder, resume="auto", config=CONFIG, **fields):
    return decide_start(arguments(folder, **fields), config, resume)


# Which checkpoint


def test_an_empty_folder_starts_at_the_beginning(tmp_path):
    assert start_of(tmp_path / "nothing").checkpoint is None
    (tmp_path / "notes").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert start_of(tmp_path).checkpoint is None


def test_the_latest_by_number(tmp_path):
    for step in (2, 10, 9):
        write_checkpoint(tmp_path, step, max_steps=20)
    write_config(str(tmp_path), CONFIG)
    start = start_of(tmp_path, max_steps=20)
    assert start.checkpoint == str(tmp_path / "checkpoint-10") and start.step == 10 and not start.finished


def break_state(path):
    (path / "trainer_state.json").unlink()


def cut_state(path):
    file = path / "trainer_state.json"
    file.write_text(file.read_text()[:-5])


def cut_weights(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def cut_head(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def no_weights(path):
    (path / "model.safetensors").unlink()


def missing_shard(path):
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_state, "no trainer_state.json"),
        (cut_state, "trainer_state.json cannot be read"),
        (cut_weights, "model.safetensors is cut off"),
        (cut_head, "model.safetensors is cut off"),
        (no_weights, "no weights"),
        (missing_shard, "model-1.safetensors is missing"),
    ],
)
def test_half_a_checkpoint_is_left_out_with_the_reason(tmp_path, damage, reason):
    good = write_checkpoint(tmp_path, 2)
    damage(write_checkpoint(tmp_path, 4))
    write_config(str(tmp_path), CONFIG)
    start = start_of(tmp_path)
    assert start.checkpoint == str(good) and start.step == 2
    assert "checkpoint-4 is left out" in start.messages[0] and reason in start.messages[0]


@pytest.mark.parametrize("weights", ["model.safetensors", "adapter_model.safetensors"])
def test_whole_checkpoints_are_whole(tmp_path, weights):
    assert why_not_whole(write_checkpoint(tmp_path, 1, weights=weights)) is None
    sharded = write_checkpoint(tmp_path, 2, weights="model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert why_not_whole(sharded) is None
    named = write_checkpoint(tmp_path, 3, weights=None)
    (named / "tuned").mkdir()
    save_file({"a": torch.ones(1)}, named / "tuned" / "adapter_model.safetensors")
    assert why_not_whole(named) is None


# Of which configuration


@pytest.mark.parametrize(
    "field", ["max_steps", "num_train_epochs", "output_dir", "report_to", "logging_steps", "save_steps", "run_name"]
)
def test_what_may_change(field):
    assert differing({field: 1}, {field: 2}) == {}


@pytest.mark.parametrize(
    "field", ["learning_rate", "teacher_model", "dataset_name", "seed", "lora_r", "num_processes", "num_iterations"]
)
def test_what_makes_another_run(field):
    assert differing({field: 1}, {field: 2}) == {field: (1, 2)}
    assert differing({}, {field: 2}) == {}


def test_no_secret_is_written_and_a_new_one_is_no_other_run(tmp_path):
    def described(secret):
        fields = {"hub_token": secret, "teacher_model_init_kwargs": {"api_key": secret, "timeout": 3}}
        return describe_config(OnPolicyDistillConfig(**trainer_config(tmp_path, **fields)))

    write_config(str(tmp_path), described("hf_verysecret"))
    text = (tmp_path / CONFIG_FILE).read_text()
    assert "verysecret" not in text and '"timeout": 3' in text
    assert differing(json.loads(text), described("another")) == {}


def test_a_configuration_equals_itself_when_it_is_parsed_again(tmp_path):
    one, two = (describe_config(OnPolicyDistillConfig(**trainer_config(tmp_path, optim="sgd"))) for _ in range(2))
    write_config(str(tmp_path), one)
    before = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert differing(before, two) == {} and before["optim"] == "sgd" and before["num_processes"] == 1
    assert set(two) - {"num_processes"} == {f.name for f in dataclasses.fields(OnPolicyDistillConfig)}


def test_another_configuration_is_refused_by_name(tmp_path):
    write_checkpoint(tmp_path, 2)
    write_config(str(tmp_path), CONFIG)
    other = {**CONFIG, "learning_rate": 1e-5, "divergence": "forward_kl", "max_steps": 9}
    with pytest.raises(ValueError) as error:
        start_of(tmp_path, config=other)
    text = str(error.value)
    assert "divergence was 'reverse_kl', now 'forward_kl'; learning_rate was 0.0001, now 1e-05" in text
    assert "max_steps" not in text
    assert "another output_dir" in text and "--resume never" in text and "--resume always" in text
    assert start_of(tmp_path, "always", other).step == 2


def test_a_run_from_python_is_known_by_its_record(tmp_path):
    write_checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match="is not known"):
        start_of(tmp_path)
    (tmp_path / "_opd").mkdir()
    (tmp_path / "_opd" / "run.json").write_text(json.dumps({"config": {"learning_rate": 1e-4}}))
    assert start_of(tmp_path).step == 2
    (tmp_path / "_opd" / "run.json").write_text(json.dumps({"config": {"learning_rate": 1.0}}))
    with pytest.raises(ValueError, match="learning_rate was 1"):
        start_of(tmp_path)


# Whether there is anything to do


@pytest.mark.parametrize(
    ("fields", "finished"),
    [
        ({"max_steps": 6}, True),
        ({"max_steps": 5}, True),
        ({"max_steps": 7}, False),
        ({"max_steps": -1, "num_train_epochs": 1}, True),
        ({"max_steps": -1, "num_train_epochs": 2}, False),
    ],
)
def test_a_finished_run(tmp_path, fields, finished):
    write_checkpoint(tmp_path, 6)
    write_config(str(tmp_path), CONFIG)
    start = start_of(tmp_path, **fields)
    assert start.finished is finished and start.unsaved is finished
    assert any("Already finished" in message for message in start.messages) is finished
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert not start_of(tmp_path, **fields).unsaved


def test_the_model_of_a_finished_run_is_saved(tmp_path):
    path = write_checkpoint(tmp_path, 6)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "config.json", "tokenizer.json"):
        (path / name).write_text("x")
    save_from_checkpoint(arguments(tmp_path), str(path))
    names = {p.name for p in tmp_path.iterdir() if p.is_file()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json"}


def test_the_best_model_is_saved_where_it_was_asked_for(tmp_path):
    best = write_checkpoint(tmp_path, 2)
    last = write_checkpoint(tmp_path, 6, best_model_checkpoint=str(best))
    save_from_checkpoint(arguments(tmp_path, load_best_model_at_end=True), str(last))
    assert load_file(tmp_path / "model.safetensors")["a"][0] == 2


# What is asked for


def test_never_moves_what_is_there(tmp_path):
    write_checkpoint(tmp_path, 2)
    (tmp_path / "_opd").mkdir()
    (tmp_path / "mine.txt").write_text("x")
    write_config(str(tmp_path), CONFIG)
    for number in (1, 2):
        start = start_of(tmp_path, "never", {"learning_rate": 7})
        assert start.checkpoint is None and f"_earlier.{number}" in start.messages[0]
        move_aside(start)
        earlier = tmp_path / f"_earlier.{number}"
        assert (earlier / "checkpoint-2" / "model.safetensors").is_file()
        assert not (tmp_path / "checkpoint-2").exists() and (tmp_path / "mine.txt").exists()
        assert last_checkpoint(tmp_path) == (None, [])
        write_checkpoint(tmp_path, 2)
    assert (tmp_path / "_earlier.1" / CONFIG_FILE).is_file() and (tmp_path / "_earlier.1" / "_opd").is_dir()
    assert start_of(tmp_path / "new", "never").moves == {}


def test_a_checkpoint_that_is_named_wins(tmp_path):
    first = write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 4)
    other = {"learning_rate": 7}
    for resume in ("auto", "never", "always"):
        start = start_of(tmp_path, resume, other, resume_from_checkpoint=str(first))
        assert (start.checkpoint, start.step) == (str(first), 2)
    for word in (True, "true", "True", "last"):
        assert start_of(tmp_path, config=other, resume_from_checkpoint=word).step == 4
    assert start_of(tmp_path, config=other, resume_from_checkpoint="false").checkpoint is None
    with pytest.raises(ValueError, match=r"Did you mean 'checkpoint-2'|Did you mean 'checkpoint-4'"):
        start_of(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match="has none that is whole"):
        start_of(tmp_path / "empty", resume_from_checkpoint="true")


# Whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for name, size in (("student", 16), ("teacher", 24)):
        make_model(hidden_size=size, seed=size).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": text} for text in ("abc", "hello", "x y z", "42")] * 40
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_yaml(world, folder, **fields):
    known = {
        **trainer_config(folder / "out", save_strategy="steps", save_steps=1),
        "model_name_or_path": str(world / "student"),
        "teacher_model": str(world / "teacher"),
        "dataset_name": str(world / "data.jsonl"),
        "dtype": "float32",
        **fields,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(known))
    return ["train", "--config", str(folder / "run.yaml")]


def test_the_same_command_line_goes_on_and_ends(world, tmp_path, capsys, monkeypatch):
    command = write_yaml(world, tmp_path, max_steps=4)
    stops = iter([2, None, None])
    train = OnPolicyDistillTrainer.train

    def stopped(self, *args, **kwargs):
        stop = next(stops)

        class Stop(trl_opd.trainer.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == stop:
                    control.should_save = True

            def on_save(self, args, state, control, **kwargs):
                if state.global_step == stop:
                    raise KeyboardInterrupt

        self.add_callback(Stop())
        return train(self, *args, **kwargs)

    monkeypatch.setattr(OnPolicyDistillTrainer, "train", stopped)
    assert main(command) == 130
    assert "goes on at the last checkpoint" in capsys.readouterr().out
    # Half of a later checkpoint
    (tmp_path / "out" / "checkpoint-3").mkdir()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "resumes after step 2" in out and "checkpoint-3 is left out: it has no trainer_state.json" in " ".join(
        out.split()
    )
    assert "step 3/4" in out and "step 2/4" not in out
    assert main(command) == 0
    assert "Already finished" in capsys.readouterr().out
    whole = tmp_path / "whole"
    whole.mkdir()
    assert main(write_yaml(world, whole, max_steps=4)) == 0
    ours, theirs = (load_file(folder / "out" / "model.safetensors") for folder in (tmp_path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_configuration_and_a_new_beginning(world, tmp_path, capsys):
    command = write_yaml(world, tmp_path, max_steps=1)
    assert main(command) == 0
    with pytest.raises(SystemExit) as stop:
        main([*command, "--divergence", "forward_kl"])
    assert stop.value.code == 2 and "divergence was 'reverse_kl', now 'forward_kl'" in capsys.readouterr().err
    assert main([*command, "--max_steps", "2"]) == 0
    assert "resumes after step 1" in capsys.readouterr().out
    assert main([*command, "--divergence", "forward_kl", "--resume", "never"]) == 0
    assert (tmp_path / "out" / "_earlier.1" / "checkpoint-2").is_dir()
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["divergence"] == "forward_kl"


def test_a_run_that_an_alarm_has_stopped_goes_on_only_if_told_to(world, tmp_path, capsys):
    names = ("entropy_collapse.share_of_start", "entropy_collapse.share_of_teacher")
    always = {**dict.fromkeys(names, 100.0), "all.recent": 2, "all.warm_up": 1}  # at the second line, whatever it says
    fields = {"max_steps": 4, "on_alarm": "stop", "alarm_thresholds": always}
    command = write_yaml(world, tmp_path, **fields)
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "Stopped by an alarm" in out and "entropy_collapse at step 2" in out
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    with pytest.raises(SystemExit) as stop:
        main(command)
    message = " ".join(capsys.readouterr().err.split())
    assert (
        stop.value.code == 2
        and "an alarm has stopped its run at step 2" in message
        and "checkpoint-1 to go on" in message
    )
    assert main([*command, "--resume", "always", "--on_alarm", "warn"]) == 0
    assert "resumes after step 2" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_same_command_line(world, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(trl_opd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "trl_opd"]
    subprocess.run([*start, *write_yaml(world, whole, max_steps=24)], env=environment, check=True, capture_output=True)
    command = [*start, *write_yaml(world, tmp_path, max_steps=24)]
    kills = 0
    for wait in (5, 14):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            if (tmp_path / "out" / f"checkpoint-{wait}").exists():  # it is being written, or just was
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and kills == 2, done.stderr[-2000:]
    assert "resumes after step" in done.stdout
    ours, theirs = (load_file(folder / "out" / "model.safetensors") for folder in (tmp_path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "Already finished" in again.stdout
