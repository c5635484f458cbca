"""Runs against a served teacher: the same as with the model here, and never a step on a part of the scores."""

import time

import pytest
import torch
from asking import make_served_model
from fault_proxy import REASONS
from safetensors.torch import load_file
from training import RememberWeights, assert_same_weights, make_trainer, weights_of

from trl_opd.teachers import TeacherScoreError

PG = {"credit": "policy_gradient", "support": "sampled"}
QUICK = {"retry_wait": 0.01, "max_retry_wait": 0.05}


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("fields", [{}, PG, {"support": "student_top_k"}], ids=["top-k", "sampled", "student's"])
def test_a_run_is_that_of_the_model_itself(serve, tmp_path, kind, fields):
    if kind == "vllm" and fields.get("support") == "student_top_k":
        return
    size = {"support_size": 51} if fields is not PG else {}
    server = serve(kind=kind, max_logprobs=64)
    runs = []
    for name, teacher in (("served", server.url), ("local", make_served_model())):
        trainer = make_trainer(tmp_path / name, teacher, **{**fields, **size})
        trainer.train()
        runs.append(trainer)
    assert len(server.asked) > 20
    losses = [[line["distill/loss"] for line in t.state.log_history if "distill/loss" in line] for t in runs]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, weight in weights_of(runs[0]).items():
        torch.testing.assert_close(weight, weights_of(runs[1])[name], rtol=0, atol=1e-3)


def test_the_servers_are_asked_before_rewards_are_computed(serve, tmp_path):
    server = serve()
    asked = []

    def slow_reward(completions, **kwargs):
        time.sleep(0.5)
        asked.append(len(server.asked))
        return [0.0] * len(completions)

    trainer = make_trainer(tmp_path, server.url, reward_funcs=slow_reward, reward_coef=0.0, max_steps=1)
    before = len(server.asked)
    trainer.train()
    assert asked[0] - before == len(server.asked) - before == 8


def test_the_check_at_the_start_refuses_a_wrong_run(serve, tmp_path):
    with pytest.raises(ValueError, match="--max-logprobs 30"):
        make_trainer(tmp_path, serve().url, support_size=30)
    with pytest.raises(ValueError, match=r"distill_temperature=1\.0"):
        make_trainer(tmp_path, serve().url, temperature=0.7)


# What servers and networks do; the other ways are in test_remote_failures.py
FAULTS = ["500", "truncated", "hang", "nan", "other model", "too few log-probs", "too few positions"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Final weights of a run in which nothing fails."""
    cache = {}

    def get(url, **fields):
        if not cache:
            trainer = make_trainer(tmp_path_factory.mktemp("undisturbed"), url, max_steps=3, **fields)
            trainer.train()
            cache["weights"] = weights_of(trainer)
        return cache["weights"]

    return get


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_failure_leaves_no_trace(serve, proxy, remote, undisturbed, tmp_path, fault):
    server = serve()
    between = proxy(server.url)
    teacher = remote(between.url)
    trainer = make_trainer(tmp_path, teacher)
    teacher.client.limits.timeout = 2.0 if fault == "hang" else 20.0
    between.next([None, fault, None, fault, fault])
    trainer.train()
    assert fault in [what for _, what in between.seen]
    assert trainer.state.global_step == 3
    assert_same_weights(weights_of(trainer), undisturbed(server.url))


@pytest.mark.parametrize("fault", [*FAULTS, "stop"])
def test_a_lasting_failure_stops_with_a_checkpoint_of_the_last_whole_step(serve, proxy, remote, tmp_path, fault):
    server = serve()
    between = proxy(server.url)
    memory = RememberWeights()

    class Fail(RememberWeights):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                if fault == "stop":
                    between.stop()
                else:
                    between.next([None, None])  # some of the batch's questions are answered
                    between.always = fault

    teacher = remote(between.url, retries=2)
    trainer = make_trainer(tmp_path, teacher, callbacks=[memory, Fail()])
    teacher.client.limits.timeout = 2.0 if fault == "hang" else 20.0
    with pytest.raises(TeacherScoreError, match=REASONS.get(fault, "ConnectError|Read")) as caught:
        trainer.train()
    message = str(caught.value)
    assert between.url in message and "no step was taken" in message.lower()
    assert f"A checkpoint of step 2 is in {tmp_path}" in message
    assert trainer.state.global_step == 2
    assert_same_weights(weights_of(trainer), memory.after[2])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert_same_weights(load_file(tmp_path / "checkpoint-2" / "model.safetensors"), memory.after[2])


def test_a_stopped_run_goes_on_when_the_server_is_back(serve, proxy, undisturbed, tmp_path):
    server = serve()
    between = proxy(server.url)
    fields = {"max_steps": 3, "teacher_model_init_kwargs": {**QUICK, "retries": 1}}
    trainer = make_trainer(tmp_path, between.url, **fields)
    between.next([None] * 8)
    between.always = "500"
    with pytest.raises(TeacherScoreError):
        trainer.train()
    between.always = None
    again = make_trainer(tmp_path, between.url, **fields)
    again.train(resume_from_checkpoint=True)
    for name, weight in weights_of(again).items():
        torch.testing.assert_close(weight, undisturbed(server.url)[name], rtol=1e-6, atol=1e-6)


def test_no_key_in_what_a_run_writes(serve, proxy, tmp_path, monkeypatch, caplog, capfd):
    key = "sk-marker-51d0"
    caplog.set_level("DEBUG")
    monkeypatch.setenv("TEACHER_KEY", key)
    between = proxy(serve(key=key).url)
    trainer = make_trainer(
        tmp_path,
        between.url,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        teacher_model_init_kwargs={**QUICK, "retries": 1, "api_key_env": "TEACHER_KEY"},
    )
    between.next([None] * 8)
    between.always = "500"
    with pytest.raises(TeacherScoreError) as caught:
        trainer.train()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not any(key.encode() in content for content in written)
    assert key not in "".join([*capfd.readouterr(), caplog.text, str(caught.value)])
