"""What a run leaves in `output_dir/opd`: whole files at any moment, also of runs that fail, are killed or go on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import make_model, make_prompts, make_tokenizer, trainer_config
from transformers import TrainerCallback

import trl_opd
from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer, run_facts
from trl_opd.findings import Finding

FILES = {"run.json", "log.jsonl", "alarms.jsonl", "findings.json", "status.json"}


def make_trainer(path, callbacks=None, teacher=None, arguments=None, dataset=None, **fields):
    return OnPolicyDistillTrainer(
        model=make_model(),
        teacher_model=teacher or make_model(hidden_size=24, seed=1),
        args=OnPolicyDistillConfig(**trainer_config(path, token_view=0, **fields)),
        train_dataset=dataset or make_prompts(),
        processing_class=make_tokenizer(),
        callbacks=callbacks,
        **(arguments or {}),
    )


def refuse(name):
    raise AssertionError(f"{name} is not JSON")


def read(path, name, folder="_opd"):
    return json.loads(Path(path, folder, name).read_text(), parse_constant=refuse)


def lines(path, name="log.jsonl", folder="_opd"):
    text = Path(path, folder, name).read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(path, folder="_opd"):
    return [line["step"] for line in lines(path, folder=folder) if "loss" in line["logs"]]


class At(TrainerCallback):
    """Does something when a step is done."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


def stop(control):
    control.should_training_stop = True


def interrupt(control):
    raise KeyboardInterrupt


def fail(control):
    raise RuntimeError("the disk of https://me:secret-word@host is on fire")


ALARM = {"alarm": "kl_spike", "severity": "warning", "seen": "KL 9", "why": "w", "do": "d", "values": {"kl": math.inf}}


# A run


def test_a_finished_run(tmp_path):
    started = time.time()
    trainer = make_trainer(
        tmp_path, arguments={"eval_dataset": make_prompts(4)}, eval_strategy="steps", eval_steps=3, recipe="opd"
    )
    trainer.findings = [Finding("eos", "ok", "same"), Finding("bos", "warning", "differs", "why", "do")]
    trainer.train()
    assert {f.name for f in (tmp_path / "_opd").iterdir()} == FILES

    logged = lines(tmp_path)
    history = [
        {k: v for k, v in line.items() if k not in ("step", "total_flos")} for line in trainer.state.log_history
    ]
    assert [line["logs"] for line in logged] == history
    assert [line["step"] for line in logged] == [1, 2, 3, 3, 3] and "eval_distill/reverse_kl" in logged[3]["logs"]
    times = [line["time"] for line in logged]
    assert started < times[0] and times == sorted(times)

    status = read(tmp_path, "status.json")
    assert (status["state"], status["step"], status["max_steps"], status["error"]) == ("finished", 3, 3, None)
    assert status["pid"] == os.getpid() and times[-1] <= status["updated"] <= time.time()

    findings = read(tmp_path, "findings.json")
    assert findings["findings"] == [trainer.findings[1].as_dict()] and len(findings["checks"]) == 2

    run = read(tmp_path, "run.json")
    assert run["format"] == 1 and run["history"] == [] and run["num_processes"] == 1
    assert run["config"]["max_completion_length"] == 8 and run["config"].keys() >= {"support", "schedules", "seed"}
    given = {"learning_rate": 1e-2, "recipe": "opd", "support": "sampled", "credit": "policy_gradient"}
    assert given.items() <= run["changed"].items()
    assert not {"divergence", "steps_per_generation", "seed"} & run["changed"].keys(), "nobody has set these"
    assert run["recipe"]["name"] == "opd" and run["recipe"]["fidelity"] == "exact" and run["recipe"]["changes"] == {}
    assert "citation" in run["recipe"] and run["recipe"]["link"].startswith("https://")
    parameters = sum(p.numel() for p in make_model().parameters())
    assert run["student"]["parameters"] == run["student"]["trainable_parameters"] == parameters
    assert run["student"]["class"] == "Qwen3ForCausalLM" and run["student"]["adapter"] is None
    teachers = sum(p.numel() for p in make_model(hidden_size=24).parameters())
    assert run["teacher"]["kind"] == "LocalTeacher" and run["teacher"]["members"][0]["parameters"] == teachers
    assert run["versions"]["torch"] == torch.__version__ and run["versions"]["trl-opd"] == trl_opd.__version__
    assert run["device"].startswith("CPU") and run["position_edges"][0] == 0


def test_numbers_that_are_not_finite_are_null(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)

    class Odd(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logs |= {"nan": math.nan, "inf": -math.inf, "tensor": torch.tensor(2.5), "none": None}

    trainer.callback_handler.callbacks.insert(0, Odd())
    trainer.train()
    trainer.recorder.add_alarm({"step": 1, **ALARM})
    for line in lines(tmp_path):
        logs = line["logs"]
        assert (logs["nan"], logs["inf"], logs["tensor"], logs["none"]) == (None, None, 2.5, None)
    (alarm,) = lines(tmp_path, "alarms.jsonl")
    assert alarm["values"] == {"kl": None} and alarm["seen"] == "KL 9" and alarm["step"] == 1 and alarm["time"] > 0


@pytest.mark.slow
def test_a_schedule_s_field_has_the_configuration_s_own_value(tmp_path):
    schedules = {"distill_coef": {"type": "linear", "start": 0.25, "end": 1.0}}
    trainer = make_trainer(tmp_path, schedules=schedules, max_steps=2, distill_coef=0.5)
    trainer.train()
    trainer.train()
    config = read(tmp_path, "run.json")["config"]
    assert config["distill_coef"] == 0.5 and config["schedules"]["distill_coef"]["start"] == 0.25


@pytest.mark.slow
def test_an_adapter_and_several_teachers_are_named(tmp_path):
    trainer = make_trainer(
        tmp_path,
        teacher={"big": make_model(hidden_size=24, seed=1), "own": "base"},
        arguments={"peft_config": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])},
        dataset=make_prompts().add_column("teacher", ["big", "own"] * 8),
        max_steps=1,
    )
    trainer.train()
    run = read(tmp_path, "run.json")
    assert run["student"]["adapter"] == "LORA r=3 alpha=5 on q_proj, v_proj"
    assert run["student"]["class"] == "Qwen3ForCausalLM"
    # q: 16 -> 16, v: 16 -> 8, in two layers
    assert run["student"]["trainable_parameters"] == 2 * 3 * (16 + 16 + 16 + 8)
    base = sum(p.numel() for p in make_model().parameters())
    assert run["student"]["parameters"] == base + run["student"]["trainable_parameters"]
    assert [member["kind"] for member in run["teacher"]["members"]] == ["LocalTeacher", "AdapterTeacher"]


@pytest.mark.parametrize(
    ("action", "state", "error"),
    [
        (stop, "stopped", None),
        (interrupt, "interrupted", None),
        (fail, "failed", "RuntimeError: the disk of https://***@host is on fire"),
    ],
)
def test_how_a_run_ended_early(tmp_path, action, state, error):
    trainer = make_trainer(tmp_path, callbacks=[At(2, action)])
    if action is stop:
        trainer.train()
    else:
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            trainer.train()
    status = read(tmp_path, "status.json")
    assert (status["state"], status["error"], status["step"]) == (state, error, 2)


def test_a_run_that_an_alarm_has_stopped_says_which(tmp_path):
    trainer = make_trainer(tmp_path, on_alarm="stop", logging_nan_inf_filter=False)
    trainer.recorder.add_alarm({"step": 0, **ALARM})  # before the run begins: it is not this run's

    class Odd(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logs["loss"] = math.nan if state.global_step == 2 else 1.0

    trainer.callback_handler.callbacks.insert(0, Odd())
    trainer.train()
    (alarm,) = lines(tmp_path, "alarms.jsonl")
    status = read(tmp_path, "status.json")
    assert alarm["alarm"] == "not_a_number" and (status["state"], status["step"]) == ("stopped", 2)
    assert status["error"] == f"not_a_number: {alarm['seen']}"


def test_while_it_runs_it_is_running_and_after_an_evaluation_it_is_still_finished(tmp_path):
    seen = []

    def look(control):
        seen.append((read(tmp_path, "status.json")["state"], steps(tmp_path)))

    trainer = make_trainer(tmp_path, callbacks=[At(3, look)], arguments={"eval_dataset": make_prompts(4)})
    trainer.train()
    assert seen == [("running", [1, 2])]
    trainer.evaluate()
    assert read(tmp_path, "status.json")["state"] == "finished" and "eval_loss" in lines(tmp_path)[-1]["logs"]


def test_without_a_teacher_there_is_no_record(tmp_path):
    trainer = OnPolicyDistillTrainer(
        model=make_model(),
        reward_funcs=[lambda completions, **kwargs: [1.0] * len(completions)],
        args=OnPolicyDistillConfig(**trainer_config(tmp_path, num_generations=2, max_steps=1)),
        train_dataset=make_prompts(),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert not (tmp_path / "_opd").exists()


# Runs that go on, and runs that begin anew


def test_a_resumed_run_has_each_step_once_and_its_history(tmp_path):
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer(tmp_path, **fields, callbacks=[At(3, fail)])
    with pytest.raises(RuntimeError):
        first.train()
    for step in (1, 2, 3):
        first.recorder.add_alarm({"step": step, **ALARM})
    with open(tmp_path / "_opd" / "log.jsonl", "a") as file:
        file.write('{"time": 1, "step": 2, "lo')  # a kill has torn it
    assert [json.loads(t)["step"] for t in (tmp_path / "_opd/log.jsonl").read_text().splitlines()[:-1]] == [1, 2]
    started = read(tmp_path, "run.json")["started"]

    for attempt in (1, 2):
        again = make_trainer(tmp_path, **fields)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert steps(tmp_path) == [1, 2, 3, 4]
        assert [line["step"] for line in lines(tmp_path, "alarms.jsonl")] == [1, 2]
        assert [alarm["step"] for alarm in again.recorder.alarms] == [1, 2]
        history = read(tmp_path, "run.json")["history"]
        assert [start["step"] for start in history] == [2] * attempt and history[0]["started"] == started
        assert isinstance(history[0]["command"], list)
        assert read(tmp_path, "status.json")["state"] == "finished"
    assert sum("train_runtime" in line["logs"] for line in lines(tmp_path)) == 1, "the run ended once"
    assert not (tmp_path / "_opd.1").exists()


def test_a_run_that_goes_on_behind_its_end_has_ended_once(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    make_trainer(tmp_path, max_steps=1, **fields).train()
    assert "train_runtime" in lines(tmp_path)[-1]["logs"]
    make_trainer(tmp_path, max_steps=2, **fields).train(resume_from_checkpoint=True)
    assert steps(tmp_path) == [1, 2] and len(lines(tmp_path)) == 3 and "train_runtime" in lines(tmp_path)[-1]["logs"]
    assert read(tmp_path, "run.json")["history"][0]["step"] == 1


def test_a_new_run_in_the_same_folder_keeps_the_old_record_apart(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.args.max_steps = 2
    trainer.train()
    make_trainer(tmp_path, max_steps=3).train()
    assert steps(tmp_path) == [1, 2, 3]
    assert steps(tmp_path, folder="_opd.1") == [1] and steps(tmp_path, folder="_opd.2") == [1, 2]
    assert read(tmp_path, "status.json", folder="_opd.1")["max_steps"] == 1
    assert read(tmp_path, "run.json")["history"] == []


@pytest.mark.slow
def test_a_record_in_which_nothing_was_logged_is_not_kept(tmp_path):
    for action in (fail, stop):
        trainer = make_trainer(tmp_path, callbacks=[At(1, action)], logging_steps=2, max_steps=2)
        if action is fail:
            with pytest.raises(RuntimeError):
                trainer.train()
        else:
            trainer.train()
    assert sorted(f.name for f in tmp_path.iterdir() if f.name.startswith("_opd")) == ["_opd"]


def test_a_run_that_cannot_begin_leaves_the_record_of_the_last_one(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert read(tmp_path, "status.json")["state"] == "finished" and steps(tmp_path) == [1]


# Trouble


def test_a_folder_that_cannot_be_written_warns_once_and_the_run_goes_on(tmp_path):
    (tmp_path / "_opd").write_text("not a folder")
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"Writing the record of the run failed with .*opd") as caught:
        trainer.train()
    assert trainer.state.global_step == 3
    assert sum("record of the run" in str(w.message) for w in caught) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_warns_once_and_the_run_goes_on(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[At(1, lambda control: _fill(tmp_path))])
    with pytest.warns(UserWarning, match="No space left") as caught:
        trainer.train()
    assert trainer.state.global_step == 3 and read(tmp_path, "status.json")["state"] == "finished"
    assert sum("record of the run" in str(w.message) for w in caught) == 1


def _fill(path):
    (path / "_opd" / "log.jsonl").unlink()
    (path / "_opd" / "log.jsonl").symlink_to("/dev/full")


def test_a_line_that_did_not_fit_is_taken_away(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    before = (tmp_path / "_opd" / "log.jsonl").read_bytes()
    real = open

    class Short:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(data[:10])

    monkeypatch.setattr("builtins.open", lambda *a, **k: Short(real(*a, **k)) if a[1] == "ab" else real(*a, **k))
    with pytest.warns(UserWarning, match="10 of"):
        trainer.recorder.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0})
    monkeypatch.undo()
    assert (tmp_path / "_opd" / "log.jsonl").read_bytes() == before


SCRIPT = """
import os, sys
from test_record import make_trainer
make_trainer(sys.argv[1], max_steps=10_000).train()
"""


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_whole_lines(tmp_path):
    path = os.pathsep.join([str(Path(trl_opd.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        log, deadline = tmp_path / "_opd" / "log.jsonl", time.time() + 120
        while not log.exists() or log.read_bytes().count(b"\n") < 5:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    logged = lines(tmp_path)
    assert steps(tmp_path) == list(range(1, len(logged) + 1)) and len(logged) >= 5
    status = read(tmp_path, "status.json")
    assert status["state"] == "running" and status["step"] in (len(logged) - 1, len(logged))
    assert status["pid"] == process.pid and read(tmp_path, "run.json")["pid"] == process.pid
    assert set(json.loads((tmp_path / "_opd" / "findings.json").read_text())) == {"findings", "checks"}


# Secrets


def test_secrets_are_in_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-environment-1")
    words = ["train.py", "--hub_token", "hf_argument_22", "--api-key=key-argument-3", "--teacher_model"]
    words += [
        "https://user:word-in-url-4@host/v1",
        "--teacher_model_init_kwargs",
        '{"token": "in-a-dict-5", "revision": "x"}',
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--note", "the key is sk-environment-1"])
    fields = {"hub_token": "hf_field_666666", "model_init_kwargs": {"token": "hf_nested_7", "revision": "main"}}
    trainer = make_trainer(tmp_path, max_steps=1, model_init_kwargs=None, hub_token=fields["hub_token"])
    trainer.args.model_init_kwargs = fields["model_init_kwargs"]
    trainer.train()
    text = "".join(f.read_text() for f in (tmp_path / "_opd").iterdir())
    for secret in ("environment-1", "argument_22", "argument-3", "in-url-4", "in-a-dict-5", "field_66", "nested_7"):
        assert secret not in text, secret
    run = read(tmp_path, "run.json")
    assert run["config"]["model_init_kwargs"] == {"token": "***", "revision": "main"}
    assert run["config"]["hub_token"] == "***" and trainer.args.hub_token == fields["hub_token"]
    assert run["command"][:4] == ["train.py", "--hub_token", "***", "--api-key=***"]
    assert '{"token": "***", "revision": "x"}' in run["command"]


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("hub_token", "token", "api_key", "OPENAI_API_KEY", "--api-key", "Authorization")),
        *((name, False) for name in ("pad_token", "eos_token", "num_tokens", "api_key_env", "x/token_weight")),
    ],
)
def test_which_names_are_secret(name, secret):
    assert run_facts.is_secret(name) is secret


def test_plain_values():
    class Thing:
        pass

    value = {
        1: (torch.bfloat16, Thing(), math.nan, test_plain_values),
        "path": Path("a/b"),
        "token": 5,
        "x_token": None,
    }
    assert run_facts.plain(value) == {
        "1": ["bfloat16", "Thing", None, "test_record.test_plain_values"],
        "path": "a/b",
        "token": 5,
        "x_token": None,
    }
