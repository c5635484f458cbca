"""Hidden states reduced to top-k log-probs, against float64 full logits."""

import math

import numpy as np
import pytest
import torch

from trl_opd import TeacherBatch, TeacherScores
from trl_opd.kernels.projection import Head
from trl_opd.teachers.topk import reduce_hidden_states, reduce_scores

N, H, V = 37, 12, 101
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 5.0},
}


def make(dtype, bias=False, logit_scale=1.0, softcap=None):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype)
    return hidden, Head(weight, torch.randn(V).to(dtype) if bias else None, logit_scale, softcap)


def exact(hidden, head, temperature):
    z = hidden.double() @ head.weight.double().T
    z = head.logit_scale * (z if head.bias is None else z + head.bias.double())
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return (z / temperature).log_softmax(-1)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_log_probs_are_those_of_the_full_logits(head, temperature, dtype):
    hidden, head = make(dtype, **head)
    targets = torch.arange(N) % V
    ids, logprobs, sampled = reduce_hidden_states(
        hidden, head, k=7, target_ids=targets, temperature=temperature, chunk_bytes=5 * V * 4
    )
    expected = exact(hidden, head, temperature)
    top = expected.topk(7, -1)
    error = 1e-12 if dtype == torch.float64 else 4e-6  # half operands are multiplied exactly and summed in float32
    assert torch.equal(ids, top.indices)
    assert (logprobs.double() - top.values).abs().max() < error
    assert (sampled.double() - expected.gather(-1, targets[:, None])[:, 0]).abs().max() < error
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_the_chunks_change_nothing_but_the_memory(monkeypatch):
    hidden, head = make(torch.float32)
    whole = reduce_hidden_states(hidden, head, k=5, target_ids=torch.zeros(N, dtype=torch.long))
    sizes = []
    empty = torch.Tensor.new_empty

    def new_empty(self, size, **kwargs):
        sizes.append(math.prod(size) if isinstance(size, tuple) else size)
        return empty(self, size, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    for rows in (1, 2, 36, 1000):
        chunked = reduce_hidden_states(
            hidden, head, k=5, target_ids=torch.zeros(N, dtype=torch.long), chunk_bytes=rows * V * 4
        )
        assert torch.equal(chunked[0], whole[0])
        for ours, theirs in zip(chunked[1:], whole[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-6)  # two units of logits near 16
        assert max(sizes) == max(min(rows, N) * V, 5 * N)
        sizes.clear()


def test_entries_without_a_probability_are_padding():
    hidden, head = make(torch.float32, bias=True)
    head.bias[3:] = -math.inf
    ids, logprobs, _ = reduce_hidden_states(hidden, head, k=5)
    assert (ids[:, 3:] == -1).all()
    assert (ids[:, :3] >= 0).all()
    torch.testing.assert_close(logprobs[:, :3].exp().sum(-1), torch.ones(N))


def test_a_smaller_vocabulary_is_normalised_by_itself_and_given_whole():
    hidden, head = make(torch.float32)
    ids, logprobs, _ = reduce_hidden_states(hidden, head, k=1000, vocab_size=20)
    expected = exact(hidden, Head(head.weight[:20]), 1.0)
    assert ids.shape == (N, 20)
    torch.testing.assert_close(logprobs.double(), expected.gather(-1, ids), rtol=0, atol=2e-6)


def test_tokens_that_are_not_asked_for_are_not_projected_and_harmless():
    hidden, head = make(torch.float32)
    hidden = hidden[:12].view(3, 4, H).clone()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    hidden[~mask] = math.nan
    completions = torch.arange(12).view(3, 4)
    batch = TeacherBatch(completions, torch.ones(3, 4), completions, completions, mask, 0.7, "teacher_top_k", 6)
    scores = reduce_scores(TeacherScores(hidden_states=hidden, head=head), batch)
    expected = exact(hidden[mask], head, 0.7)
    assert scores.hidden_states is None
    assert torch.isfinite(scores.topk_logprobs).all()
    np.testing.assert_allclose(scores.topk_logprobs[mask], expected.topk(6, -1).values, atol=2e-6)
    np.testing.assert_allclose(
        scores.sampled_logprobs[mask], expected.gather(-1, completions[mask][:, None])[:, 0], atol=2e-6
    )
