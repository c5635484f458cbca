"""Losses of samples that are each scored alone: no batch, no padding, plain full logits in float64."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from steps import build, record
from tiny import VOCAB_SIZE, make_tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

# By the student's prompt: much longer, much shorter, the same, and none (which is the same)
TEACHER_PROMPTS = {
    "abc": "the answer is 42. think of a long and winding text that explains it all and then some: abc",
    "hello world": "h",
    "x": None,
    "the quick brown fox": "fox",
    "12 34": "12 34",
    "what is it": "it is the 7th. now what is it",
}


def ids_of(text: str) -> list[int]:
    return make_tokenizer()(text)["input_ids"]


def make_rows(teacher_prompts: Mapping[str, Any] | None = TEACHER_PROMPTS, num: int = 24) -> Dataset:
    """A dataset with a teacher's prompt for every prompt; without the column if there are none."""
    prompts = [list(TEACHER_PROMPTS)[i % len(TEACHER_PROMPTS)] for i in range(num)]
    columns = {"prompt": prompts}
    if teacher_prompts is not None:
        columns["teacher_prompt"] = [teacher_prompts[prompt] for prompt in prompts]
    return Dataset.from_dict(columns)


def make_gpt2(seed: int = 5, n_positions: int = 256) -> GPT2LMHeadModel:
    """A model with absolute positions, which padding on the left would shift."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": n_positions, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=1, **sizes)).double().eval()


@dataclass
class Sample:
    """One row of a micro-batch without its padding."""

    prompt: list[int]
    teacher_prompt: list[int] | None  # `None`: left out of the distillation
    completion: list[int]
    advantage: float = 0.0


def samples(inputs: Mapping[str, Any], teacher_prompts: Mapping[str, Any] = TEACHER_PROMPTS) -> list[Sample]:
    """The rows of a micro-batch, with the teacher's prompts that belong to the students' (`None`: the student's)."""
    theirs = {tuple(ids_of(p)): ids_of(p if t is None else t) for p, t in teacher_prompts.items()}
    rows = []
    for i in range(len(inputs["prompt_ids"])):
        prompt, completion = (
            inputs[f"{name}_ids"][i][inputs[f"{name}_mask"][i].bool()].tolist() for name in ("prompt", "completion")
        )
        rows.append(Sample(prompt, theirs[tuple(prompt)], completion, float(inputs["advantages"][i])))
    return rows


def logprobs_alone(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """Log-probs `(T, V)` at a completion's positions."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


Score = Callable[[list[int], list[int]], Tensor]
Gap = Callable[[Tensor, Tensor, Tensor], Tensor]


def reverse_kl(s: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
    return (s.exp() * (s - t)).sum(-1)


def policy_gradient(s: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
    """−A at ratio 1, with the gradient −A ∇ log p."""
    s, t = (x.gather(-1, tokens[:, None])[:, 0] for x in (s, t))
    return -(t - s).detach() * (s - s.detach() + 1)


def bucketed_reverse_kl(k: int) -> Gap:
    """Over the teacher's k likeliest entries and one for the rest."""

    def gap(s: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        ids = t.topk(k).indices
        s, t = (x.gather(-1, ids) for x in (s, t))
        s, t = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (s, t))
        return (s.exp() * (s - t)).sum(-1)

    return gap


def loss_alone(student: Any, score: Score, rows: list[Sample], gap: Gap = reverse_kl, tokens: float = 0) -> Tensor:
    """Sum of the gap over the completions' tokens, over `tokens` (by default theirs, without those left out)."""
    total, counted = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        if row.teacher_prompt is None:
            continue
        with torch.no_grad():
            theirs = score(row.teacher_prompt, row.completion)
        ours = logprobs_alone(student, row.prompt, row.completion)
        total = total + gap(ours, theirs, torch.tensor(row.completion)).sum()
        counted += len(row.completion)
    return total / (tokens or counted)


def train_one_step(output_dir: Any, *, rows: Dataset | None = None, prepare: Any = None, **kwargs: Any) -> Any:
    """One step of SGD over eight samples in two micro-batches (see `steps.build`)."""
    arguments = {"train_dataset": make_rows() if rows is None else rows, **kwargs.pop("arguments", {})}
    fields = {"optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 2, **kwargs}
    trainer = build(output_dir, arguments=arguments, **fields)
    if prepare is not None:
        prepare(trainer)
    step = record(trainer)
    trainer.train()
    return step
