"""What a remote teacher asks, and that its scores are those of the model behind the server."""

import threading
import time

import pytest
import torch
from asking import assert_true_scores, make_batch, true_logprobs
from tiny import VOCAB_SIZE, make_tokenizer

from trl_opd.teachers import TeacherScoreError
from trl_opd.teachers.answers import check_answer
from trl_opd.teachers.remote import RemoteTeacher, client, servers
from trl_opd.teachers.remote import teacher as teacher_module

KINDS = ["vllm", "sglang"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("support", "size"), [("teacher_top_k", 7), ("teacher_top_k", 1), ("full", 7), ("sampled", 7)]
)
def test_scores_are_those_of_the_model(serve, remote, served_model, kind, support, size):
    server, batch = serve(kind=kind), make_batch(support=support, support_size=size)
    scores = remote(server.url)(batch)
    assert_true_scores(scores, batch, served_model)
    check_answer(scores, batch.completion_ids, batch.completion_mask, "remote", VOCAB_SIZE)


def test_more_entries_than_the_vocabulary_has_are_padded(serve, remote, served_model):
    server, batch = serve(max_logprobs=1000), make_batch(support_size=VOCAB_SIZE + 5)
    checked = remote(server.url)
    assert all(f.severity == "ok" for f in checked.check(tokenizer=make_tokenizer(), support_size=VOCAB_SIZE + 5))
    for teacher in (checked, remote(server.url, vocab_size=VOCAB_SIZE)):
        scores = teacher(batch)
        assert_true_scores(scores, batch, served_model)
        assert (scores.topk_ids[batch.completion_mask] < 0).sum(-1).eq(5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampled_token_is_an_entry_only_if_it_is_one_of_the_best(serve, remote, served_model, kind):
    batch = make_batch()
    best = true_logprobs(served_model, batch).argmax(-1)
    scores = remote(serve(kind=kind).url)(batch)
    among = (scores.topk_ids == batch.completion_ids[..., None]).any(-1)[batch.completion_mask]
    assert not among.all()
    assert (scores.topk_ids[batch.completion_mask] == best[batch.completion_mask][:, None]).any(-1).all()
    # And one that is the best itself
    batch.completion_ids[0, 0] = batch.input_ids[0, 6] = best[0, 0]
    assert_true_scores(remote(serve(kind=kind).url)(batch), batch, served_model)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_needed_is_asked(serve, remote, kind):
    server, batch = serve(kind=kind), make_batch(num_rows=4)
    batch.completion_mask[2, 4:] = False
    remote(server.url, max_in_flight=1)(batch)  # one after the other: of several at a time any may arrive first
    asked = [body["prompt" if kind == "vllm" else "input_ids"] for body in server.asked]
    # The last row has nothing to score, the third nothing behind its fourth token; the longest row is asked first
    assert sorted(map(len, asked)) == sorted([6 + 12, 3 + 12, 6 + 4])
    assert asked[0] == batch.input_ids[0].tolist()
    if kind == "vllm":
        assert all(body["max_tokens"] == 1 and body["prompt_logprobs"] == 7 for body in server.asked)
    else:
        assert all(body["sampling_params"]["max_new_tokens"] == 0 for body in server.asked)
        assert all("token_ids_logprob" not in body for body in server.asked)


def test_a_batch_without_a_token_to_score_asks_nobody(remote):
    batch = make_batch()
    batch.completion_mask[:] = False
    scores = remote("http://127.0.0.1:9")(batch)
    check_answer(scores, batch.completion_ids, batch.completion_mask, "remote", VOCAB_SIZE)


@pytest.mark.parametrize("most", [1 << 18, 60])
def test_entries_that_the_student_chose(serve, remote, served_model, monkeypatch, most):
    monkeypatch.setattr(teacher_module, "_MOST_SCORES", most)
    batch = make_batch(support="student_top_k", support_size=5)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(*batch.completion_ids.shape, VOCAB_SIZE, generator=generator).topk(5).indices
    chosen[1, 2, 3:] = -1
    batch.requested_ids = chosen
    server = serve(kind="sglang")
    scores = remote(server.url)(batch)
    mask = batch.completion_mask
    assert torch.equal(scores.topk_ids[mask], chosen[mask])
    truth = true_logprobs(served_model, batch).gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, -torch.inf)
    torch.testing.assert_close(scores.topk_logprobs[mask], truth[mask], rtol=0, atol=1e-5)
    sampled = true_logprobs(served_model, batch).gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    torch.testing.assert_close(scores.sampled_logprobs[mask], sampled[mask], rtol=0, atol=1e-5)
    sizes = [
        len(b["token_ids_logprob"]) * (len(b["input_ids"]) - b["logprob_start_len"] - 1)
        for b in server.asked
        if "token_ids_logprob" in b
    ]
    assert max(sizes) <= most and (len(sizes) > 5) == (most == 60)


def test_vllm_says_that_it_cannot_score_them(serve, remote):
    batch = make_batch(support="student_top_k", support_size=2)
    batch.requested_ids = batch.completion_ids[..., None].expand(-1, -1, 2)
    server = serve()
    with pytest.raises(TeacherScoreError, match=r"vLLM cannot score entries that the student chose.*SGLang"):
        remote(server.url)(batch)
    assert not server.asked


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"support": "union_top_k"}, "support must be 'teacher_top_k'"),
        ({"model_inputs": {"pixel_values": torch.zeros(1)}}, "token ids alone"),
    ],
)
def test_questions_that_no_server_can_answer(remote, fields, match):
    with pytest.raises(ValueError, match=match):
        remote("http://127.0.0.1:9")(make_batch(**fields))


def test_an_empty_prompt_is_refused(remote):
    batch = make_batch()
    batch.attention_mask[1, :6] = 0
    with pytest.raises(ValueError, match="prompt of batch row 1 must have a token"):
        remote("http://127.0.0.1:9")(batch)


def test_rows_are_collected_in_any_order_and_again(serve, remote, served_model):
    batch = make_batch()
    pending = remote(serve().url).submit(batch)
    for rows in ([4, 0], [3, 1, 2], [0]):
        rows = torch.tensor(rows)
        assert_true_scores(pending.collect(rows, batch.select(rows)), batch.select(rows), served_model)


def test_submit_does_not_wait(serve, remote, served_model):
    server, batch = serve(delay=0.5), make_batch()
    teacher = remote(server.url)
    started = time.perf_counter()
    pending = teacher.submit(batch)
    assert time.perf_counter() - started < 0.3
    while len(server.asked) < 4:  # they are on their way before anybody collects
        time.sleep(0.01)
    assert_true_scores(pending.collect(torch.arange(5), batch), batch, served_model)


@pytest.mark.parametrize(
    ("limits", "least", "most"), [({"max_in_flight": 2}, 2, 2), ({"max_batch_tokens": 40}, 2, 2), ({}, 3, 8)]
)
def test_requests_under_way_are_bounded(serve, remote, limits, least, most):
    server = serve(delay=0.1)
    batch = make_batch(num_rows=9)
    batch.attention_mask[:] = 1
    batch.completion_mask[:-1] = True
    remote(server.url, **limits)(batch)
    assert len(server.asked) == 8
    assert least <= server.most_under_way <= most


def test_a_question_above_the_token_limit_is_asked_alone(serve, remote, served_model):
    server, batch = serve(delay=0.05), make_batch()
    assert_true_scores(remote(server.url, max_batch_tokens=1)(batch), batch, served_model)
    assert server.most_under_way == 1


def test_connections_are_kept(serve, remote):
    server, batch = serve(), make_batch()
    teacher = remote(server.url, max_in_flight=2)
    for _ in range(4):
        teacher(batch)
    assert len(server.asked) == 16
    assert len(server.connections) <= 3


def test_several_servers_share_the_work(serve, remote, served_model):
    servers = [serve(delay=0.05) for _ in range(3)]
    batch = make_batch(num_rows=13)
    assert_true_scores(remote([s.url for s in servers], max_in_flight=1)(batch), batch, served_model)
    assert sum(len(s.asked) for s in servers) == 12
    assert all(len(s.asked) >= 3 for s in servers)


def test_the_thread_ends_with_the_teacher(serve):
    teacher = RemoteTeacher(serve().url)
    teacher(make_batch())
    threads = [thread for thread in threading.enumerate() if thread.name == "trl-opd-remote-teacher"]
    assert threads
    del teacher
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_the_http_library_is_loaded_when_it_is_used():
    assert not [module for module in (client, servers, teacher_module) if hasattr(module, "httpx2")]
