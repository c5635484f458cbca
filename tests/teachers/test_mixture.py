"""MixtureTeacher: who is asked, what is made of the answers, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from tiny import make_model

from trl_opd.collators import MixedScores, TeacherBatch, TeacherScores
from trl_opd.kernels.projection import Head
from trl_opd.teachers import LocalTeacher, MixtureTeacher, RoutedTeacher, TeacherScoreError
from trl_opd.teachers.base import ask, collect, submit

B, T, H, V, K = 3, 4, 5, 11, 2


def make_batch(support: str = "full") -> TeacherBatch:
    ids = torch.arange(B * (T + 2)).view(B, T + 2) % V
    ones = torch.ones_like(ids)
    return TeacherBatch(
        input_ids=ids,
        attention_mask=ones,
        position_ids=ones.cumsum(-1) - 1,
        completion_ids=ids[:, 2:],
        completion_mask=ones[:, 2:].bool(),
        support=support,
    )


class Stub:
    """A teacher that answers with what it was given, for as many sequences as it is asked about."""

    def __init__(self, scores, name="stub", **attributes):
        self.scores, self.name, self.asked, self.prepared = scores, name, 0, 0
        for key, value in attributes.items():
            setattr(self, key, value)

    def prepare(self, trainer):
        self.prepared += 1

    def __call__(self, batch):
        self.asked += 1
        return self.scores.select(torch.arange(len(batch.completion_ids)))


class EarlyStub(Stub):
    """One that answers at generation time, as a server does."""

    asynchronous = True

    def submit(self, batch):
        self.asked += 1
        return SimpleNamespace(collect=lambda rows, batch: self.scores.select(rows))


def sampled(seed: int) -> TeacherScores:
    generator = torch.Generator().manual_seed(seed)
    return TeacherScores(sampled_logprobs=-torch.rand(B, T, generator=generator) * 5 - 0.1)


def top_k(seed: int) -> TeacherScores:
    generator = torch.Generator().manual_seed(seed)
    values, ids = torch.randn(B, T, V, generator=generator).log_softmax(-1).topk(K)
    return TeacherScores(topk_ids=ids, topk_logprobs=values, sampled_logprobs=sampled(seed).sampled_logprobs)


def hidden(seed: int) -> TeacherScores:
    generator = torch.Generator().manual_seed(seed)
    head = Head(torch.randn(V, H, generator=generator))
    return TeacherScores(hidden_states=torch.randn(B, T, H, generator=generator), head=head)


def trainer(credit: str = "direct", discount: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(args=SimpleNamespace(credit=credit, discount=discount))


@pytest.mark.parametrize("mixture", ["arithmetic", "geometric", "loss_sum"])
def test_sampled_tokens(mixture):
    members = [Stub(sampled(i)) for i in range(3)]
    teacher = MixtureTeacher(members, [0.2, 0.5, 0.3], mixture)
    teacher.prepare(trainer("policy_gradient"))
    answer = ask(teacher, make_batch("sampled"))
    probs = torch.stack([m.scores.sampled_logprobs.double().exp() for m in members])
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)[:, None, None]
    expected = (weights * probs).sum(0) if mixture == "arithmetic" else (probs**weights).prod(0)
    torch.testing.assert_close(answer.sampled_logprobs.double(), expected.log(), rtol=1e-6, atol=1e-6)
    assert answer.topk_ids is None and answer.hidden_states is None


@pytest.mark.parametrize("mixture", ["arithmetic", "geometric", "loss_sum"])
def test_equal_teachers_are_one(mixture):
    scores = sampled(0)
    teacher = MixtureTeacher([Stub(scores), Stub(scores)], mixture=mixture)
    assert torch.equal(ask(teacher, make_batch("sampled")).sampled_logprobs, scores.sampled_logprobs)


@pytest.mark.parametrize("mixture", ["arithmetic", "geometric", "loss_sum"])
def test_an_impossible_token_and_a_broken_score_are_not_hidden(mixture):
    bad = sampled(1)
    bad.sampled_logprobs[0, 0], bad.sampled_logprobs[0, 1] = -torch.inf, torch.nan
    good = sampled(0)
    mixed = MixtureTeacher([Stub(good), Stub(bad)], mixture=mixture)(make_batch("sampled")).sampled_logprobs
    assert mixed[0, 1].isnan()
    if mixture == "arithmetic":
        torch.testing.assert_close(mixed[0, 0].exp(), good.sampled_logprobs[0, 0].exp() / 2)
    else:
        assert mixed[0, 0] == -torch.inf
    assert torch.isfinite(mixed[1:]).all()


@pytest.mark.parametrize("mixture", ["arithmetic", "geometric", "loss_sum"])
def test_hidden_states_are_left_to_the_loss(mixture):
    members = [Stub(hidden(i), scores_in_loss=True) for i in range(2)]
    teacher = MixtureTeacher(members, [0.25, 0.75], mixture)
    assert teacher.scores_in_loss and submit(teacher, make_batch()) is None
    answer = ask(teacher, make_batch())
    assert isinstance(answer, MixedScores)
    assert (answer.mixture, answer.weights) == (mixture, [0.25, 0.75])
    for got, member in zip(answer.members, members, strict=True):
        assert torch.equal(got.hidden_states, member.scores.hidden_states) and got.head is member.scores.head


def test_lists_are_mixed_as_a_sum_of_losses_only():
    members = [Stub(top_k(0)), Stub(top_k(1), name="second")]
    answer = ask(MixtureTeacher(members, mixture="loss_sum"), make_batch())
    assert isinstance(answer, MixedScores) and answer.weights == [0.5, 0.5]
    assert torch.equal(answer.members[1].topk_logprobs, members[1].scores.topk_logprobs)
    for mixture in ("arithmetic", "geometric"):
        with pytest.raises(TeacherScoreError, match=r"second.*hidden_states.*loss_sum"):
            ask(MixtureTeacher(members, mixture=mixture), make_batch())


def test_lists_that_come_with_sampled_tokens_serve_the_policy_gradient():
    members = [Stub(top_k(0)), Stub(top_k(1))]
    teacher = MixtureTeacher(members, mixture="arithmetic")
    teacher.prepare(trainer("policy_gradient"))
    assert ask(teacher, make_batch()).sampled_logprobs is not None


def test_hidden_states_beside_a_list_are_a_sum_of_losses():
    members = [Stub(hidden(0), scores_in_loss=True), Stub(top_k(1), name="list")]
    answer = ask(MixtureTeacher(members, mixture="loss_sum"), make_batch())
    assert answer.members[0].hidden_states is not None and answer.members[1].topk_ids is not None
    with pytest.raises(TeacherScoreError, match=r"\['list'\].*hidden_states"):
        ask(MixtureTeacher(members), make_batch())


def test_answers_that_do_not_fit_each_other_are_refused():
    members = [Stub(hidden(0), scores_in_loss=True), Stub(sampled(1), name="tokens")]
    with pytest.raises(TeacherScoreError, match=r"\['tokens'\].*hidden_states or topk_ids"):
        ask(MixtureTeacher(members, mixture="loss_sum"), make_batch())
    teacher = MixtureTeacher(members, mixture="loss_sum")
    teacher.prepare(trainer("policy_gradient"))
    with pytest.raises(TeacherScoreError, match=r"\['stub'\].*sampled_logprobs"):
        ask(teacher, make_batch())


def test_members_that_answer_at_generation_time_are_asked_once_and_the_others_in_the_loss():
    early, late = EarlyStub(top_k(0)), Stub(hidden(1), scores_in_loss=True)
    teacher = MixtureTeacher([early, late], mixture="loss_sum")
    assert teacher.scores_in_loss and teacher.asynchronous
    pending = submit(teacher, make_batch())
    assert (early.asked, late.asked) == (1, 0)
    rows = torch.tensor([2, 0])
    batch = make_batch().select(rows)
    for _ in range(2):
        answer = collect(teacher, pending, rows, batch)
        assert torch.equal(answer.members[0].topk_logprobs, early.scores.topk_logprobs[rows])
    assert (early.asked, late.asked) == (1, 2)


def test_members_that_only_answer_calls_are_asked_with_the_generation_batch():
    members = [Stub(sampled(i)) for i in range(2)]
    teacher = MixtureTeacher(members, mixture="geometric")
    assert not teacher.scores_in_loss and not teacher.asynchronous
    pending = submit(teacher, make_batch("sampled"))
    rows = torch.tensor([1])
    answer = collect(teacher, pending, rows, make_batch("sampled").select(rows))
    expected = sum(m.scores.sampled_logprobs for m in members)[rows] / 2
    torch.testing.assert_close(answer.sampled_logprobs, expected)
    assert [m.asked for m in members] == [1, 1]


def test_a_teacher_given_twice_exists_once():
    shared, other = Stub(sampled(0)), Stub(sampled(1))
    teacher = MixtureTeacher([shared, other, shared], [0.2, 0.3, 0.5])
    assert teacher.members == [shared, other] and teacher.weights == pytest.approx([0.7, 0.3])
    teacher.prepare(trainer())
    ask(teacher, make_batch())
    assert (shared.asked, shared.prepared) == (1, 1)


def test_members_are_what_teacher_model_accepts():
    init_kwargs = {"dtype": "float32"}  # of those that are loaded here
    teacher = MixtureTeacher(["some/path", "some/path", "other"], init_kwargs=init_kwargs, trust_remote_code=True)
    assert [m.init_kwargs["trust_remote_code"] for m in teacher.members] == [True] * 2
    model = make_model()
    assert MixtureTeacher(["some/path", model], init_kwargs=init_kwargs).members[1].model is model
    assert [type(m) for m in teacher.members] == [LocalTeacher] * 2
    assert [m.init_kwargs["dtype"] for m in teacher.members] == ["float32"] * 2
    assert teacher.weights == pytest.approx([2 / 3, 1 / 3])


def test_limits_are_those_of_the_most_limited_member():
    members = [Stub(None, max_length=9, vocab_size=V), Stub(None), Stub(None, max_length=7, changes=True)]
    teacher = MixtureTeacher(members)
    assert (teacher.max_length, teacher.vocab_size, teacher.changes) == (7, V, True)
    assert MixtureTeacher([Stub(None)]).max_length is None and not MixtureTeacher([Stub(None)]).changes


def test_it_is_asynchronous_if_nobody_who_is_asked_early_keeps_it_waiting():
    early, waiting, late = EarlyStub(top_k(0)), Stub(top_k(1)), Stub(hidden(2), scores_in_loss=True)
    for members, expected in (
        ([early], True),
        ([late, early], True),
        ([early, waiting], False),
        ([waiting, late], False),
        ([late], False),
    ):
        assert MixtureTeacher(members, mixture="loss_sum").asynchronous is expected


def test_entries_that_the_student_chooses_are_wanted_if_one_member_wants_them():
    members = [Stub(None), Stub(None, takes_requested_ids=True)]
    assert MixtureTeacher(members).takes_requested_ids
    assert not MixtureTeacher(members[:1]).takes_requested_ids


def test_who_asks_for_sampled_tokens_gets_no_lists():
    answer = ask(MixtureTeacher([Stub(top_k(0)), Stub(top_k(1))], mixture="geometric"), make_batch("sampled"))
    assert isinstance(answer, TeacherScores) and answer.topk_ids is None


@pytest.mark.parametrize(("given", "mixed"), [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")])
def test_sampled_tokens_keep_their_precision(given, mixed):
    scores = TeacherScores(sampled_logprobs=sampled(0).sampled_logprobs.to(getattr(torch, given)))
    answer = MixtureTeacher([Stub(scores), Stub(scores)])(make_batch("sampled"))
    assert answer.sampled_logprobs.dtype == getattr(torch, mixed)


def test_a_mixture_of_one_is_that_one():
    answer = ask(MixtureTeacher([Stub(top_k(0))], mixture="geometric"), make_batch())
    assert isinstance(answer, TeacherScores) and answer.topk_ids is not None


def test_a_geometric_mixture_of_sampled_tokens_has_no_exact_discounted_advantage():
    members = [Stub(sampled(0)), Stub(sampled(1))]
    with pytest.raises(ValueError, match="discount must be 0"):
        MixtureTeacher(members, mixture="geometric").prepare(trainer("policy_gradient", 0.5))
    for mixture, credit, discount in (
        ("geometric", "policy_gradient", 0.0),
        ("geometric", "direct", 0.5),
        ("loss_sum", "policy_gradient", 0.5),
        ("arithmetic", "policy_gradient", 0.5),
    ):
        MixtureTeacher(members, mixture=mixture).prepare(trainer(credit, discount))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"teachers": []}, "at least one teacher"),
        ({"teachers": "a/path"}, "at least one teacher"),
        ({"mixture": "geometrical"}, "Did you mean 'geometric'"),
        ({"weights": [1.0]}, "2 numbers above 0"),
        ({"weights": [0.5, 0.6]}, "sum to 1"),
        ({"weights": [1.0, 0.0]}, "above 0"),
        ({"weights": [1.5, -0.5]}, "above 0"),
        ({"weights": [float("nan"), 0.5]}, "above 0"),
    ],
)
def test_bad_arguments(told, message):
    with pytest.raises(ValueError, match=message):
        MixtureTeacher(**{"teachers": [Stub(None), Stub(None)]} | told)


def test_several_teachers_are_no_member():
    for several in (RoutedTeacher({"a": Stub(None)}), MixtureTeacher([Stub(None)])):
        with pytest.raises(ValueError, match="must be one teacher"):
            MixtureTeacher([several, Stub(None)])
    with pytest.raises(TeacherScoreError, match="MixedScores"):
        ask(MixtureTeacher([Stub(MixedScores([hidden(0)], [1.0], "loss_sum")), Stub(hidden(1))]), make_batch())
