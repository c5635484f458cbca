# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
How much each completion counts: by how often the student passes its prompt, and by how stale it is. Torch only.

Weights are detached, one for each completion, and multiply the weights of its tokens.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .token_weights.specs import (
    ResolvedWeighting,
    Spec,
    Weighting,
    check_weights,
    is_count,
    is_number,
    needs,
    resolve_weightings,
)

_FIELD = "sample_weighting"


@dataclass
class SampleStats:
    """
    Statistics of completions, all detached; `None` is what is not known.

    Args:
        pass_rate (`torch.Tensor`, *optional*): Share of the student's completions of this prompt that pass, `(B,)`.
        rewards (`torch.Tensor`, *optional*): Of the completion, `(B,)`.
        group_rewards (`torch.Tensor`, *optional*): Of all completions of its prompt, `(B, G)`.
        drift (`torch.Tensor`, *optional*): Mean over the completion's tokens of |student's log-prob now − when it was
            sampled|, in nats, `(B,)`; 0 where the latter is not known.
        on_policy (`torch.Tensor`, *optional*): Whether the current student sampled it, boolean, `(B,)`.
        age (`torch.Tensor`, *optional*): Optimizer steps since it was sampled, `(B,)`.
    """

    pass_rate: Tensor | None = None
    rewards: Tensor | None = None
    group_rewards: Tensor | None = None
    drift: Tensor | None = None
    on_policy: Tensor | None = None
    age: Tensor | None = None

    def require(self, name: str) -> Tensor:
        """
        The statistic `name`.

        Raises:
            ValueError: If it is not known.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            remedy = _REMEDIES.get(name, "It was not noted.")
            raise ValueError(
                f"SampleStats.{name} must be known to weigh by it, got None. {remedy} Or set another sample_weighting."
            )
        return value


_REMEDIES = {
    "pass_rate": "Pass rates are made of rewards. Pass reward_funcs.",
    "rewards": "There is no reward. Pass reward_funcs.",
    "group_rewards": "There is no reward. Pass reward_funcs.",
    "drift": "It compares with the sampler's log-probs. Keep those of replayed completions.",
}


def beta_kernel(stats: SampleStats, a: float = 1.0, b: float = 1.0, scale: float = 1.0) -> Tensor:
    """
    w(p) = scale · pᵃ (1 − p)ᵇ of the pass rate p: prompts at the frontier of what the student can do count most.

    With a, b > 0 prompts that never or always pass have weight 0. a = b = 0 and scale 1 give ones. Weights are not
    normalised: at a = b = 1 the loss is at most ¼ of the unweighted, unless `scale` is 4.

    Args:
        stats ([`SampleStats`]): With `pass_rate`.
        a (`float`, *optional*, defaults to `1.0`), b (`float`, *optional*, defaults to `1.0`): At least 0.
        scale (`float`, *optional*, defaults to `1.0`): Above 0.

    Paper: [PACED](https://huggingface.co/papers/2603.11178), the Beta kernel (its abstract; whether it normalises the
    weights is not known). Scale 4 is SSOPD's frontier weight 4p(1 − p) (from a third party's notes).
    """
    p = stats.require("pass_rate")
    return scale * p**a * (1 - p) ** b


def freshness(stats: SampleStats, kappa: float = 1.0) -> Tensor:
    """
    w = exp(−κ · drift): completions that the student would no longer sample count less. Fresh ones, and κ = 0, give 1.

    Args:
        stats ([`SampleStats`]): With `drift`.
        kappa (`float`, *optional*, defaults to `1.0`): κ, at least 0, per nat.

    Paper: a sketch after [f-OPD](https://huggingface.co/papers/2605.17862), whose freshness score is not known.
    """
    return torch.exp(-kappa * stats.require("drift"))


_AT_LEAST_0 = "a finite number of at least 0", lambda x: is_number(x) and 0 <= x < math.inf

SAMPLE_WEIGHTINGS: Mapping[str, Weighting] = {
    "beta_kernel": Weighting(
        beta_kernel,
        {
            "a": (1.0, *_AT_LEAST_0),
            "b": (1.0, *_AT_LEAST_0),
            "scale": (1.0, "a finite number above 0", lambda x: is_number(x) and 0 < x < math.inf),
        },
        needs("pass_rate"),
    ),
    "freshness": Weighting(freshness, {"kappa": (1.0, *_AT_LEAST_0)}, needs("drift")),
}


def resolve_sample_weighting(spec: Spec) -> list[ResolvedWeighting]:
    """The weightings that `sample_weighting` names, in the forms of `token_weighting`; functions take SampleStats."""
    return resolve_weightings(spec, SAMPLE_WEIGHTINGS, _FIELD)


def sample_weights(
    weightings: Sequence[ResolvedWeighting], stats: SampleStats, num_completions: int, device: torch.device | str
) -> Tensor:
    """
    Product of the weights, detached; ones without any weighting.

    Args:
        weightings (`Sequence[ResolvedWeighting]`): What [`resolve_sample_weighting`] returned.
        stats ([`SampleStats`]): Of the micro-batch.
        num_completions (`int`): B.
        device (`torch.device`): Where the weights shall be.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32 or the statistics' own dtype.

    Raises:
        ValueError: If a statistic is missing, or weights have another shape, are not finite or, where the weighting is
            not signed, negative.
    """
    every = torch.ones(num_completions, dtype=torch.bool, device=device)
    product = every.float()
    with torch.no_grad():
        for weighting in weightings:
            for name in weighting.needs:
                stats.require(name)
            weights = weighting.function(stats, **weighting.params)
            product = product * check_weights(weights, every, weighting, _FIELD)
    return product


class PassRates:
    """
    Running pass rates of prompts, for `beta_kernel`.

    With a `window`, the share of passes among the prompt's last so many completions, and in any case all of the last
    update; with a `decay`, an exponential moving average of the updates' shares. All processes keep the same rates if
    all are given the completions of all, in one order.

    Args:
        window (`int`, *optional*, defaults to `8`): Completions to count. PACED measures with 8.
        decay (`float`, *optional*): Of the moving average, in [0, 1), instead of a window (then `None`).
        max_prompts (`int`, *optional*, defaults to `100000`): Prompts to remember; the longest unseen go first.
    """

    def __init__(self, window: int | None = 8, decay: float | None = None, max_prompts: int = 100_000) -> None:
        if (window is None) == (decay is None):
            raise ValueError(
                f"PassRates must have a window or a decay, got window={window!r} and decay={decay!r}. They are two "
                "ways of forgetting. Set one and let the other be None."
            )
        if window is not None and not is_count(window):
            raise ValueError(
                f"window must be a whole number of at least 1, got {window!r}. It counts completions. Set 8, or decay."
            )
        if decay is not None and not (is_number(decay) and 0 <= decay < 1):
            raise ValueError(
                f"decay must be in [0, 1), got {decay!r}. At 1 the rate would never move. Set 0.9, or window."
            )
        self.window, self.decay, self.max_prompts = window, decay, max_prompts
        # The last outcomes, or the average alone; the prompt seen last comes last
        self._history: dict[str, list[float]] = {}

    def update(self, prompts: Sequence[Any], passes: Sequence[float]) -> None:
        """
        Count completions: `passes[i]` is 1 (or `True`) if that of `prompts[i]` passes, 0 if not, or a share.

        Raises:
            ValueError: If there are not as many of one as of the other, or a pass is not in [0, 1].
        """
        outcomes: dict[str, list[float]] = defaultdict(list)
        for prompt, passed in zip(prompts, passes, strict=True):
            if not 0 <= float(passed) <= 1:
                raise ValueError(
                    f"passes must be in [0, 1], got {float(passed)!r}. A rate is a share of completions. Set a "
                    "threshold that turns the reward into pass or fail."
                )
            outcomes[prompt_key(prompt)].append(float(passed))
        for key in sorted(outcomes):  # not the processes' order, which depends on their number
            history, new = self._history.pop(key, []), outcomes[key]
            if self.window is not None:
                self._history[key] = (history + new)[-max(int(self.window), len(new)) :]
            else:
                mean = math.fsum(new) / len(new)
                self._history[key] = [self.decay * history[0] + (1 - self.decay) * mean if history else mean]  # type: ignore[operator]
        while len(self._history) > self.max_prompts:
            del self._history[next(iter(self._history))]

    def rate(self, prompt: Any) -> float | None:
        """The pass rate of `prompt` in [0, 1], `None` if it is not known."""
        history = self._history.get(prompt_key(prompt))
        return None if history is None else math.fsum(history) / len(history)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep; plain JSON."""
        return {"history": {key: list(history) for key, history in self._history.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, with this object's window or decay."""
        self._history = {}
        for key, outcomes in list(state["history"].items())[-self.max_prompts :]:
            mean = math.fsum(outcomes) / len(outcomes)
            self._history[key] = [mean] if self.window is None else list(outcomes)


def prompt_key(prompt: Any) -> str:
    """
    A short hash of a prompt, text or messages: the same in every process and run.

    What is not text (an image) counts by its type only.
    """
    text = json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=lambda x: type(x).__name__)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
