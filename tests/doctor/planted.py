"""Runs that are well, and faults to plant in them."""

from typing import Any

import torch
from steps import build
from tiny import VOCAB_SIZE, make_model

from trl_opd.collators import TeacherScores
from trl_opd.doctor.models import check_models

ENDS = [1, 3, 7, 11]  # a completion ends after about a dozen tokens


def make_student(**kwargs: Any) -> Any:
    """Float64, and it ends."""
    model = make_model(**kwargs).double()
    model.generation_config.eos_token_id = ENDS
    return model


def near(seed: int = 0, by: float = 0.02, **kwargs: Any) -> Any:
    """A teacher near the student."""
    model = make_model(**kwargs).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator))
    return model.eval()


def make_run(path: Any, teacher: Any, **fields: Any) -> Any:
    """A built trainer that is not trained."""
    fields = {"model": make_student(), "max_completion_length": 64, "preflight": "off", **fields}
    return build(path, teacher=teacher, **fields)


def look(trainer: Any, num_samples: int = 12) -> list[Any]:
    """What the doctor finds."""
    torch.manual_seed(0)
    return check_models(trainer, num_samples=num_samples)


def problems(findings: list[Any]) -> list[Any]:
    return [finding for finding in findings if finding.is_problem]


def names(findings: list[Any]) -> set[str]:
    return {finding.check for finding in findings}


class Scores:
    """
    A teacher outside the trainer: full logits of a model, each sequence alone.

    Args:
        model: Its model.
        top_k (`int`): Entries of an answer, 0 for the sampled tokens alone.
        tempered (`Callable`): The temperature that it answers at, by the one asked for.
        change (`Callable`): `change(logprobs (T, V), prompt, completion)`, what becomes of them.
    """

    name = "scores"

    def __init__(self, model: Any, top_k: int = 0, tempered: Any = lambda t: t, change: Any = None):
        self.model, self.top_k, self.tempered, self.change = model, top_k, tempered, change
        self.vocab_size = VOCAB_SIZE

    @torch.no_grad()
    def __call__(self, batch: Any) -> Any:
        full = torch.zeros(*batch.completion_ids.shape, VOCAB_SIZE, dtype=torch.float64)
        for row, (prompt, completion) in enumerate(batch.sequences()):
            if not completion:
                continue
            logits = self.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double()
            logprobs = (logits / self.tempered(batch.temperature)).log_softmax(-1)
            if self.change is not None:
                logprobs = self.change(logprobs, prompt, completion)
            full[row, : len(completion)] = logprobs
        sampled = full.gather(-1, batch.completion_ids[..., None])[..., 0]
        if not self.top_k:
            return TeacherScores(sampled_logprobs=sampled)
        top = full.topk(self.top_k)
        return TeacherScores(topk_ids=top.indices, topk_logprobs=top.values, sampled_logprobs=sampled)


SAMPLED = {"support": "sampled", "credit": "policy_gradient"}
LISTED = {"support": "teacher_top_k", "support_size": 20}
