"""Questions for servers, and their true answers from the same model in this process."""

import torch
from tiny import VOCAB_SIZE
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_opd.collators import TeacherBatch


def make_served_model():
    """A model that vLLM can serve on a CPU too: its attention needs heads of 32."""
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).eval()


def make_batch(num_rows=5, prompt=6, completion=12, support="teacher_top_k", support_size=7, **fields):
    """Rows of all kinds: a short prompt, a short completion, a hole in what is scored, one token, nothing to score."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB_SIZE, (num_rows, prompt + completion), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, :3] = 0
    attention[2, -5:] = 0
    if num_rows > 3:
        attention[3, prompt + 1 :] = 0
    mask = attention[:, prompt:].bool()
    mask[0, 3:6] = False
    mask[-1] = False
    return TeacherBatch(
        input_ids=ids,
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        completion_ids=ids[:, prompt:],
        completion_mask=mask,
        support=support,
        support_size=support_size,
        **fields,
    )


@torch.no_grad()
def true_logprobs(model, batch):
    """`(B, T, V)` of the completion, each row alone and without padding."""
    rows = torch.zeros(*batch.completion_ids.shape, model.config.vocab_size)
    for row, (prompt, completion) in enumerate(batch.sequences()):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
        rows[row, : len(completion)] = (logits / 1.0).log_softmax(-1)[len(prompt) - 1 : -1].float()
    return rows


def assert_true_scores(scores, batch, model, atol=1e-5):
    """Top-k and sampled log-probs of a batch are those of the model."""
    mask, truth = batch.completion_mask, true_logprobs(model, batch)
    sampled = truth.gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    torch.testing.assert_close(scores.sampled_logprobs[mask], sampled[mask], rtol=0, atol=atol)
    if batch.support == "sampled":
        assert scores.topk_ids is None
        return
    best = truth.topk(min(batch.support_size, truth.shape[-1]))
    ids, logprobs = scores.topk_ids[mask], scores.topk_logprobs[mask]
    assert ids.shape[-1] == batch.support_size
    assert torch.equal(ids.sort(-1).values[:, -best.indices.shape[-1] :], best.indices[mask].sort(-1).values)
    torch.testing.assert_close(
        logprobs.masked_fill(ids < 0, 0.0),
        truth[mask].gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0),
        rtol=0,
        atol=atol,
    )
    assert (logprobs[ids < 0] == -torch.inf).all()
