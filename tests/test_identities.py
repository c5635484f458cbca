"""
Identities of the literature that belong to no single room, in float64 over a whole toy vocabulary.

The others stand with what they are about: search the tests for their ids (I1 to I18). I15 (sorted L1) and I17 (DPO at
the reference) are of methods that this library does not have.
"""

import pytest
import torch
from torch import Tensor

from trl_opd import losses
from trl_opd.kernels import fused_linear_divergence

V = 7


def logits(seed: int, n: int = 1) -> Tensor:
    return torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(value: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), z, retain_graph=True)[0]


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_a_reward_tilt_is_the_reward_beside_the_divergence(beta):
    """I10: KL(s ‖ ∝ t e^(r/β)) = KL(s ‖ t) − E_s[r]/β + log E_t[e^(r/β)]."""
    z, teacher, reward = logits(0).requires_grad_(), logits(1).log_softmax(-1), logits(2)
    tilted = (teacher + reward / beta).log_softmax(-1)
    s = z.log_softmax(-1)
    one = losses.reverse_kl(s, tilted)
    other = losses.reverse_kl(s, teacher) - (s.exp() * reward).sum(-1) / beta
    constant = (teacher + reward / beta).logsumexp(-1)
    torch.testing.assert_close(one, other + constant)
    torch.testing.assert_close(gradient(one, z), gradient(other, z))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_at_a_high_temperature_a_kl_is_half_the_centred_mse_of_logits(name):
    """I13: T² KL of the softened models → ½ · mean over V of the centred squared difference of logits."""
    student, teacher, temperature = logits(0), logits(1), 1e4
    gap = student - teacher
    mse = 0.5 * (gap - gap.mean(-1, keepdim=True)).square().mean(-1)
    kl = getattr(losses, name)((student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1))
    torch.testing.assert_close(temperature**2 * kl, mse, rtol=1e-3, atol=0)


def supported(support: str, size: int, tail: str, z: Tensor, teacher: Tensor) -> Tensor:
    """The divergence of the fused op on a support, with identity heads."""
    eye = torch.eye(V, dtype=torch.float64)
    out = fused_linear_divergence(z, eye, teacher, eye, support=support, support_size=size, tail=tail)
    assert out.divergence is not None
    out.loss.backward()
    return out.divergence


def test_supports_with_a_bucket_agree_at_the_whole_vocabulary_only():
    """I18: top K of the teacher or of the student, the rest in a bucket."""
    teacher = logits(1)
    values = {}
    for size in (3, V):
        for support in ("teacher_top_k", "student_top_k", "union_top_k"):
            z = logits(0).requires_grad_()
            values[support, size] = supported(support, size, "bucket", z, teacher).item()
    full = losses.reverse_kl(logits(0).log_softmax(-1), teacher.log_softmax(-1)).item()
    for support in ("teacher_top_k", "student_top_k", "union_top_k"):
        assert values[support, V] == pytest.approx(full, rel=1e-12)
        assert values[support, 3] < full
    assert values["teacher_top_k", 3] != pytest.approx(values["student_top_k", 3], rel=1e-3)


def test_a_policy_gradient_of_candidates_is_not_the_renormalised_divergence():
    """I8f: −Σ_K sg(s̄ ℓ) log s of Rethinking OPD beside the gradient of the renormalised reverse KL."""
    z, teacher = logits(0).requires_grad_(), logits(1)
    supported("student_top_k", 4, "renormalize", z, teacher)
    top = logits(0).topk(4).indices
    own = logits(0).requires_grad_()
    s, t = own.log_softmax(-1).gather(-1, top), teacher.log_softmax(-1).gather(-1, top)
    renormalised = s.log_softmax(-1).exp()
    loss = -((renormalised * (t - s)).detach() * s).sum()
    per_candidate = torch.autograd.grad(loss, own)[0]
    assert z.grad is not None
    assert (per_candidate - z.grad).abs().max() > 1e-2
