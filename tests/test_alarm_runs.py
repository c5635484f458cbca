"""Alarms of real training runs: those in which something goes wrong, healthy ones, and how they stop."""

import json
import logging

import pytest
from alarm_runs import (
    EOS,
    BreakStudent,
    Likes,
    Listener,
    NeverEnds,
    Repeats,
    Swapped,
    empty_rollouts,
    make_near_pair,
    make_trainer,
    routed_prompts,
    share_of,
)
from processes import run_two
from safetensors.torch import load_file
from tiny import make_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_opd.alarms import AlarmCallback, Watch

# What the function of an import path heard
HEARD = []


def hear(alarm):
    HEARD.append(alarm)


def watched(output_dir, **fields):
    """The alarms of a run."""
    listener = Listener()
    make_trainer(output_dir, listener, **fields).train()
    return listener


def empty_run(output_dir, *args, **fields):
    """A run whose third line raises empty_completions, and no other alarm."""
    arguments = {"rollout_func": empty_rollouts, **fields.pop("arguments", {})}
    defaults = {"max_steps": 6, "per_device_train_batch_size": 2}
    return make_trainer(output_dir, *args, **{**defaults, **fields}, arguments=arguments)


class CountSteps(TrainerCallback):
    def __init__(self):
        self.begun = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun += 1


# What an alarm does


def test_stop_leaves_a_checkpoint_and_takes_no_further_step(tmp_path, caplog):
    steps = CountSteps()
    trainer = empty_run(tmp_path, on_alarm="stop", arguments={"callbacks": [steps]})  # save_strategy="no"
    with caplog.at_level(logging.WARNING, logger="trl_opd.alarms"):
        trainer.train()
    assert trainer.state.global_step == steps.begun == 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    spoken = [record.getMessage() for record in caplog.records if record.name.startswith("trl_opd.alarms")]
    assert len(spoken) == 2
    assert spoken[0].startswith("empty_completions at step 3: 100% of the completions of the last 3 log lines are")
    assert "trl-opd doctor" in spoken[0] and str(tmp_path / "checkpoint-3") in spoken[1]
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(weight.equal(saved[name]) for name, weight in trainer.model.state_dict().items() if name in saved)

    # Another run goes on from there, and does not hear again what it was stopped for
    listener = Listener("stop")
    resumed = empty_run(tmp_path, listener)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and listener.alarms == []


def test_alarms_are_recorded(tmp_path):
    trainer = empty_run(tmp_path)
    kept = []
    trainer.recorder.add_alarm = kept.append
    trainer.train()
    assert trainer.state.global_step == 6  # on_alarm="warn"
    (alarm,) = kept
    assert list(alarm) == ["alarm", "step", "severity", "seen", "why", "do", "values"]
    assert (alarm["alarm"], alarm["step"]) == ("empty_completions", 3)
    assert json.loads(json.dumps(alarm, allow_nan=False))["values"] == {"completions/empty_share": 1.0}


def test_a_function_hears_the_alarms_and_may_stop(tmp_path, caplog):
    silent, stopping = Listener(), Listener("stop")
    trainer = empty_run(tmp_path / "silent", silent, on_alarm="stop")  # the callback of the person wins
    kept = []
    trainer.recorder.add_alarm = kept.append
    trainer.train()
    assert [alarm["step"] for alarm in kept] == [3]
    assert trainer.state.global_step == 6 and [alarm.step for alarm in silent.alarms] == [3]
    assert sum(isinstance(callback, AlarmCallback) for callback in trainer.callback_handler.callbacks) == 1
    trainer = empty_run(tmp_path / "stopping", stopping)
    trainer.train()
    assert trainer.state.global_step == 3 and (tmp_path / "stopping" / "checkpoint-3").is_dir()
    assert not [record for record in caplog.records if record.getMessage().startswith("empty_completions")]


def test_a_function_by_its_import_path(tmp_path):
    HEARD.clear()
    empty_run(tmp_path, on_alarm="test_alarm_runs.hear", alarm_thresholds={"all.recent": 2}).train()
    assert [alarm.step for alarm in HEARD] == [2]


def test_a_function_that_fails_does_not_end_the_run(tmp_path, caplog):
    def broken(alarm):
        raise KeyError("no such channel")

    trainer = empty_run(tmp_path, broken)
    trainer.train()
    assert trainer.state.global_step == 6
    (text,) = [record.getMessage() for record in caplog.records if "on_alarm failed" in record.getMessage()]
    assert "empty_completions" in text


def test_a_rule_that_fails_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    def broken(self, step, logs):
        raise ZeroDivisionError

    monkeypatch.setattr(Watch, "read", broken)
    trainer = empty_run(tmp_path, on_alarm="stop", max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3
    assert sum("The alarms failed" in record.getMessage() for record in caplog.records) == 1


def test_lines_that_are_not_of_training_are_not_read(tmp_path):
    """Evaluations, whose metrics have a prefix, and the summary at the end, of a run and of one that is resumed."""
    listener, control = Listener(), TrainerControl()
    callback = AlarmCallback(listener)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    other = {"completions/empty_share": 1.0, "eval_loss": 1.0}
    history = [{**other, "step": step} for step in (1, 2)]
    state = TrainerState(global_step=3, log_history=history)
    callback.on_train_begin(args, state, control)
    for step in range(3, 6):
        callback.on_log(args, TrainerState(global_step=step), control, logs=other)
    assert listener.alarms == []
    for step in range(6, 9):
        callback.on_log(args, TrainerState(global_step=step), control, logs={**other, "loss": 1.0})
    assert [alarm.step for alarm in listener.alarms] == [8]


def test_off_and_thresholds(tmp_path, caplog):
    empty_run(tmp_path / "off", on_alarm="off", max_steps=4).train()
    empty_run(tmp_path / "one", alarm_thresholds={"empty_completions.on": 0}, max_steps=4).train()
    assert not [record for record in caplog.records if record.name.startswith("trl_opd.alarms")]
    # A callback's own thresholds before the configuration's
    listener = Listener()
    callback = AlarmCallback(listener, {"all.recent": 2})
    fields = {"alarm_thresholds": {"empty_completions.on": 0}, "arguments": {"callbacks": [callback]}}
    empty_run(tmp_path / "own", max_steps=4, **fields).train()
    assert [alarm.step for alarm in listener.alarms] == [2]


def test_a_second_training_begins_anew(tmp_path):
    listener = Listener()
    trainer = empty_run(tmp_path, listener, max_steps=4)
    trainer.train()
    trainer.train()
    assert [alarm.step for alarm in listener.alarms] == [3, 3]


def test_stop_saves_where_the_best_checkpoint_is_kept(tmp_path):
    """An evaluation of the same step decides what is saved under save_strategy="best": not what an alarm saves."""
    fields = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    fields |= {"per_device_eval_batch_size": 2, "greater_is_better": True}
    evaluated = make_trainer(tmp_path).train_dataset.select(range(2))
    trainer = empty_run(tmp_path, on_alarm="stop", arguments={"eval_dataset": evaluated}, **fields)
    trainer.train()
    assert trainer.state.global_step == 3 and (tmp_path / "checkpoint-3" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_stop_together(tmp_path):
    run_two(__file__.replace("test_alarm_runs", "alarm_two_processes"), tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for name in ("stop", "callable"):
        assert [rank[name]["step"] for rank in ranks] == [3, 3]
        assert (tmp_path / name / "checkpoint-3" / "model.safetensors").is_file()
    # The function is called on the main process alone
    assert [rank["callable"]["heard"] for rank in ranks] == [["empty_completions"], []]


# What provokes each alarm, with the thresholds as they are


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_run_raises_none(tmp_path, seed):
    near = make_near_pair()[1] if seed else None
    listener = watched(tmp_path, max_steps=60, teacher=near, model=make_near_pair()[0] if seed else None, seed=seed)
    assert listener.alarms == []


@pytest.mark.slow
def test_a_healthy_run_with_rewards_raises_none(tmp_path):
    fields = {"num_generations": 4, "reward_coef": 0.1, "arguments": {"reward_funcs": share_of(30)}}
    assert watched(tmp_path, teacher=Likes(30), **fields).alarms == []


@pytest.mark.slow
def test_a_learning_rate_that_grows_until_it_is_far_too_high(tmp_path):
    student, teacher = make_near_pair()
    listener = watched(tmp_path, model=student, teacher=teacher, rate=(1e-4, 1.35))
    assert {"kl_spike", "teacher_disagreement", "entropy_collapse"} <= listener.names
    assert "learning_rate" in listener.first("kl_spike").do


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "rate"), [(Repeats(15), 3e-3), (NeverEnds(15), 1e-2)])
def test_a_teacher_that_repeats_and_one_that_never_ends(tmp_path, teacher, rate):
    listener = watched(tmp_path, teacher=teacher, learning_rate=rate, max_completion_length=96, max_steps=45)
    assert listener.first("truncation_and_repetition").step > 16
    assert listener.names == {"truncation_and_repetition", "kl_spike"}  # the teacher changed at once


@pytest.mark.slow
def test_a_reward_that_pays_for_one_token(tmp_path):
    fields = {"num_generations": 4, "distill_coef": 0.01, "learning_rate": 1e-2}
    listener = watched(tmp_path, arguments={"reward_funcs": share_of(20)}, **fields)
    assert "entropy_collapse" in listener.names and "reward_coef" in listener.first("entropy_collapse").do


@pytest.mark.slow
def test_a_student_that_does_not_learn(tmp_path):
    assert watched(tmp_path, learning_rate=1e-9, max_steps=55).names == {"overlap_stalled"}


@pytest.mark.slow
def test_a_teacher_that_ends_at_once(tmp_path):
    listener = watched(tmp_path, teacher=Likes(EOS), generation_kwargs=None, max_steps=20)
    assert listener.names == {"empty_completions"}


@pytest.mark.slow
def test_a_teacher_that_is_swapped(tmp_path):
    teacher = Swapped(Likes(30), Likes(31), after=40)
    # A student that is sure of one token has hardly a gradient of the reverse KL
    listener = watched(tmp_path, teacher=teacher, learning_rate=1e-2, max_steps=44, divergence="forward_kl")
    sudden = {alarm.alarm: alarm.step for alarm in listener.alarms if alarm.step > 40}
    assert sudden == {"kl_spike": 42, "gradient_norm": 42, "teacher_disagreement": 42}


@pytest.mark.slow
def test_two_teachers_that_disagree(tmp_path):
    teachers = {"many": Likes(30), "few": Likes(31)}
    listener = watched(tmp_path, teacher=teachers, arguments={"train_dataset": routed_prompts()})
    assert listener.names == {"teacher_disagreement"}
    assert "to teacher 'few'" in listener.first("teacher_disagreement").seen


@pytest.mark.slow
def test_a_teacher_that_is_bad_at_the_task(tmp_path):
    fields = {"num_generations": 4, "reward_coef": 0.1, "arguments": {"reward_funcs": share_of(30, -1)}}
    listener = watched(tmp_path, teacher=Likes(30), **fields)
    assert listener.names == {"reward_falls_with_kl"}


def test_a_student_of_nan(tmp_path, caplog):
    """The step after the break is made of completions that exist already; without a stop the next could not sample."""
    listener = Listener("stop")
    arguments = {"callbacks": [BreakStudent(3)]}
    fields = {"steps_per_generation": 2, "credit": "policy_gradient", "support": "sampled", "max_steps": 8}
    trainer = make_trainer(tmp_path, listener, per_device_train_batch_size=2, arguments=arguments, **fields)
    trainer.train()
    assert trainer.state.global_step == 4
    assert listener.names == {"not_a_number", "gradient_norm"}
    assert {alarm.severity for alarm in listener.alarms} == {"error"}
    assert "go on from an earlier one" in caplog.text
    assert "distill/reverse_kl is NaN" in listener.first("not_a_number").seen


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"diagnostics": False}, {"credit": "policy_gradient", "support": "sampled"}])
def test_runs_that_measure_less_are_watched_for_what_they_measure(tmp_path, fields):
    listener = watched(tmp_path, teacher=make_model(hidden_size=24, seed=1), rate=(1e-3, 1.4), **fields)
    assert "kl_spike" in listener.names


@pytest.mark.slow
def test_a_resumed_run_hears_what_an_uninterrupted_one_does(tmp_path):
    def run(folder, resume=None):
        listener = Listener()
        teacher = Likes(30)
        fields = {"num_generations": 4, "reward_coef": 0.1, "save_strategy": "steps", "save_steps": 12}
        trainer = make_trainer(folder, listener, teacher, arguments={"reward_funcs": share_of(30, -1)}, **fields)
        trainer.train(resume_from_checkpoint=resume)
        return [alarm.as_dict() for alarm in listener.alarms]

    whole = run(tmp_path)
    assert [alarm["alarm"] for alarm in whole] == ["reward_falls_with_kl"] and 24 < whole[0]["step"] <= 36
    assert run(tmp_path, str(tmp_path / "checkpoint-24")) == whole
    assert run(tmp_path, str(tmp_path / "checkpoint-36")) == []
