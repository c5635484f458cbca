"""A server that fails is asked again, then the run stops with its name: scores are whole or there are none."""

import itertools
import time

import pytest
import torch
from asking import assert_true_scores, make_batch
from fault_proxy import REASONS
from tiny import make_model

from trl_opd.teachers import TeacherScoreError

KINDS = ["vllm", "sglang"]
SHORT = {"hang", "drip"}
FAULTS = sorted(REASONS)


def applies(fault, kind):
    return not (fault == "other model" and kind == "sglang")  # SGLang's answers do not name the model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_failure_changes_nothing(serve, proxy, remote, served_model, fault, kind):
    if not applies(fault, kind):
        return
    server, batch = serve(kind=kind), make_batch()
    between = proxy(server.url)
    between.next([None, fault, fault, None, fault])
    teacher = remote(between.url, timeout=0.4 if fault in SHORT else 20.0)
    assert_true_scores(teacher(batch), batch, served_model)
    assert [what for _, what in between.seen].count(fault) == 3
    assert teacher.client.counts["retries"] >= 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_failure_is_an_error_that_names_the_server(serve, proxy, remote, fault, kind):
    if not applies(fault, kind):
        return
    between = proxy(serve(kind=kind).url)
    between.next([None])
    between.always = fault
    teacher = remote(between.url, retries=2, timeout=0.3 if fault in SHORT else 20.0)
    with pytest.raises(TeacherScoreError, match=REASONS[fault]) as caught:
        teacher(make_batch())
    assert between.url in str(caught.value)
    assert "3 attempts" in str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_another_server_answers_for_one_that_fails(serve, proxy, remote, served_model, fault):
    server, batch = serve(), make_batch(num_rows=7)
    bad = proxy(server.url)
    bad.always = fault
    teacher = remote(
        [bad.url, server.url], timeout=0.5 if fault in SHORT else 20.0, max_in_flight=2, max_retry_wait=5.0
    )
    assert_true_scores(teacher(batch), batch, served_model)
    assert bad.seen


def test_a_server_that_stops_and_comes_back(serve, proxy, remote, served_model):
    server, batch = serve(), make_batch()
    between = proxy(server.url)
    teacher = remote(between.url, retries=60)
    assert_true_scores(teacher(batch), batch, served_model)
    between.stop()
    pending = teacher.submit(batch)
    time.sleep(0.3)
    between.start()
    assert_true_scores(pending.collect(torch.arange(5), batch), batch, served_model)


def test_a_server_that_is_gone(remote):
    with pytest.raises(TeacherScoreError, match=r"http://127.0.0.1:9: ConnectError.* \(4 attempts\)"):
        remote("http://127.0.0.1:9", retries=3)(make_batch())


def test_a_server_that_comes_back_with_another_model_is_not_asked(serve, proxy, remote):
    server = serve()
    between = proxy(server.url)
    teacher = remote(between.url, retries=4)
    teacher(make_batch())
    asked = len(server.asked)
    between.next(["drop"] * 4)  # one for each question under way
    server.max_model_len, server.model = 128, make_model()
    with pytest.raises(TeacherScoreError, match="serves another model than at the start"):
        teacher(make_batch())
    assert len(server.asked) == asked


def test_a_server_that_asks_to_wait_is_left_alone_for_so_long(serve, proxy, remote, served_model):
    between, batch = proxy(serve().url), make_batch()
    between.retry_after = "0.7"
    between.next(["429"])
    teacher = remote(between.url, max_in_flight=1)
    assert_true_scores(teacher(batch), batch, served_model)
    (first, what), (second, _) = between.seen[:2]
    assert what == "429" and second - first >= 0.7


def test_a_refused_question_is_not_asked_again(serve, remote):
    server, batch = serve(max_logprobs=5), make_batch(num_rows=3)
    with pytest.raises(TeacherScoreError, match=r"HTTP 400.*greater than max allowed: 5") as caught:
        remote(server.url)(batch)
    assert server.url in str(caught.value)
    assert len(server.asked) == 2  # one for each row


def test_a_failing_server_rests_longer_and_longer(serve, proxy, remote):
    between = proxy(serve().url)
    between.always = "500"
    teacher = remote(between.url, retries=4, retry_wait=0.05, max_retry_wait=0.4, max_in_flight=1)
    with pytest.raises(TeacherScoreError):
        teacher(make_batch(num_rows=3))
    times = [moment for moment, _ in between.seen][:5]
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert len(pauses) == 4
    for pause, expected in zip(pauses, (0.05, 0.1, 0.2, 0.4), strict=True):
        assert 0.5 * expected <= pause < expected + 0.15


def test_questions_that_fail_together_count_as_one_failure(serve, proxy, remote, served_model):
    between, batch = proxy(serve().url), make_batch(num_rows=17)
    between.next(["500"] * 16)
    started = time.perf_counter()
    assert_true_scores(remote(between.url, retry_wait=0.05, max_retry_wait=60.0)(batch), batch, served_model)
    assert time.perf_counter() - started < 5


def test_a_failure_takes_the_other_questions_back(serve, proxy, remote):
    server = serve(delay=0.2)
    between = proxy(server.url)
    between.next(["a web page"])
    teacher = remote(between.url, retries=0, max_in_flight=1)
    pending = teacher.submit(make_batch(num_rows=9))
    with pytest.raises(TeacherScoreError, match="not JSON"):
        pending.collect(torch.arange(9), make_batch(num_rows=9))
    time.sleep(0.5)
    assert len(server.asked) <= 1
    with pytest.raises(TeacherScoreError, match="taken back"):
        pending.collect(torch.arange(8, 7, -1) - 1, make_batch(num_rows=9))


def test_a_closed_teacher_can_be_used_again(serve, remote, served_model):
    teacher, batch = remote(serve().url), make_batch()
    for _ in range(2):
        assert_true_scores(teacher(batch), batch, served_model)
        teacher.close()


def test_closing_while_questions_are_under_way_leaves_nobody_waiting(serve, remote):
    teacher, batch = remote(serve(delay=1.0).url), make_batch()
    pending = teacher.submit(batch)
    time.sleep(0.1)
    teacher.close()
    with pytest.raises(TeacherScoreError, match="taken back"):
        pending.collect(torch.arange(5), batch)
