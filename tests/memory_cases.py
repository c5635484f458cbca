"""Teachers in this process apart from a trainer: what `prepare` reads of one, and a batch of different lengths."""

from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from tiny import VOCAB_SIZE, make_model
from transformers import GPT2Config, GPT2LMHeadModel

from trl_opd import LocalTeacher
from trl_opd.collators import TeacherBatch, collate_teacher_batch


def prepared(teacher: LocalTeacher, accelerator: Any = None, **fields: Any) -> LocalTeacher:
    """The teacher as a trainer would prepare it."""
    state = SimpleNamespace(distributed_type="NO")
    args = SimpleNamespace(per_device_train_batch_size=2, cast_lm_head_to_fp32=False, distributed_state=state)
    defaults = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, "tools": [], "environments": None}
    accelerator = Accelerator(cpu=True) if accelerator is None else accelerator
    teacher.prepare(SimpleNamespace(accelerator=accelerator, args=args, **{**defaults, **fields}))
    return teacher


def make_gpt2(**kwargs: Any) -> GPT2LMHeadModel:
    """Two layers with a learnt embedding for each absolute position, as large as those of the tokens."""
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=40,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=1,
        **kwargs,
    )
    return GPT2LMHeadModel(config).eval()


MODELS = {"absolute positions": make_gpt2, "rotary positions": lambda: make_model(hidden_size=24, seed=1).eval()}
LENGTHS = [(3, 5), (9, 2), (1, 7), (6, 7), (9, 1)]  # prompt and completion tokens


def make_batch(own_prompt: bool = False, lengths: list = LENGTHS, vocab: int = VOCAB_SIZE, **request) -> TeacherBatch:
    """Random sequences, prompts padded on the left and completions on the right."""
    g = torch.Generator().manual_seed(5)
    prompt, completion = (max(pair[i] for pair in lengths) for i in (0, 1))
    columns = torch.arange(prompt + completion)
    p, c = torch.tensor(lengths).T[..., None]
    mask = ((columns >= prompt - p) & (columns < prompt + c)).long()
    ids = torch.randint(6, vocab, mask.shape, generator=g) * mask
    inputs = {
        "prompt_ids": ids[:, :prompt],
        "prompt_mask": mask[:, :prompt],
        "completion_ids": ids[:, prompt:],
        "completion_mask": mask[:, prompt:],
    }
    batch = collate_teacher_batch(inputs, inputs["completion_mask"].bool(), **request)
    batch.own_prompt = own_prompt
    return batch


def logprobs(scores: Any, batch: TeacherBatch) -> torch.Tensor:
    """Log-probs of every entry `(B, T, V)` in float64 from hidden states and head, 0 where nothing was asked."""
    logits = scores.hidden_states.double() @ scores.head.weight.double().T
    assert scores.head.bias is None
    return logits.log_softmax(-1).masked_fill(~batch.completion_mask[..., None], 0.0)


def kl(base: torch.Tensor, other: torch.Tensor, batch: TeacherBatch) -> float:
    """Mean KL(base ‖ other) over the tokens asked for, in nats."""
    return ((base.exp() * (base - other)).sum(-1)[batch.completion_mask]).mean().item()
