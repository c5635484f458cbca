"""
Against a real vLLM server on the CPU: what it answers is what the model here answers, and runs train with it.

`make test-vllm` builds an environment for the server and passes its Python in VLLM_PYTHON; that of the tests needs
nothing of vLLM.
"""

import itertools
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import torch
from asking import assert_true_scores, make_batch, make_served_model
from fault_proxy import REASONS
from safetensors.torch import load_file
from tiny import VOCAB_SIZE, make_tokenizer
from training import RememberWeights, assert_same_weights, make_trainer, weights_of

from trl_opd.heads import add_head_branch
from trl_opd.kernels import fused_linear_divergence
from trl_opd.teachers import LocalTeacher, TeacherScoreError

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

KEY = "sk-marker-a91e"
MAX_LOGPROBS = 50  # of a vocabulary of 51: with one entry in the bucket, a top-k is the whole
START_LIMIT = 300  # seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory, served_model):
    """Address of a server of the tiny model; `processed_logprobs` shows that it does not temper a text's log-probs."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.fail("VLLM_PYTHON must be the Python of an environment with vLLM: make test-vllm")
    folder = tmp_path_factory.mktemp("served")
    served_model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-logprobs", str(MAX_LOGPROBS), "--logprobs-mode", "processed_logprobs"]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_API_KEY": KEY,
    }
    environment.pop("TRITON_INTERPRET", None)
    log = open(folder / "server.log", "w+")  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    url, started = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while not _is_up(url):
            if process.poll() is not None or time.monotonic() - started > START_LIMIT:
                log.seek(0)
                pytest.fail(f"The server did not start:\n{log.read()[-6000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _is_up(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)


@pytest.fixture
def ask(server, remote):
    """A teacher behind the server, or behind another address."""
    return lambda url=server, **options: remote(url, api_key_env="TEACHER_KEY", **{"timeout": 60.0, **options})


@pytest.mark.parametrize(("support", "size"), [("teacher_top_k", 7), ("teacher_top_k", 50), ("sampled", 7)])
def test_scores_are_those_of_the_local_teacher(ask, served_model, support, size):
    batch = make_batch(num_rows=9, completion=40, support=support, support_size=size)
    scores = ask()(batch)
    assert_true_scores(scores, batch, served_model, atol=1e-3)
    # And as LocalTeacher sees it: hidden states, projected
    model = make_served_model()
    add_head_branch(model)
    batch.support = "full"
    with torch.no_grad():
        local = LocalTeacher(model)(batch)
        logprobs = (local.hidden_states @ local.head.weight.T).float().log_softmax(-1)
    mask = batch.completion_mask
    sampled = logprobs.gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    torch.testing.assert_close(scores.sampled_logprobs[mask], sampled[mask], rtol=0, atol=1e-3)
    best, worst = ((logprobs > sampled[..., None] + gap).sum(-1) + 1 for gap in (2e-3, -2e-3))
    assert (best <= scores.sampled_ranks)[mask].all() and (scores.sampled_ranks <= worst)[mask].all()
    if support == "sampled":
        return
    ids, found = scores.topk_ids[mask], scores.topk_logprobs[mask]
    expected = logprobs[mask].gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_the_loss_of_a_longer_top_k_comes_closer_to_the_full_one(ask, served_model):
    batch = make_batch(num_rows=9, completion=40)
    mask = batch.completion_mask
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(int(mask.sum()), 16, generator=generator)
    weight = torch.randn(VOCAB_SIZE, 16, generator=generator) * 0.5

    def divergence(**teacher):
        hidden = student.clone().requires_grad_()
        fused_linear_divergence(hidden, weight, divergence="reverse_kl", backend="torch", **teacher).loss.backward()
        return hidden.grad

    model = make_served_model()
    add_head_branch(model)
    batch.support = "full"
    with torch.no_grad():
        local = LocalTeacher(model)(batch)
    full = divergence(teacher_hidden=local.hidden_states[mask], teacher_weight=local.head.weight.detach())
    errors = []
    for size in (1, 4, 16, 32, 50):
        batch.support, batch.support_size = "teacher_top_k", size
        scores = ask()(batch)
        pair = (scores.topk_ids[mask], scores.topk_logprobs[mask])
        gradient = divergence(teacher_topk=pair, tail="bucket", support="teacher_top_k")
        errors.append(float((gradient - full).norm() / full.norm()))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-3


def problems(teacher, **request):
    findings = teacher.check(**{"tokenizer": make_tokenizer(), "support_size": 16, **request})
    return [str(finding) for finding in findings if finding.severity != "ok"]


def test_the_check_passes(ask):
    teacher = ask()
    assert problems(teacher, max_completion_length=200) == []
    assert teacher.max_length == 255
    findings = teacher.check(tokenizer=make_tokenizer(), support_size=16)
    assert any("vLLM" in f.seen and "serves 'tiny'" in f.seen for f in findings)
    assert [f.severity for f in findings if f.check == "vocabulary"] == ["ok"]
    assert any(f.check == "temperature" and "ignore" in f.seen for f in findings)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"support_size": 51}, "max allowed: 50.*--max-logprobs 51"),
        # Whatever its --logprobs-mode: the server of this file has processed_logprobs
        ({"temperature": 0.7}, "distill_temperature=1.0"),
        ({"max_completion_length": 255}, "--max-model-len of at least 256"),
        ({"support": "student_top_k"}, "SGLang"),
        ({"tokenizer": make_tokenizer("zyx 0123")}, "tokenizer family"),
    ],
)
def test_the_check_finds_what_is_wrong(ask, request_, words):
    (found,) = problems(ask(), **request_)
    assert re.search(words, found), found


def test_the_longest_text_is_scored_and_a_longer_one_refused(ask, served_model):
    batch = make_batch(num_rows=4, prompt=55, completion=200)
    assert_true_scores(ask()(batch), batch, served_model, atol=1e-3)
    with pytest.raises(TeacherScoreError, match="HTTP 400"):
        ask()(make_batch(num_rows=4, prompt=56, completion=200))


def test_a_wrong_key_is_refused(ask, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-another")
    with pytest.raises(TeacherScoreError, match=r"HTTP 401.*TEACHER_KEY") as caught:
        ask()(make_batch())
    assert "sk-another" not in str(caught.value)


FIELDS = {"max_steps": 5, "teacher_model_init_kwargs": {"api_key_env": "TEACHER_KEY", "retry_wait": 0.05}}


# With the local teacher on the same support: its 32 best entries and the rest in one
@pytest.mark.parametrize(
    "run",
    [{"support": "teacher_top_k"}, {"credit": "policy_gradient", "support": "sampled"}],
    ids=["top-k", "sampled"],
)
def test_five_steps_are_those_of_the_local_teacher(server, tmp_path, run):
    fields = {**FIELDS, **run, "support_size": 32}
    trainer = make_trainer(tmp_path / "served", server, **fields)
    trainer.train()
    assert trainer.state.global_step == 5
    local = make_trainer(tmp_path / "local", make_served_model(), **{**fields, "teacher_model_init_kwargs": None})
    local.train()
    logs = [t.state.log_history for t in (trainer, local)]
    losses = [[line["distill/loss"] for line in log if "distill/loss" in line] for log in logs]
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_passing_failures_leave_no_trace(server, proxy, ask, tmp_path):
    runs = []
    for name, faults in (("whole", []), ("disturbed", [f for f in REASONS if f != "drip"])):
        between = proxy(server)
        teacher = ask(between.url, retry_wait=0.05, max_retry_wait=0.2, retries=20)
        trainer = make_trainer(tmp_path / name, teacher, max_steps=5)
        teacher.client.limits.timeout = 5.0
        between.next([None, *faults])
        trainer.train()
        assert len({what for _, what in between.seen} - {"passed on"}) == len(faults)
        runs.append(weights_of(trainer))
    for name, weight in runs[0].items():  # the server itself rounds differently from batch to batch
        torch.testing.assert_close(weight, runs[1][name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("fault", ["stop", "500", "truncated", "hang", "nan", "other model", "too few log-probs"])
def test_lasting_failures_stop_with_the_last_whole_step(server, proxy, ask, tmp_path, fault, caplog):
    caplog.set_level("DEBUG")
    between, memory = proxy(server), RememberWeights()

    class Fail(RememberWeights):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                between.next([None, None])
                between.always = None if fault == "stop" else fault
                if fault == "stop":
                    between.stop()

    teacher = ask(between.url, retries=2, retry_wait=0.05, max_retry_wait=0.1)
    trainer = make_trainer(tmp_path, teacher, callbacks=[memory, Fail()], max_steps=5)
    teacher.client.limits.timeout = 3.0 if fault == "hang" else 60.0
    with pytest.raises(TeacherScoreError, match=REASONS.get(fault, "ConnectError|Read")) as caught:
        trainer.train()
    assert between.url in str(caught.value) and f"A checkpoint of step 2 is in {tmp_path}" in str(caught.value)
    assert_same_weights(weights_of(trainer), memory.after[2])
    assert_same_weights(load_file(tmp_path / "checkpoint-2" / "model.safetensors"), memory.after[2])
    assert KEY not in str(caught.value) + caplog.text
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
