"""What the check before a run finds, and that each finding says what mends it."""

import re
import warnings
from types import SimpleNamespace

import pytest
from tiny import make_model, make_tokenizer

from trl_opd.teachers import RemoteTeacher

KINDS = ["vllm", "sglang"]


def check(teacher, **request):
    return teacher.check(**{"support_size": 5, "tokenizer": make_tokenizer(), **request})


def problems(findings, severity="error"):
    return [str(finding) for finding in findings if finding.severity == severity]


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_server_passes(serve, remote, kind):
    teacher = remote(serve(kind=kind).url)
    findings = check(teacher, max_completion_length=100)
    assert problems(findings) == problems(findings, "warning") == []
    assert {f.check for f in findings} == {
        "reachable",
        "vocabulary",
        "length",
        "max_logprobs",
        "temperature",
        "determinism",
    }
    assert f"{'vLLM 0.32.0' if kind == 'vllm' else 'SGLang 0.5.9'} serves 'tiny'" in str(findings[0])
    assert teacher.max_length == 255


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("request_", "check_name", "words"),
    [
        ({"temperature": 0.7}, "temperature", "distill_temperature=1.0"),
        ({"max_completion_length": 255}, "length", "--max-model-len of at least 256|--context-length of at least 256"),
        ({"tokenizer": make_tokenizer("zyx 0123")}, "vocabulary", "tokenizer family"),
        ({"support": "union_top_k"}, "support", "support='teacher_top_k'"),
    ],
)
def test_what_is_wrong_is_an_error_that_says_what_mends_it(serve, remote, kind, request_, check_name, words):
    server = serve(kind=kind)
    (found,) = problems(check(remote(server.url), **request_))
    assert found.startswith(check_name) and server.url in found
    assert re.search(words, found)


def test_more_entries_than_the_server_sends(serve, remote):
    (found,) = problems(check(remote(serve().url), support_size=21))
    assert "max allowed: 20" in found and "--max-logprobs 21" in found
    assert problems(check(remote(serve().url), support="sampled", support_size=21)) == []


def test_entries_of_the_student_need_sglang(serve, remote):
    (found,) = problems(check(remote(serve().url), support="student_top_k"))
    assert "serve the teacher with SGLang" in found
    assert problems(check(remote(serve(kind="sglang").url), support="student_top_k")) == []


def test_a_server_that_follows_the_temperature_may_be_asked_for_one(serve, remote):
    assert problems(check(remote(serve(tempered=True).url), temperature=0.7)) == []


def test_special_tokens_must_be_the_same(serve, remote):
    theirs = make_tokenizer()
    theirs.add_special_tokens({"additional_special_tokens": ["<other>"]})
    ours = make_tokenizer()
    ours.add_special_tokens({"additional_special_tokens": ["<same place>"]})
    model = make_model(vocab_size=52)
    server = serve(model=model, tokenizer=theirs)
    (found,) = problems(check(remote(server.url), tokenizer=ours))
    assert "'<other>'" in found and "'<same place>'" in found


def test_ids_that_the_server_does_not_know_are_a_warning(serve, remote):
    ours = make_tokenizer()
    ours.add_tokens(["<new>"])
    teacher = remote(serve().url)
    assert problems(check(teacher, tokenizer=ours)) == []
    (found,) = problems(check(teacher, tokenizer=ours), "warning")
    assert "last id 51 is refused" in found and "vocab_size=" in found
    assert problems(check(remote(serve().url, vocab_size=51), tokenizer=ours), "warning") == []


@pytest.mark.parametrize(("noise", "severity"), [(0.1, "warning"), (3.0, "error")])
def test_answers_that_are_not_repeated(serve, remote, noise, severity):
    (found,) = problems(check(remote(serve(noise=noise).url)), severity)
    assert found.startswith("determinism") and "VLLM_BATCH_INVARIANT=1" in found
    assert problems(check(remote(serve(noise=noise).url, tolerance=100.0))) == []


def test_replicas_must_agree(serve, remote, served_model):
    servers = [serve(), serve(), serve(model=make_model(seed=5))]
    (found,) = problems(check(remote([s.url for s in servers])))
    assert found.startswith("replicas") and servers[2].url in found and servers[0].url in found


def test_replicas_of_different_names_are_refused(serve, remote):
    servers = [serve(), serve(name="other")]
    (found,) = problems(check(remote([s.url for s in servers])))
    assert "serves another model" in found


@pytest.mark.parametrize(
    ("options", "teacher", "words"),
    [
        ({"models": ["tiny", "an-adapter"]}, {}, "several models.*set model="),
        ({}, {"model": "absent"}, r"\['tiny'\], not 'absent'"),
        ({"key": "k"}, {}, "401.*set api_key_env"),
    ],
)
def test_a_server_that_cannot_be_asked(serve, remote, options, teacher, words):
    (found,) = problems(check(remote(serve(**options).url, **teacher)))
    assert re.search(words, found)


def test_a_model_among_several(serve, remote):
    assert problems(check(remote(serve(models=["an-adapter", "tiny"]).url, model="tiny"))) == []


def test_nobody_at_the_address(remote):
    (found,) = problems(check(remote("http://127.0.0.1:9")))
    assert found.startswith("reachable: http://127.0.0.1:9: ConnectError") and "/v1/models" in found


def test_a_server_of_no_openai_style(serve, remote):
    server = serve()
    server.models = []
    assert "no OpenAI-style server" in problems(check(remote(server.url)))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_needs_no_tokenizer(serve, remote, kind):
    assert problems(remote(serve(kind=kind).url).check(support_size=5)) == []


def trainer_of(**args):
    fields = {"support": "teacher_top_k", "support_size": 5, "divergence_temperature": 1.0, **args}
    return SimpleNamespace(args=SimpleNamespace(**fields), processing_class=make_tokenizer())


def test_prepare_lists_all_errors_and_warns_of_the_rest(serve, remote):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remote(serve().url).prepare(trainer_of(max_completion_length=8))
    with pytest.raises(ValueError, match="cannot teach this run") as caught:
        remote(serve().url).prepare(trainer_of(max_completion_length=1000, support_size=30))
    assert "--max-logprobs 30" in str(caught.value) and "--max-model-len" in str(caught.value)
    with pytest.warns(UserWarning, match="determinism"):
        remote(serve(noise=0.1).url).prepare(trainer_of())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"urls": []}, "urls must hold the address"),
        ({"urls": "localhost:8000"}, "urls must be addresses"),
        ({"server": "tgi"}, "server must be 'auto', 'vllm' or 'sglang', got 'tgi'"),
        ({"retries": -1}, "retries must be a whole number of at least 0"),
        ({"max_in_flight": 0}, "max_in_flight must be a whole number of at least 1"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0"),
        ({"verify": False}, "verify must be True or the path"),
        ({"verify": "/nonexistent.pem"}, "does not exist"),
        ({"verify": __file__}, "verify must be left unset without an https address"),
    ],
)
def test_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        RemoteTeacher(**{"urls": "http://127.0.0.1:8000", **arguments})


def test_addresses_lose_what_does_not_belong_there():
    teacher = RemoteTeacher([" http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000", "http://10.0.0.1/teacher/"])
    assert teacher.urls == ["http://127.0.0.1:8000", "http://10.0.0.1/teacher"]
    assert teacher.name == "http://127.0.0.1:8000, http://10.0.0.1/teacher"
    assert teacher.max_length is None and teacher.vocab_size is None
