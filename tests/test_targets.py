"""Targets by name: coefficients, the sampled tokens' combination, and what is refused."""

import math

import pytest
import torch

from trl_opd.targets import TARGETS, Target, resolve_target

B, T, V = 2, 3, 7


def logprobs(seed: int) -> torch.Tensor:
    logits = torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.log_softmax(-1)


CASES = [
    ("teacher", {}, 0, (1.0,), 0.0),
    ("taid", {}, 0, (0.4,), 0.6),
    ("taid", {"t": 0}, 0, (0.0,), 1.0),
    ("taid", {"t": 1}, 0, (1.0,), 0.0),
    ("veto", {}, 0, (1.0,), 0.8),
    ("veto", {"beta": 0.0}, 0, (1.0,), 0.0),
    ("extrapolate", {}, 1, (1.25, -0.25), 0.0),
    ("extrapolate", {"scale": 0.5}, 1, (0.5, 0.5), 0.0),
    ("delta", {}, 2, (1.0, -1.0, 1.0), 0.0),
    ("delta", {"scale": 0.7}, 2, (0.7, -0.7, 1.0), 0.0),
    ("reward_tilt", {"beta": 0.25}, 0, (1.0,), 0.0),
    ("affine", {}, 0, (1.0,), 0.0),
    ("affine", {"teacher": 2.0, "references": [-1, 0.5], "student": 0.3}, 2, (2.0, -1.0, 0.5), 0.3),
    ("affine", {"reference_2": 0.5, "reference_1": -1.0}, 2, (1.0, -1.0, 0.5), 0.0),
]


@pytest.mark.parametrize(("name", "kwargs", "references", "weights", "student_coef"), CASES)
def test_coefficients(name, kwargs, references, weights, student_coef):
    target = resolve_target(name, kwargs, references)
    assert target.mixture == "affine"
    assert target.weights == pytest.approx(weights) and target.student_coef == pytest.approx(student_coef)
    assert len(target.weights) == 1 + references


def test_contrast():
    target = resolve_target("contrast", None, 1)
    assert (target.mixture, target.contrast_scale, target.contrast_floor) == ("contrast", 15.0, 1e-3)
    target = resolve_target("contrast", {"scale": 10, "floor": 0.5}, 1)
    assert (target.contrast_scale, target.contrast_floor) == (10.0, 0.5) and not target.is_teacher
    with pytest.raises(ValueError, match=r"target='contrast' needs whole distributions.*credit='direct'"):
        target.sampled([torch.zeros(B, T)] * 2, torch.zeros(B, T))


def test_reward_tilt_adds_the_reward_over_beta():
    assert resolve_target("reward_tilt", {"beta": 0.25}, 0).reward_coef == 4.0
    assert all(
        resolve_target(name, None, rule.num_references).reward_coef == 0
        for name, rule in TARGETS.items()
        if name != "reward_tilt"
    )


@pytest.mark.parametrize(
    ("name", "kwargs", "references", "expected"),
    [
        ("teacher", {}, 0, True),
        ("reward_tilt", {}, 0, True),
        ("taid", {"t": 1.0}, 0, True),
        ("veto", {"beta": 0.0}, 0, True),
        ("taid", {}, 0, False),
        ("extrapolate", {"scale": 1.0}, 1, False),  # there is an answer of the reference to leave out
        ("affine", {"student": 0.1}, 0, False),
    ],
)
def test_the_teacher_itself(name, kwargs, references, expected):
    assert resolve_target(name, kwargs, references).is_teacher is expected


@pytest.mark.parametrize(
    ("name", "kwargs", "references"),
    [("taid", {"t": 0.3}, 0), ("veto", {"beta": 0.6}, 0), ("extrapolate", {"scale": 1.4}, 1), ("delta", {}, 2)],
)
def test_the_policy_gradient_of_the_sampled_token_is_that_of_the_reverse_kl(name, kwargs, references):
    """I5, I9b, I9c: every token enumerated, weighted by the student's probability."""
    target = resolve_target(name, kwargs, references)
    models = [logprobs(i) for i in range(1 + references)]
    z = logprobs(9).requires_grad_()
    log_s = z.log_softmax(-1)
    combination = sum(a * x for a, x in zip(target.weights, models, strict=True)) + target.student_coef * z.detach()
    (expected,) = torch.autograd.grad(
        (log_s.exp() * (log_s - combination.log_softmax(-1))).sum(), z, retain_graph=True
    )
    ours = target.sampled([m[None] for m in models], log_s[None])
    assert not ours.requires_grad
    advantage = (ours - log_s.detach())[0]
    (gradient,) = torch.autograd.grad(-(log_s.exp().detach() * advantage * log_s).sum(), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


def test_sampled_identities():
    teacher, reference, student = (torch.randn(B, T, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert torch.equal(resolve_target("teacher", None, 0).sampled([teacher], student), teacher)
    broken = torch.full_like(reference, -torch.inf)
    assert torch.equal(resolve_target("extrapolate", {"scale": 1}, 1).sampled([teacher, broken], student), teacher)
    assert torch.equal(resolve_target("extrapolate", {"scale": 0}, 1).sampled([broken, reference], student), reference)
    assert torch.equal(resolve_target("taid", {"t": 0}, 0).sampled([broken], student), student)
    assert torch.equal(Target((0.0,)).sampled([broken], student), torch.zeros(B, T))
    with pytest.raises(ValueError, match=r"teacher_logprobs must be 2 tensors, .* got 1"):
        resolve_target("extrapolate", None, 1).sampled([teacher], student)


REFUSED = [
    (("tayd", None, 0), "target must be a known name, got 'tayd'. Did you mean 'taid'"),
    (("taid", {"T": 0.5}, 0), "target_kwargs must hold parameters of target='taid', got 'T'"),
    (("taid", {"beta": 0.5}, 0), r"got 'beta'.* Valid: t\."),
    (("teacher", {"t": 0.5}, 0), "got 't'. target='teacher' takes none"),
    (("taid", {"t": 1.5}, 0), r"target_kwargs\['t'\] of taid must be in \[0, 1\], got 1.5"),
    (("taid", {"t": math.nan}, 0), "got nan"),
    (("taid", {"t": "0.5"}, 0), "got '0.5'"),
    (("taid", {"t": True}, 0), "got True"),
    (("veto", {"beta": -0.1}, 0), r"target_kwargs\['beta'\] of veto must be a finite number, at least 0, got -0.1"),
    (("contrast", {"floor": 0}, 1), r"target_kwargs\['floor'\] of contrast must be a finite number above 0, got 0"),
    (("reward_tilt", {"beta": 0}, 0), "above 0, got 0"),
    (("extrapolate", None, 0), r"reference_model must name .* target='extrapolate' takes, 1 \(the model .*, got 0"),
    (("delta", None, 1), r"reference_model must name .* 2 \(the raw teacher, then the raw student\), got 1"),
    (("teacher", None, 1), "reference_model must name .* target='teacher' takes, none, got 1"),
    (("affine", {"reference_3": 1.0}, 2), "got 'reference_3'. Did you mean 'reference_"),
    (("affine", {"references": [1.0]}, 2), r"target_kwargs\['references'\] of affine must be a list of 2 numbers"),
    (("affine", {"references": [1.0, math.inf]}, 2), r"target_kwargs\['reference_2'\] of affine must be a finite"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_targets(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve_target(*arguments)
