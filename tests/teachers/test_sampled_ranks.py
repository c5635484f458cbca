"""Ranks of the sampled tokens that a server gives beside their log-probs, and what becomes of them."""

import json

import pytest
import torch
from asking import assert_true_scores, make_batch, true_logprobs
from stub_server import StubServer
from test_cache_recording import Counting, build
from tiny import VOCAB_SIZE, make_tokenizer

from trl_opd.collators import MixedScores, RoutedScores, TeacherScores
from trl_opd.student import sampled_ranks
from trl_opd.teachers import MixtureTeacher, RecordingTeacher, RoutedTeacher, TeacherScoreError
from trl_opd.teachers.answers import check_answer
from trl_opd.teachers.base import collect, submit


def true_ranks(model, batch):
    truth = true_logprobs(model, batch)
    own = truth.gather(-1, batch.completion_ids[..., None])
    return ((truth > own).sum(-1) + 1).float()


@pytest.mark.parametrize(("support", "size"), [("teacher_top_k", 7), ("teacher_top_k", 1), ("sampled", 7)])
def test_vllm_gives_the_ranks_of_the_model(serve, remote, served_model, support, size):
    batch = make_batch(support=support, support_size=size)
    scores = remote(serve().url)(batch)
    check_answer(scores, batch.completion_ids, batch.completion_mask, "remote", VOCAB_SIZE)
    mask, expected = batch.completion_mask, true_ranks(served_model, batch)
    assert scores.sampled_ranks.dtype == torch.float32 and len(set(expected[mask].tolist())) > 5
    assert torch.equal(scores.sampled_ranks, expected.masked_fill(~mask, 0.0))
    assert sampled_ranks(scores, mask.shape) is scores.sampled_ranks
    assert_true_scores(scores, batch, served_model)


def test_they_come_with_the_rows_of_a_micro_batch(serve, remote, served_model):
    batch = make_batch()
    teacher, rows = remote(serve().url), torch.tensor([3, 0])
    part = batch.select(rows)
    scores = collect(teacher, submit(teacher, batch), rows, part)
    expected = true_ranks(served_model, batch)[rows].masked_fill(~part.completion_mask, 0.0)
    assert torch.equal(scores.sampled_ranks, expected) and expected.any(-1).all()
    assert torch.equal(scores.select(torch.tensor([1])).sampled_ranks, expected[1:])


def test_sglang_gives_none(serve, remote):
    assert remote(serve(kind="sglang").url)(make_batch()).sampled_ranks is None


class OtherRanks(StubServer):
    """Of every second token the rank is what `given` says, and the best one's always."""

    given = None

    def answer(self, method, path, body):
        status, answer = super().answer(method, path, body)
        if path == "/v1/completions":
            answer = json.loads(json.dumps(answer))
            for i, entries in enumerate(answer["choices"][0]["prompt_logprobs"][1:]):
                for entry in entries.values():
                    if (i % 2 or self.given == "none") and entry["rank"] > body["prompt_logprobs"]:
                        entry.pop("rank") if self.given in ("missing", "none") else entry.update(rank=self.given)
                    elif self.given == "none":
                        entry.pop("rank")
        return status, answer


@pytest.mark.parametrize("support", ["teacher_top_k", "sampled"])
@pytest.mark.parametrize("given", [None, "missing", "none", 0, -3, "many", 2.5, 10**30, [1]])
def test_what_is_no_rank_is_unknown_and_costs_no_score(served_model, closing, remote, given, support):
    server = closing(OtherRanks(served_model, make_tokenizer()))
    server.given = given
    batch = make_batch(support=support)
    scores = remote(server.url)(batch)
    assert_true_scores(scores, batch, served_model)
    if given == "none":
        assert scores.sampled_ranks is None
        return
    ranks, expected = scores.sampled_ranks[batch.completion_mask], true_ranks(served_model, batch)
    unknown = ranks == 0
    assert unknown.any() and torch.equal(ranks[~unknown], expected[batch.completion_mask][~unknown])


SHAPE = torch.Size((4, 3))
RANKS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
LOGPROBS = torch.full((2, 3), -1.0)


def test_ranks_under_several_teachers():
    ranked, bare = TeacherScores(sampled_logprobs=LOGPROBS, sampled_ranks=RANKS), TeacherScores(LOGPROBS)
    first, second = torch.tensor([2, 0]), torch.tensor([1, 3])
    whole = sampled_ranks(RoutedScores({"a": (first, ranked), "b": (second, bare)}), SHAPE)
    assert whole.tolist() == [[4.0, 5.0, 0.0], [0.0] * 3, [1.0, 2.0, 3.0], [0.0] * 3]
    mixed = MixedScores([ranked, ranked], [0.5, 0.5], "loss_sum")
    both = RoutedScores({"a": (first, mixed), "b": (second, ranked)})
    assert sampled_ranks(both, SHAPE)[second].tolist() == RANKS.tolist()
    for none in (bare, mixed, RoutedScores({"a": (first, bare)}), RoutedScores({})):
        assert sampled_ranks(none, SHAPE) is None


def test_a_routed_teacher_hands_them_on_and_a_mixture_has_none(serve, remote, served_model):
    batch = make_batch(num_rows=4, support="sampled", teacher_index=torch.tensor([0, 1, 0, 1]))
    teachers = [remote(serve().url), remote(serve(kind="sglang").url)]
    routed = RoutedTeacher(dict(zip(("a", "b"), teachers, strict=True)))
    routed._prepared |= {id(teacher) for teacher in teachers}  # there is no run
    scores = collect(routed, None, torch.arange(4), batch)
    ranks = sampled_ranks(scores, batch.completion_ids.shape)
    expected = true_ranks(served_model, batch) * batch.completion_mask
    assert torch.equal(ranks[[0, 2]], expected[[0, 2]]) and (ranks[[1, 3]] == 0).all()
    mixture = MixtureTeacher(teachers)
    assert sampled_ranks(mixture(batch), batch.completion_ids.shape) is None


def test_the_check_takes_what_cannot_be_a_rank_for_unknown():
    ids, mask = torch.zeros(2, 3).long(), torch.tensor([[True, True, False], [True, True, True]])
    ranks = torch.tensor([[1.0, torch.nan, 7.0], [-2.0, 0.5, 9.0]])
    scores = TeacherScores(sampled_logprobs=LOGPROBS.clone(), sampled_ranks=ranks)
    check_answer(scores, ids, mask, "a teacher")
    assert scores.sampled_ranks.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 9.0]]
    whole = TeacherScores(sampled_logprobs=LOGPROBS.clone(), sampled_ranks=torch.ones(2, 3).long())
    check_answer(whole, ids, mask, "a teacher")
    assert whole.sampled_ranks.dtype == torch.float32 and int(whole.sampled_ranks.sum()) == 5
    with pytest.raises(TeacherScoreError, match=r"sampled_ranks of shape \(2, 2\) for completions of shape \(2, 3\)"):
        check_answer(TeacherScores(sampled_logprobs=LOGPROBS, sampled_ranks=ranks[:, :2]), ids, mask, "a teacher")


class Ranked(Counting):
    def __call__(self, batch):
        scores = super().__call__(batch)
        scores.sampled_ranks = torch.ones_like(scores.sampled_logprobs)
        return scores


def test_an_answer_is_the_same_recorded_and_replayed(tmp_path):
    """A cache has no place for ranks: what was recorded in this run has none either."""
    teacher = RecordingTeacher(Ranked(), tmp_path / "cache")
    trainer = build(tmp_path / "run", teacher, max_steps=1)
    seen = []
    answer = trainer._teacher_side.answer
    trainer._teacher_side.answer = lambda *args: seen.append(answer(*args)) or seen[-1]
    trainer.train()
    assert seen and all(scores.sampled_ranks is None and scores.sampled_logprobs is not None for scores in seen)
