"""What diagnostics look at: the overlap-token advantage and the target's rank, of both backends, by enumeration."""

import math

import mixture_cases as several
import pytest
import torch
from backends import BACKENDS, FP32, FP64, SINGLE, TRITON, V, ask, assert_values, one_row, pair, rows_of
from textbook import overlap_advantage
from torch import Tensor

from trl_opd.kernels import torch_backend

RANK = {"statistics": {"teacher_rank": None}}
KINDS = pytest.mark.parametrize("listed", [False, True], ids=["dense", "list"])


def random_logits(rows: int = 6, size: int = V) -> list[Tensor]:
    """A student's and a teacher's, exact in float32."""
    generator = torch.Generator().manual_seed(size)
    return [(torch.randn(rows, size, generator=generator) * 2).double() for _ in range(2)]


def top_k_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A teacher's list in no order, with padding; as servers answer, without entries that have no probability."""
    values, ids = logits.log_softmax(-1).topk(min(k, logits.shape[1]))
    order = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(k))
    ids = ids.masked_fill(values == -math.inf, -1)
    padding = ids.new_full((len(ids), 2), -1)
    return torch.cat([ids[:, order], padding], -1), torch.cat([values[:, order], padding * 0.0], -1)


def advantage(backend, dtype, student, teacher, k, listed=False) -> Tensor:
    """Of rows of these logits; of a single one they may be infinite."""
    sides = one_row(student[0], teacher[0]) if len(student) == 1 else rows_of(student, teacher)
    topk = {"teacher_topk": top_k_of(teacher, k)} if listed else {}
    return ask(backend, dtype, sides[0], None if listed else sides[1], overlap_top_k=k, **topk).overlap_advantage


@KINDS
@pytest.mark.parametrize(("size", "k"), [(V, 1), (V, 2), (V, 7), (V, 17), (V, V), (V, 60), (5, 16), (1, 3)])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_the_advantage_is_that_of_the_enumerated_common_entries(backend, dtype, size, k, listed):
    student, teacher = random_logits(size=size)
    expected = overlap_advantage(student.softmax(-1), teacher.softmax(-1), k)
    ours = advantage(backend, dtype, student, teacher, k, listed)
    assert_values(ours, expected, dtype)
    assert (ours <= 0).all() and (min(k, size) < 5 or (ours < 0).any())


@KINDS
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_it_is_0_without_a_common_entry_with_one_and_where_the_two_agree(backend, dtype, listed):
    student, teacher = torch.zeros(3, V).double(), torch.zeros(3, V).double()
    student[:, :3] = torch.tensor([5.0, 4.0, 3.0]).double()
    teacher[0, 20:23] = torch.tensor([3.0, 4.0, 5.0]).double()
    teacher[1, 2:5] = torch.tensor([3.0, 4.0, 5.0]).double()
    teacher[2] = student[2] + 1.0
    ours = advantage(backend, dtype, student, teacher, 3, listed)
    assert ours[:2].tolist() == [0.0, 0.0] and float(ours[2]) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_ties_for_the_last_place(backend, dtype):
    student, teacher = (x[:1].clone() for x in random_logits())
    order = student[0].argsort(descending=True)
    student[0, order[4]] = student[0, order[3]]
    teacher[0, order[:5]] += 9.0
    s, t = student.softmax(-1), teacher.softmax(-1)
    expected = overlap_advantage(s, t, 4)
    assert not torch.allclose(expected, overlap_advantage(s, t, 3))
    assert_values(advantage(backend, dtype, student, teacher, 4), expected, dtype)
    # Of a teacher's that tie, PyTorch takes as many as fit
    possible = [overlap_advantage(t, s, 4)]
    if backend == "torch":
        possible = [overlap_advantage(t, s.index_fill(1, lost, 0.0), 4) for lost in order[3:5]]
    ours = advantage(backend, dtype, teacher, student, 4)
    assert any(torch.allclose(ours, x, rtol=1e-5, atol=1e-7) for x in possible)


@KINDS
@pytest.mark.parametrize("k", [8, V])
@pytest.mark.parametrize("common", [3, 0])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_entries_without_probability_are_not_common(backend, dtype, common, k, listed):
    """Where a model has fewer entries than the top k, what fills it up would make the value infinite."""
    student, teacher = (x[:1].clone() for x in random_logits())
    student[0, 5:], teacher[0, common:] = -math.inf, -math.inf
    teacher[0, 20:24] = 1.0
    expected = overlap_advantage(student.softmax(-1), teacher.softmax(-1), k)
    assert (expected < 0) == (common > 0)
    assert_values(advantage(backend, dtype, student, teacher, k, listed), expected, dtype)


@KINDS
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_common_entries_of_probabilities_that_underflow(backend, dtype, listed):
    """The likeliest entries of each model, of almost all its mass, are not the other's."""
    student, teacher = random_logits(rows=2)
    student[:, 3], teacher[:, 30] = 400.0, 500.0
    student[:, 30], teacher[:, 3] = -50.0, -60.0
    small = [x.index_fill(1, torch.tensor([3, 30]), -math.inf) for x in (student, teacher)]
    expected = overlap_advantage(*(x.softmax(-1) for x in small), 19)
    assert (expected < -0.01).all()
    bound = 1e-10 if dtype == FP64 else 1e-5 if backend == "triton" and not listed else 1e-3
    ours = advantage(backend, dtype, student, teacher, 20, listed)
    torch.testing.assert_close(ours, expected, rtol=bound, atol=0)  # log-probs of -500 have four digits


@pytest.mark.parametrize("scale", [1e-1, 1e-3])
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_of_models_that_almost_agree_it_keeps_its_digits(backend, dtype, scale):
    student, noise = random_logits()
    student, noise = student.mul(4096).round() / 4096, noise.mul(4096 * scale).round() / 4096
    expected = overlap_advantage(student.softmax(-1), (student + noise).softmax(-1), 12)
    assert (expected < 0).all()
    # PyTorch's log-probs are rounded; in the kernel the logits' differences stay exact
    bound = 2e-4 if backend == "triton" else 2e-7 / scale
    torch.testing.assert_close(advantage(backend, dtype, student, student + noise, 12), expected, rtol=bound, atol=0)


def test_it_is_found_out_only_if_it_is_asked_for():
    sides = pair()
    assert ask("torch", FP32, *sides).overlap_advantage is None
    answer = ask("torch", FP32, *sides, overlap_top_k=4, mask=torch.tensor([True, False, True]))
    assert answer.overlap_advantage[1] == 0 and not answer.out.overlap_advantage.requires_grad


@KINDS
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_rows_find_their_own_in_every_block_and_chunk(backend, dtype, listed, monkeypatch):
    monkeypatch.setattr(torch_backend, "_CPU_BLOCK_BYTES", 2 * V * 4)
    student, teacher = random_logits(rows=11)
    sides = rows_of(student, teacher)
    topk = {"teacher_topk": top_k_of(teacher, 12)} if listed else {}
    told = topk | RANK | {"target_ids": torch.arange(11) * 3, "mask": torch.arange(11) != 6, "overlap_top_k": 12}
    five_rows = 5 * (1 if listed else 2) * V * 4
    answer = ask(backend, dtype, sides[0], None if listed else sides[1], chunk_bytes=five_rows, **told)
    whole = ask(backend, dtype, sides[0], None if listed else sides[1], **told)
    expected = overlap_advantage(student.softmax(-1), teacher.softmax(-1), 12)
    assert_values(answer.overlap_advantage, torch.where(told["mask"], expected, 0.0), dtype)
    assert torch.equal(answer.overlap, whole.overlap)
    assert torch.equal(answer.out.further["teacher_rank"], whole.out.further["teacher_rank"])


def ranks_of(teacher: Tensor, targets: Tensor) -> list[float]:
    rows = zip(teacher.tolist(), targets.tolist(), strict=True)
    return [1.0 + sum(x > row[y] for x in row) for row, y in rows]


TARGETS = torch.tensor([0, 36, 15, 16, 5, 20])


@pytest.mark.parametrize("told", [{}, {"support": "union_top_k", "support_size": 4}], ids=["full", "support"])
@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_the_rank_of_the_target_under_a_dense_teacher(backend, dtype, per_token_grad, told):
    student, teacher = random_logits()
    teacher[1, TARGETS[1]] = 90.0
    teacher[2, [3, 20, 30]] = float(teacher[2, TARGETS[2]])  # ties share the best rank
    teacher[3] = 0.0
    told = told | RANK | {"target_ids": TARGETS, "overlap_top_k": 3, "per_token_grad": per_token_grad}
    ranks = ask(backend, dtype, *rows_of(student, teacher), **told).out.further["teacher_rank"]
    expected = ranks_of(teacher, TARGETS)
    assert ranks.tolist() == expected and expected[1] == expected[3] == 1 and max(expected) > 16


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_asking_for_the_rank_changes_nothing_else(backend, dtype):
    sides = pair(dtype=dtype)
    answers = [ask(backend, dtype, *sides, target_ids=TARGETS[:3], **told) for told in ({}, RANK)]
    assert answers[0].out.further == {} and [*answers[1].out.further] == ["teacher_rank"]
    assert torch.equal(answers[0].loss, answers[1].loss)
    assert all(torch.equal(a, b) for a, b in zip(answers[0].gradients, answers[1].gradients, strict=True))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_the_rank_of_the_target_in_a_list(backend, dtype):
    student, teacher = random_logits()
    ids, logprobs = top_k_of(teacher, 6)
    ids[4] = -1  # a row about which nothing is known
    targets = TARGETS.clone()
    targets[:2] = teacher[:2].topk(6).indices[:, 3]
    told = RANK | {"target_ids": targets, "teacher_topk": (ids, logprobs)}
    ranks = ask(backend, dtype, rows_of(student, teacher)[0], None, **told).out.further["teacher_rank"]
    expected = [min(rank, 7.0) for rank in ranks_of(teacher, targets)]
    expected[4] = 0.0
    assert ranks.tolist() == expected and expected[:2] == [4.0, 4.0] and 7.0 in expected


@pytest.mark.parametrize("mixture", several.MIXTURES)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_the_rank_under_several_teachers(backend, dtype, mixture):
    student, teachers = several.make_teachers()
    out, _ = several.ask(
        student, teachers, mixture, dtype=dtype, backend=backend, target_ids=several.TARGETS,
        mixture_weights=several.WEIGHTS, **RANK,
    )  # fmt: skip
    probs = several.probs_of(teachers)
    if mixture == "loss_sum":
        parts = [(w, torch.tensor(ranks_of(p, several.TARGETS))) for w, p in zip(several.WEIGHTS, probs, strict=True)]
        expected = sum(w * ranks for w, ranks in parts)
    else:
        expected = torch.tensor(ranks_of(several.mixed(probs, several.WEIGHTS, mixture), several.TARGETS))
    torch.testing.assert_close(out.further["teacher_rank"], expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("what", ["target", "another entry"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_broken_teacher_has_no_rank(backend, dtype, what):
    student, teacher = (x[:1].clone() for x in random_logits())
    teacher[0, 7 if what == "target" else 8] = torch.nan
    told = RANK | {"target_ids": torch.tensor([7]), "overlap_top_k": 3}
    answer = ask(backend, dtype, *one_row(student[0], teacher[0]), **told)
    assert answer.out.further["teacher_rank"].isnan().all() and answer.reverse_kl.isnan().all()


@pytest.mark.parametrize(("backend", "dtype"), [TRITON])
def test_what_else_triton_does_not_find_out_is_named(backend, dtype):
    told = {"target_ids": TARGETS[:3], "statistics": {"teacher_rank": None, "accepted": 3, "student_rank": None}}
    with pytest.raises(ValueError, match=r"its kernels do not find out statistics=\['accepted', 'student_rank'\]\."):
        ask(backend, dtype, *pair(), **told)
