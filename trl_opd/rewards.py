# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
How the task's own reward and the teacher's signal share one advantage. Torch only; nothing here has a gradient.

The order of scales is part of the method:

1. GRPO centres the rewards of a group, and divides them by their deviation as `scale_rewards` says;
2. the distillation advantages are whitened if `advantage_whitening="distill"`; else they are in nats;
3. the two are mixed ([`add`], [`multiply_sign_preserving`]), each with its coefficient;
4. the mix is whitened if `advantage_whitening="mixed"`.

2 and 4 differ. Whitened before the mix, `distill_coef` is the size of the teacher's part against a reward's deviation
of 1. Whitened after it, the two coefficients say only who has which share: the sum has deviation 1, and the mean that
is taken off moves the tokens without a reward signal as well. Without either, the teacher's part fades as the student
comes near it.

Shapes: B completions, T tokens, G completions of a group (one prompt).
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .resolve import nearest_name

GATES = ("success", "failure", "group_failure", "group_success", "mixed_group", "consensus")


def multiply_sign_preserving(
    reward_advantages: Tensor, gap: Tensor, strength: float = 0.5, clip: float = 0.2, mask: Tensor | None = None
) -> Tensor:
    r"""
    Â = A [(1 − λ) + λ clip(exp(sign(A) ℓ), 1 − ε, 1 + ε)]: the reward says which way, the teacher how far. Detached.

    A rewarded token gets more where the teacher likes it better than the student does (ℓ > 0), a punished one where
    the teacher likes it less. The factor is at least 1 − λ ε: the sign of A stays. Where A = 0 nothing is learned.

    Args:
        reward_advantages (`torch.Tensor`): A, GRPO's advantages, `(B, 1)` or `(B, T)`.
        gap (`torch.Tensor`): ℓ of the sampled tokens in nats, `(B, T)`.
        strength (`float`, *optional*, defaults to `0.5`): λ, in [0, 1]; 0 returns A.
        clip (`float`, *optional*, defaults to `0.2`): ε, in [0, 1).
        mask (`torch.Tensor`, *optional*): Tokens that the teacher scored, boolean, `(B, T)`. Others keep A.

    Returns:
        `torch.Tensor` of shape `(B, T)`.

    Paper: [RLSD](https://huggingface.co/papers/2604.03128); its code takes λ from 0.5 to 0 over 50 steps.
    """
    advantages = reward_advantages.detach().expand_as(gap)
    gap = gap.detach() if mask is None else gap.detach().masked_fill(~mask, 0.0)
    factor = (advantages.sign() * gap).exp().clamp(1 - clip, 1 + clip)
    return advantages * ((1 - strength) + strength * factor)


def reward_gate(
    kind: str, rewards: Tensor, group_rewards: Tensor, threshold: float, consensus: Tensor | None = None
) -> Tensor:
    """
    Which completions are distilled, by their rewards: 1 or 0.

    With τ the threshold, `"success"`: r ≥ τ; `"failure"`: r < τ; `"group_failure"`: all of the group are below τ;
    `"group_success"`: none is; `"mixed_group"`: some are; `"consensus"`: the share of the group that agrees is ≥ τ,
    whatever the rewards. A reward of NaN (a completion that no function could score) neither passes nor fails: its
    completion is in neither of the first two, its group is judged by the others, and a group without any is in none.

    Args:
        kind (`str`): One of `GATES`.
        rewards (`torch.Tensor`): Reward of each completion, before any scaling, `(B,)`.
        group_rewards (`torch.Tensor`): Rewards of its group, itself among them, `(B, G)`.
        threshold (`float`): τ.
        consensus (`torch.Tensor`, *optional*): Share of the group that gives its most frequent answer, `(B,)`, from
            [`consensus_share`].

    Returns:
        `torch.Tensor` of shape `(B,)`, float32.

    Raises:
        ValueError: If the kind is unknown, or `"consensus"` without shares.

    Paper: [KEPO](https://huggingface.co/papers/2602.00400), success, and group failure for its hints;
    [KDRL](https://huggingface.co/papers/2506.02208), failure; [HDPO](https://huggingface.co/papers/2603.23871), group
    failure; [GATES](https://huggingface.co/papers/2602.20574), consensus.
    """
    passes, fails = group_rewards >= threshold, group_rewards < threshold
    some_pass, some_fail = passes.any(1), fails.any(1)
    if kind == "success":
        gate = rewards >= threshold
    elif kind == "failure":
        gate = rewards < threshold
    elif kind == "group_failure":
        gate = some_fail & ~some_pass
    elif kind == "group_success":
        gate = some_pass & ~some_fail
    elif kind == "mixed_group":
        gate = some_pass & some_fail
    elif kind == "consensus":
        if consensus is None:
            raise ValueError(
                "consensus must be given with kind='consensus', got None. There is no agreement to compare with the "
                "threshold. Pass consensus_share(answers, group_size)."
            )
        gate = consensus >= threshold
    else:
        raise ValueError(f"kind must be a known name, got {kind!r}.{nearest_name(kind, list(GATES))}")
    return gate.float()


def consensus_share(answers: Sequence[Hashable | None], group_size: int) -> list[float]:
    """
    Share of each completion's group that gives the group's most frequent answer; 0 if none answers.

    Args:
        answers (`Sequence[Hashable | None]`): An answer per completion, groups in a row; `None` for none, which agrees
            with nobody.
        group_size (`int`): G.

    Returns:
        `list[float]`: One entry per completion.

    Raises:
        ValueError: If the answers are no whole number of groups.
    """
    _check_groups(len(answers), group_size)
    shares: list[float] = []
    for start in range(0, len(answers), group_size):
        counts = Counter(answer for answer in answers[start : start + group_size] if answer is not None)
        shares += [max(counts.values(), default=0) / group_size] * group_size
    return shares


def _check_groups(num: int, group_size: int) -> None:
    if group_size < 1 or num % group_size:
        raise ValueError(
            f"group_size must be a divisor of the {num} completions, got {group_size!r}. Completions of different "
            "prompts would be compared. Pass the number of generations."
        )


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# name -> parameter -> (default, rule in words, test)
REWARD_MIXES: Mapping[str, Mapping[str, tuple[Any, str, Callable[[Any], bool]]]] = {
    "add": {},
    "multiply": {
        "strength": (0.5, "in [0, 1]", lambda x: _number(x) and 0 <= x <= 1),
        "clip": (0.2, "in [0, 1), so that no sign of an advantage is lost", lambda x: _number(x) and 0 <= x < 1),
    },
    "gate": {
        "on": ("success", f"one of {', '.join(GATES)}", lambda x: x in GATES),
        "threshold": (1.0, "a finite number", _number),
        "answer": (
            None,
            "an import path 'module.function' from a completion to its answer, or None for the whole text",
            lambda x: x is None or (isinstance(x, str) and "." in x),
        ),
    },
}


def resolve_reward_mix(name: str, kwargs: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """
    Check a reward mix's name and parameters, and fill in the defaults.

    Args:
        name (`str`): A key of `REWARD_MIXES`.
        kwargs (`Mapping[str, Any]`, *optional*): Its parameters.

    Returns:
        `tuple[str, dict[str, Any]]`: the name and the complete parameters.

    Raises:
        ValueError: If the name or a parameter is unknown, or a parameter breaks its rule.
    """
    if name not in REWARD_MIXES:
        raise ValueError(f"reward_mix must be a known name, got {name!r}.{nearest_name(name, list(REWARD_MIXES))}")
    rules = REWARD_MIXES[name]
    params = {key: default for key, (default, _, _) in rules.items()}
    for key, value in (kwargs or {}).items():
        if key not in rules:
            takes = f"takes {', '.join(rules)}" if rules else "takes no parameters"
            raise ValueError(f"reward_mix_kwargs has {key!r}, but {name} {takes}. Remove it or rename it.")
        _, rule, valid = rules[key]
        if not valid(value):
            raise ValueError(f"reward_mix_kwargs[{key!r}] of {name} must be {rule}, got {value!r}.")
        params[key] = float(value) if _number(value) else value
    if name != "gate":
        return name, params
    if params["on"] == "consensus" and not 0 < params["threshold"] <= 1:
        raise ValueError(
            f"reward_mix_kwargs['threshold'] of gate must be in (0, 1] with on='consensus', got "
            f"{params['threshold']!r}. It is a share of the group. Set 1.0 for an answer that all agree on."
        )
    if params["on"] != "consensus" and params["answer"] is not None:
        raise ValueError(
            f"reward_mix_kwargs['answer'] of gate must be unset with on={params['on']!r}, got {params['answer']!r}. "
            "Only on='consensus' compares answers. Unset it, or set on='consensus'."
        )
    return name, params
