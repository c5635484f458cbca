# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
From where on the doctor speaks, in one table.

Differences between answers that should be equal come from the arithmetic; the others are judgements: where a paper
gives a number it is named, else the limit is one that healthy pairs of one family stay well clear of.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Thresholds:
    """
    Numbers in nats a token unless said otherwise.

    Args:
        different (`float`): Largest difference of two answers that is an error and no rounding, whoever gives them.
        half_share (`float`): Share of the likely entries that must agree where hidden states are in half precision.
        likely (`float`): Log-prob below which answers of servers, and those in half precision, may differ more.
        served (`float`): Difference that a teacher outside this process may have if it names no `tolerance`.
        z (`float`): Standard errors of the sampled tokens' mean log-prob; 5 happen by chance once in two million.
        sampling (`float`): Relative difference of the temperature found that counts beside `z`.
        slope (`float`): Relative difference of the teacher's answer from a student of the same shape.
        same_shape (`float`): R² of the two from which on one is the other at another temperature.
        own_text (`float`): By how much a teacher may be more surprised by its own text than the student is.
        reference_text (`float`): Likewise by the dataset's completions.
        surprise (`float`): By how much more the student's text may surprise it than its own does: e³ in perplexity.
        overlap (`float`): Share of the top 16 that both have. Healthy runs start at 0.72 and reach 0.91 (arXiv
            2604.13016); below one half the two think in other words.
        reverse_kl (`float`): Mean over the tokens.
        rejected (`float`): Share of sampled tokens that are not among the teacher's top 16, beyond the share that is
            not among the student's own.
        nothing_to_learn (`float`): Mean reverse KL below which the teacher is the student.
        first_tokens (`float`): Mean gap of tokens 0 and 1, compared with that of the others.
        first_share (`float`): Share of completions in which one of these must be so far off.
        one_beginning (`float`): Share of completions that the teacher would begin with one and the same token, from
            which on it is a template that differs and not what is said.
        drift (`float`): Mean gap of the last positions, compared with that of the first ones.
        end (`float`): Mean gap of the token that ends a completion, compared with that of the others.
        end_share (`float`): Share of completions inside which the teacher wants to stop, with a probability above 0.5.
        errors (`float`): Standard errors by which means must differ beside those.
        truncated (`float`): Share of completions cut at `max_completion_length`.
        repetition (`float`): Bytes over compressed bytes of a completion's last 10k characters (above 10 before
            collapses).
        end_probability (`float`): A student that nowhere gives its end this much never learnt it.
    """

    different: float = 0.5
    half_share: float = 0.95
    likely: float = -7.0
    served: float = 0.05
    z: float = 5.0
    sampling: float = 0.05
    slope: float = 0.25
    same_shape: float = 0.98
    own_text: float = 0.3
    reference_text: float = 1.0
    surprise: float = 3.0
    overlap: float = 0.5
    reverse_kl: float = 2.0
    rejected: float = 0.3
    nothing_to_learn: float = 1e-4
    first_tokens: float = 2.0
    first_share: float = 0.75
    one_beginning: float = 0.5
    drift: float = 1.0
    end: float = 3.0
    end_share: float = 0.5
    errors: float = 3.0
    truncated: float = 0.25
    repetition: float = 10.0
    end_probability: float = 1e-3


LIMITS = Thresholds()

# Logits of 20 to 30 in half precision are rounded by 0.1: the demo's models under bf16 autocast differ by 0.2 from
# themselves in another batch
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 0.04, torch.bfloat16: 0.3}


def tolerance(dtype: torch.dtype) -> float:
    """Nats by which two ways to one log-prob may differ where hidden states or logits are of this dtype."""
    return _TOLERANCES.get(dtype, 0.3)


def severity(difference: float, allowed: float) -> str:
    """Of a difference of what should be equal."""
    if difference <= allowed:
        return "ok"
    return "error" if difference > LIMITS.different or difference != difference else "warning"
