"""Checks with weights against teachers behind servers and in caches."""

import os
import re
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import datasets
import pytest
import torch
from asking import make_served_model
from caches import make_rows, score_arguments
from datasets import Dataset
from planted import ENDS, look, make_run, names, near, problems
from steps import build
from stub_server import StubServer
from tiny import make_tokenizer

from trl_opd.doctor.models import check_models
from trl_opd.score import ScoreArguments, score_dataset
from trl_opd.teachers import RecordingTeacher, RemoteTeacher

START_LIMIT = 300  # seconds


class TwiceTempered(StubServer):
    """Divides by the temperature twice, as a server does that tempers logits which its sampler tempers again."""

    def logprobs(self, ids, temperature):
        with self._lock:
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        return (logits / temperature**2).log_softmax(-1).detach()


class Hot(StubServer):
    """Answers at twice the temperature."""

    def logprobs(self, ids, temperature):
        with self._lock:
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        return (logits / 2).log_softmax(-1).detach()


@pytest.fixture
def run(tmp_path):
    """A trainer of a student whose weights are the served model's."""

    def make(teacher, **fields):
        model = make_served_model().double()
        model.generation_config.eos_token_id = ENDS
        fields = {"support": "teacher_top_k", "support_size": 15, "max_completion_length": 64, **fields}
        return build(tmp_path, teacher=teacher, model=model, preflight="off", **fields)

    return make


@pytest.fixture
def serve():
    """Start a server of the student's own model."""
    servers, teachers = [], []

    def start(stub=StubServer, **options):
        servers.append(stub(make_served_model(), make_tokenizer(), **options))
        teachers.append(RemoteTeacher(servers[-1].url, retry_wait=0.01, retries=1, timeout=20.0))
        return teachers[-1]

    start.servers = servers
    yield start
    for thing in (*teachers, *servers):
        thing.close()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"support": "sampled", "credit": "policy_gradient"}, {"support": "student_top_k", "support_size": 8}],
    ids=["top k", "sampled", "student's"],
)
def test_a_good_server(run, serve, kind, fields):
    if kind == "vllm" and fields.get("support") == "student_top_k":
        pytest.skip("refused when the trainer is built")
    findings = look(run(serve(kind=kind), **fields))
    assert problems(findings) == [], [str(f) for f in problems(findings)]
    assert "answers at 1 whatever is asked for" in " ".join(f.seen for f in findings if f.check == "temperature")


def test_a_server_that_tempers_at_the_runs_temperature(run, serve):
    findings = look(run(serve(tempered=True), temperature=0.7))
    assert problems(findings) == []
    assert "0.5 times as large, as they should" in " ".join(f.seen for f in findings)


def test_a_server_that_tempers_twice(run, serve):
    """The check at the start sees that its answers follow the temperature, and not how."""
    found = problems(look(run(serve(TwiceTempered), temperature=0.7)))
    assert names(found) == {"temperature"}
    assert re.search("become 0.25 times as large, and should become 0.5 times", " ".join(f.seen for f in found))


def test_a_server_at_another_temperature_than_the_students(run, serve):
    (found,) = problems(look(run(serve(Hot))))
    assert found.check == "temperature" and "those of the student at 2 times the temperature" in found.seen


def test_a_noisy_server(run, serve):
    """Its noise begins when the run has been built: the check at the start would find it, too."""
    teacher = serve()
    trainer = run(teacher)
    serve.servers[0].noise = 0.3
    found = problems(look(trainer))
    assert names(found) == {"determinism"}
    assert "VLLM_BATCH_INVARIANT=1" in found[0].do


def test_a_server_that_breaks_down(run, serve):
    trainer = run(serve())
    serve.servers[0].answer = lambda *args: (500, {"error": {"message": "EngineCore encountered an issue."}})
    (found,) = problems(look(trainer))
    assert found.check == "determinism" and "gave no answer" in found.seen and "EngineCore" in found.seen


def test_what_is_recorded_is_not_asked_of_the_cache_nor_added_to_it(run, serve, tmp_path):
    folder = tmp_path / "cache"
    trainer = run(RecordingTeacher(serve(), folder))
    assert problems(look(trainer)) == []
    assert list(Path(folder).rglob("*.bin")) == list(Path(folder).rglob("*.npy")) == []
    assert not any("shard" in path.name for path in Path(folder).rglob("*"))
    assert len(serve.servers[0].asked) > 12


def test_stored_scores_of_stored_completions(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    near(by=0.01).save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    score_dataset(ScoreArguments(**score_arguments(tmp_path)), progress=False)
    arguments = {"train_dataset": Dataset.from_list([{"prompt": row["prompt"]} for row in make_rows()])}
    fields = {"support": "teacher_top_k", "support_size": 5, "arguments": arguments}
    trainer = make_run(tmp_path, f"cache:{tmp_path / 'scores'}", **fields)
    findings = look(trainer)
    assert problems(findings) == []
    seen = " ".join(f.seen for f in findings)
    assert "stored completions, not samples of this student" in seen and "the scores are stored at 1" in seen
    assert trainer.rollout_func._counts == {"train": {}, "eval": {}}


# Against vLLM itself


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory):
    """Address of a real server of the tiny model (see tests/teachers/test_vllm_server.py)."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.fail("VLLM_PYTHON must be the Python of an environment with vLLM: make test-vllm")
    folder = tmp_path_factory.mktemp("served")
    make_served_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--enforce-eager"]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    with open(folder / "server.log", "w+") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
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


def _is_up(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_the_doctor_and_a_real_server(run, vllm_server):
    """The served model is the student: no problem, no distance, and the temperature is the one that vLLM knows."""
    trainer = run(RemoteTeacher(vllm_server, timeout=60.0))
    findings = check_models(trainer, num_samples=12)
    assert problems(findings) == [], [str(f) for f in problems(findings)]
    (distance,) = [f for f in findings if f.check == "student_distance"]
    kl = float(re.search(r"reverse KL (\S+) nats", distance.seen).group(1))
    assert abs(kl) < 1e-3 and "100% of the top" in distance.seen
    temperature = " ".join(f.seen for f in findings if f.check == "temperature")
    assert "answers at 1 whatever is asked for" in temperature
    # A student at another temperature than the server's log-probs is refused before
    with pytest.raises(ValueError, match=r"temperature.*distill_temperature=1\.0"):
        run(RemoteTeacher(vllm_server, timeout=60.0), temperature=0.7)
