# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Checks of the configuration's fields, before any weight is loaded."""

import math
from typing import TYPE_CHECKING

from .alarms import check_on_alarm, check_thresholds
from .kernels.dispatch import BACKENDS
from .kernels.supports import SUPPORTS, TAILS
from .losses import nearest_name, resolve_divergence
from .rewards import resolve_reward_mix
from .rollout_checks import check_rollout_fields
from .sample_weights import resolve_sample_weighting
from .slots import check_slots
from .targets import check_target
from .token_weights import resolve_token_weighting
from .weighting import OCCURRENCES

if TYPE_CHECKING:
    from .config import OnPolicyDistillConfig

CREDITS = ("direct", "policy_gradient", "combined", "k2")
OFF_POLICY_SOURCES = ("dataset", "teacher")
INJECTIONS = ("always", "group_failure")
ADVANTAGE_SIGNALS = ("log_ratio", "teacher_q")
BASELINES = ("none", "kl")
WHITENINGS = ("none", "distill", "mixed")
IMPORTANCE_WEIGHTINGS = ("clip", "truncate", "band")
SYNC_RATE = 0.05
SYNCS = ("frozen", "ema", "every_n", "live")
TEMPLATES = ("own", "student")
OVERFLOWS = ("error", "skip")
QUANTIZATIONS = ("int8", "bnb_8bit", "bnb_4bit")
OFFLOADS = ("model", "layers")
PREFLIGHTS = ("warn", "strict", "off")
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")


def check_names(args: "OnPolicyDistillConfig") -> None:
    """Names that must be known."""
    resolve_divergence(args.divergence, args.divergence_kwargs)  # type: ignore[arg-type]
    if args.off_policy_divergence is not None:
        resolve_divergence(args.off_policy_divergence, args.off_policy_divergence_kwargs)  # type: ignore[arg-type]
    check_target(args.target, args.target_kwargs)  # type: ignore[arg-type]
    resolve_token_weighting(args.token_weighting)
    resolve_sample_weighting(args.sample_weighting)
    resolve_reward_mix(args.reward_mix, args.reward_mix_kwargs)  # type: ignore[arg-type]
    check_on_alarm(args.on_alarm)
    check_thresholds(args.alarm_thresholds)  # type: ignore[arg-type]
    for name, valid in (
        ("support", SUPPORTS),
        ("support_tail", TAILS),
        ("credit", CREDITS),
        ("loss_backend", BACKENDS),
        ("loss_type", LOSS_TYPES),
        ("teacher_sync", SYNCS),
        ("teacher_chat_template", TEMPLATES),
        ("teacher_overflow", OVERFLOWS),
        ("teacher_quantization", (None, *QUANTIZATIONS)),
        ("teacher_offload", (None, *OFFLOADS)),
        ("off_policy_source", OFF_POLICY_SOURCES),
        ("injected_when", INJECTIONS),
        ("advantage_signal", ADVANTAGE_SIGNALS),
        ("advantage_baseline", BASELINES),
        ("advantage_whitening", WHITENINGS),
        ("importance_weighting", IMPORTANCE_WEIGHTINGS),
        ("special_token_occurrence", OCCURRENCES),
        ("preflight", PREFLIGHTS),
    ):
        value = getattr(args, name)
        if name == "credit" and value == "k1":
            raise ValueError(
                "credit must not be 'k1'. Backpropagating the sampled token's log-ratio has a zero mean gradient: the "
                "teacher drops out of it. Set credit='k2', whose mean gradient is that of the reverse KL, or "
                "credit='policy_gradient'."
            )
        if value not in valid:
            nearest = nearest_name(value, [v for v in valid if v])
            raise ValueError(f"{name} must be a known name, got {value!r}.{nearest}")


def check_ranges(args: "OnPolicyDistillConfig") -> None:
    """Numbers that must be in range."""

    def require(name: str, valid: bool, rule: str, breaks: str, remedy: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {rule}, got {getattr(args, name)!r}. {breaks} {remedy}")

    def number(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    require(
        "max_completion_length",
        args.max_completion_length is not None and args.max_completion_length >= 1,
        "at least 1",
        "Without completion tokens there is nothing to train on.",
        "Set the longest completion the student may sample.",
    )
    require(
        "support_size",
        isinstance(args.support_size, int) and args.support_size >= 1,
        "a whole number of at least 1",
        "It is the number of vocabulary entries in a top-k support.",
        "Set 16 to 100 (the range in use), or support='full'.",
    )
    require(
        "temperature",
        number(args.temperature) and args.temperature > 0,
        "above 0",
        "It divides the logits of sampling and loss.",
        "Set 1.0, or top_k=1 to sample greedily.",
    )
    require(
        "discount",
        number(args.discount) and 0 <= args.discount <= 1,
        "in [0, 1]",
        "It weighs later tokens in a token's advantage.",
        "Set 0 for per-token credit.",
    )
    for name in ("advantage_clip", "distill_temperature", "injected_shaping", "importance_high"):
        value = getattr(args, name)
        require(
            name,
            value is None or (number(value) and value > 0),
            "above 0",
            "A bound or a temperature of 0 removes the signal.",
            "Leave it unset for none.",
        )
    for name in ("student_fraction", "replay_fraction", "ratio_anchor"):
        require(
            name,
            number(getattr(args, name)) and 0 <= getattr(args, name) <= 1,
            "in [0, 1]",
            "It is a share.",
            "Leave it unset for the default.",
        )
    for name in ("advantage_floor", "advantage_power", "importance_low"):
        value = getattr(args, name)
        require(
            name,
            value is None or number(value),
            "a finite number",
            "It bounds or shapes the signal of every token.",
            "Leave it unset for none.",
        )
    for name in ("injected_completions", "replay_size"):
        value = getattr(args, name)
        require(
            name,
            isinstance(value, int) and not isinstance(value, bool) and value >= 0,
            "a whole number of at least 0",
            "It counts completions.",
            "Leave it unset for the default.",
        )
    for name in ("distill_coef", "reward_coef", "direct_coef", "off_policy_weight", "temperature_adaptation"):
        value = getattr(args, name)
        require(
            name,
            number(value) and value >= 0,
            "a finite number of at least 0",
            "A negative one would train away from the teacher or the reward.",
            "Set 0 to turn the term off.",
        )
    require(
        "token_view",
        isinstance(args.token_view, int) and not isinstance(args.token_view, bool) and args.token_view >= 0,
        "a whole number of at least 0",
        "It counts completions.",
        "Set 0 to keep none.",
    )
    require(
        "overlap_top_k",
        isinstance(args.overlap_top_k, int) and args.overlap_top_k >= 0,
        "a whole number of at least 0",
        "It is the size of the compared top sets.",
        "Set 0 to turn the metric off.",
    )
    for name in ("teacher_sync_steps", "teacher_batch_size", "teacher_max_length", "return_horizon"):
        value = getattr(args, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(
            name,
            whole or (value is None and name != "teacher_sync_steps"),
            "a whole number of at least 1",
            "It counts steps, sequences or tokens.",
            "Leave it unset for the default.",
        )
    require(
        "teacher_sync_rate",
        number(args.teacher_sync_rate) and 0 < args.teacher_sync_rate <= 1,
        "in (0, 1]",
        "It is the student's share in the teacher's moving average.",
        "Set teacher_sync='frozen' for a teacher that does not move.",
    )
    require(
        "loss_chunk_mib",
        args.loss_chunk_mib is None or args.loss_chunk_mib >= 1,
        "at least 1",
        "It is the memory for the logits of one chunk.",
        "Leave it unset for the default.",
    )


def check_combinations(args: "OnPolicyDistillConfig") -> None:
    """Fields that exclude each other."""
    if args.teacher_sync != "ema" and args.teacher_sync_rate != SYNC_RATE:
        raise ValueError(
            f"teacher_sync_rate must be unset with teacher_sync={args.teacher_sync!r}, got "
            f"{args.teacher_sync_rate!r}. It is the student's share in a moving average, and there is none. Set "
            "teacher_sync='ema', or unset it."
        )
    if args.teacher_sync not in ("ema", "every_n") and args.teacher_sync_steps != 1:
        raise ValueError(
            f"teacher_sync_steps must be unset with teacher_sync={args.teacher_sync!r}, got "
            f"{args.teacher_sync_steps!r}. There are no updates to count. Set teacher_sync='ema' or 'every_n', or "
            "unset it."
        )
    check_slots(args)
    check_rollout_fields(args)
    restricted = args.support not in ("full", "sampled")
    single = restricted and args.support != "union_top_k" and args.support_size == 1
    if single and args.support_tail == "renormalize":
        raise ValueError(
            "support_size must be at least 2 with support_tail='renormalize', got 1. One renormalised entry has "
            "probability 1 in both distributions: loss and gradient are identically zero. Set a larger "
            "support_size, or support_tail='bucket'."
        )
    if args.loss_backend == "liger" and (restricted or args.credit != "direct"):
        raise ValueError(
            "loss_backend must be 'auto' or 'torch' with a top-k or sampled support, got 'liger'. Liger compares "
            "whole vocabularies only."
        )
    if args.loss_backend == "liger" and (args.token_weighting or args.target != "teacher"):
        name = "target" if args.target != "teacher" else "token_weighting"
        raise ValueError(
            f"loss_backend must be 'auto' or 'torch' with {name}={getattr(args, name)!r}, got 'liger'. Liger compares "
            "with the teacher itself and weighs all tokens alike."
        )
