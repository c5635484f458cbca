# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Which values of the objective's slots exclude each other."""

from typing import TYPE_CHECKING, Any

from .credit import POLICY_GRADIENT_DIVERGENCES
from .rollout_checks import samples_student_only
from .token_weights import resolve_token_weighting

if TYPE_CHECKING:
    from .config import OnPolicyDistillConfig

# Fields of a policy gradient, with the value at which they change nothing
POLICY_GRADIENT_FIELDS: dict[str, Any] = {
    "discount": 0.0,
    "advantage_clip": None,
    "return_horizon": None,
    "return_from_next": False,
    "return_normalization": False,
    "advantage_signal": "log_ratio",
    "advantage_power": 0.0,
    "advantage_baseline": "none",
    "advantage_floor": None,
}
# Statistics of tokens that are known of a teacher's log-prob of the sampled token alone
_SAMPLED_STATS = frozenset(
    {
        "mask",
        "completion_ids",
        "student_logprobs",
        "teacher_logprobs",
        "student_entropy",
        "step_index",
        "sampler_logprobs",
        "reward_advantages",
    }
)


def check_slots(args: "OnPolicyDistillConfig") -> None:
    """Refuse combinations of slots that have no meaning or would silently train something else."""
    _check_credit(args)
    if args.credit in ("policy_gradient", "combined"):
        _check_policy_gradient(args)
    else:
        _check_no_policy_gradient(args)
    _check_rollouts(args)
    _check_target(args)
    _check_rewards(args)
    _check_weights(args)


def why_distributions(args: "OnPolicyDistillConfig") -> str | None:
    """The field for which a policy gradient must know the teacher's distribution; `None` if there is none."""
    if args.advantage_baseline == "kl":
        return "advantage_baseline='kl'"
    if args.advantage_signal == "teacher_q":
        return "advantage_signal='teacher_q'"
    for weighting in resolve_token_weighting(args.token_weighting):
        lacking = set(weighting.needs) - _SAMPLED_STATS
        if lacking:
            return f"token_weighting {weighting.name!r} (it needs {', '.join(sorted(lacking))})"
    return None


def _check_credit(args: "OnPolicyDistillConfig") -> None:
    if args.credit in ("direct", "combined") and args.support == "sampled":
        raise ValueError(
            f"support must be a vocabulary support with credit={args.credit!r}, got 'sampled'. Backpropagating the "
            "sampled token's log-ratio has a zero mean gradient: the teacher drops out of it. Set "
            "credit='policy_gradient' for the sampled-token form, or support='full'."
        )
    if args.credit in ("policy_gradient", "k2"):
        reason = why_distributions(args)
        if args.support != "sampled" and reason is None:
            raise ValueError(
                f"support must be 'sampled' with credit={args.credit!r}, got {args.support!r}. It uses the teacher's "
                "and the student's log-prob of the sampled token and nothing else. Set support='sampled', or "
                "credit='direct'."
            )
        if args.support == "sampled" and reason is not None:
            raise ValueError(
                f"support must be a vocabulary support with {reason}, got 'sampled'. It needs more of the teacher "
                "than its log-prob of the sampled token. Set support='full', or leave that out."
            )
    if args.credit == "k2" and args.divergence != "reverse_kl":
        raise ValueError(
            f"divergence must be 'reverse_kl' with credit='k2', got {args.divergence!r}. Half the squared log-ratio "
            "has the reverse KL's mean gradient and no other's. Set divergence='reverse_kl', or credit='direct'."
        )
    if args.credit != "direct" and args.divergence_temperature != args.temperature:
        raise ValueError(
            f"distill_temperature must equal temperature ({args.temperature}) with credit={args.credit!r}, got "
            f"{args.distill_temperature!r}. The teacher would be compared with a distribution that the tokens were "
            "not sampled from. Leave distill_temperature unset."
        )
    if args.temperature_adaptation and args.credit != "direct":
        raise ValueError(
            f"temperature_adaptation must be unset with credit={args.credit!r}, got {args.temperature_adaptation!r}. "
            "The tokens were sampled at one temperature. Unset it, or set credit='direct'."
        )
    if args.direct_coef != 1.0 and args.credit != "combined":
        raise ValueError(
            f"direct_coef must be unset with credit={args.credit!r}, got {args.direct_coef!r}. It weighs the "
            "divergence beside a policy gradient. Set credit='combined', or use distill_coef."
        )


def _check_policy_gradient(args: "OnPolicyDistillConfig") -> None:
    if args.credit == "policy_gradient" and args.divergence not in POLICY_GRADIENT_DIVERGENCES:
        names = ", ".join(POLICY_GRADIENT_DIVERGENCES)
        raise ValueError(
            f"divergence must be an f-divergence with credit='policy_gradient', got {args.divergence!r}. Only theirs "
            f"have an advantage that is a function of the sampled token's log-ratio: {names}. Choose one of them, "
            "or credit='direct'."
        )
    shaped = args.advantage_power != 0.0
    if shaped and (args.divergence != "reverse_kl" or args.advantage_baseline != "none"):
        raise ValueError(
            f"advantage_power must be 0 with divergence={args.divergence!r} and "
            f"advantage_baseline={args.advantage_baseline!r}, got {args.advantage_power!r}. It replaces the "
            "log-ratio, which those are made for. Unset it, or them."
        )
    if args.return_horizon is not None and args.advantage_signal == "log_ratio" and args.discount == 0:
        raise ValueError(
            f"return_horizon must be unset with discount=0, got {args.return_horizon!r}. Later tokens have no weight "
            "at all. Set discount above 0 (1.0 sums them as they are)."
        )
    if args.return_normalization and args.discount == 0:
        raise ValueError(
            "return_normalization must be unset with discount=0. There are no returns: each token's own gap would be "
            "divided by the length that is left. Unset it, or set discount above 0."
        )
    if args.return_from_next and args.discount == 0:
        raise ValueError(
            "return_from_next must be unset with discount=0. Without a token's own gap and without later ones its "
            "advantage is 0: nothing would be trained. Set discount above 0."
        )
    if args.advantage_signal == "teacher_q":
        for name in ("discount", "return_from_next", "return_normalization", "advantage_power", "advantage_floor"):
            if getattr(args, name) != POLICY_GRADIENT_FIELDS[name]:
                raise ValueError(
                    f"{name} must be unset with advantage_signal='teacher_q', got {getattr(args, name)!r}. Its "
                    "returns are sums of its own, over return_horizon tokens. Unset it."
                )


def _check_no_policy_gradient(args: "OnPolicyDistillConfig") -> None:
    fields = dict(POLICY_GRADIENT_FIELDS)
    if args.advantage_whitening == "distill":
        fields["advantage_whitening"] = "none"
    for name, identity in fields.items():
        if getattr(args, name) != identity:
            raise ValueError(
                f"{name} must be unset with credit={args.credit!r}, got {getattr(args, name)!r}. It shapes "
                "advantages, which backpropagation does not have. Unset it, or set credit='policy_gradient', "
                "support='sampled'."
            )


def _check_rollouts(args: "OnPolicyDistillConfig") -> None:
    off_policy = not samples_student_only(args)
    if args.student_fraction + args.replay_fraction > 1 and args.replay_fraction > 0:
        raise ValueError(
            f"student_fraction and replay_fraction must not exceed 1 together, got {args.student_fraction!r} and "
            f"{args.replay_fraction!r}. They are shares of the generation batches. Lower student_fraction."
        )
    if off_policy and args.credit != "direct":
        raise ValueError(
            f"credit must be 'direct' with completions that the student did not sample, got {args.credit!r}. A policy "
            "gradient is an expectation over the student's own samples. Set credit='direct', or student_fraction=1, "
            "replay_fraction=0 and injected_completions=0."
        )
    for name in ("off_policy_weight", "off_policy_divergence"):
        default = 1.0 if name == "off_policy_weight" else None
        if getattr(args, name) != default and not off_policy:
            raise ValueError(
                f"{name} must be unset with student_fraction=1, got {getattr(args, name)!r}. All completions are the "
                "student's. Unset it, or set student_fraction, replay_fraction or injected_completions."
            )
    if args.off_policy_divergence_kwargs and args.off_policy_divergence is None:
        raise ValueError(
            f"off_policy_divergence_kwargs must be unset without off_policy_divergence, got "
            f"{args.off_policy_divergence_kwargs!r}. They would be ignored. Name the divergence."
        )
    generations = args.num_generations or 1
    if args.injected_completions >= generations and args.injected_completions > 0:
        raise ValueError(
            f"injected_completions must be below num_generations ({generations}), got {args.injected_completions!r}. "
            "A completion of the student must be left in each group. Raise num_generations, or set student_fraction=0 "
            "to train on others' completions only."
        )
    if args.injected_completions == 0:
        for name, identity in (("injected_when", "always"), ("injected_shaping", None)):
            if getattr(args, name) != identity:
                raise ValueError(
                    f"{name} must be unset with injected_completions=0, got {getattr(args, name)!r}. Nothing is "
                    "injected. Set injected_completions."
                )


def _check_target(args: "OnPolicyDistillConfig") -> None:
    if args.target in ("teacher", "reward_tilt"):
        if args.target == "reward_tilt" and args.credit != "policy_gradient":
            raise ValueError(
                f"credit must be 'policy_gradient' with target='reward_tilt', got {args.credit!r}. The tilt of the "
                "sampled completion is known, that of the others is not. Set credit='policy_gradient', "
                "support='sampled', or target='teacher' beside reward_funcs."
            )
        return
    if args.credit == "combined" or (args.credit != "direct" and args.support != "sampled"):
        raise ValueError(
            f"target must be 'teacher' with credit={args.credit!r} and support={args.support!r}, got {args.target!r}. "
            "Of another target the advantage needs every model's log-prob of the sampled token. Set credit='direct', "
            "or support='sampled'."
        )
    if args.credit == "policy_gradient" and args.discount > 0:
        raise ValueError(
            f"discount must be 0 with target={args.target!r}, got {args.discount!r}. The target's normaliser drops "
            "out of the mean gradient at each token (a constant of its prefix), but not out of sums over later ones. "
            "Set discount=0."
        )
    if args.credit == "policy_gradient" and args.divergence != "reverse_kl":
        raise ValueError(
            f"divergence must be 'reverse_kl' with target={args.target!r} and a policy gradient, got "
            f"{args.divergence!r}. Others need the target's normaliser. Set divergence='reverse_kl', or "
            "credit='direct'."
        )


def _check_rewards(args: "OnPolicyDistillConfig") -> None:
    if args.reward_mix == "multiply" and args.credit != "policy_gradient":
        raise ValueError(
            f"credit must be 'policy_gradient' with reward_mix='multiply', got {args.credit!r}. The distillation "
            "scales the reward's advantages and has no loss of its own. Set credit='policy_gradient', "
            "support='sampled'."
        )
    if args.importance_weighting == "clip":
        for name in ("importance_low", "importance_high"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"{name} must be unset with importance_weighting='clip', got {getattr(args, name)!r}. GRPO's "
                    "bounds are epsilon and epsilon_high. Set importance_weighting='truncate' or 'band'."
                )
    else:
        wanted = (
            ("importance_high",) if args.importance_weighting == "truncate" else ("importance_low", "importance_high")
        )
        for name in wanted:
            if getattr(args, name) is None:
                raise ValueError(
                    f"{name} must be set with importance_weighting={args.importance_weighting!r}, got None. There is "
                    "no bound. Set it (published: 0.5 and 5 of a band, 2 to 5 of a truncation)."
                )
        low, high = args.importance_low, args.importance_high
        if (high is not None and high < 1) or (low is not None and not 0 <= low <= 1):
            raise ValueError(
                f"importance_low must be in [0, 1] and importance_high at least 1, got {low!r} and {high!r}. A token "
                "sampled by the student as it is has ratio 1, and would be cut or masked. Set bounds around 1."
            )
        if args.importance_weighting == "band" and args.importance_low >= args.importance_high:  # type: ignore[operator]
            raise ValueError(
                f"importance_low must be below importance_high, got {args.importance_low!r} and "
                f"{args.importance_high!r}. Every token would be masked. Exchange them."
            )


def _check_weights(args: "OnPolicyDistillConfig") -> None:
    for weighting in resolve_token_weighting(args.token_weighting):
        if weighting.signed and (args.credit != "policy_gradient" or args.advantage_clip is None):
            raise ValueError(
                f"credit must be 'policy_gradient' with an advantage_clip for token_weighting {weighting.name!r}, got "
                f"{args.credit!r} and {args.advantage_clip!r}. It has negative weights, which push the student away "
                "from the teacher without bound. Set credit='policy_gradient' and advantage_clip (5.0, say)."
            )
    if args.special_token_occurrence == "first" and not args.special_token_masking:
        raise ValueError(
            "special_token_occurrence must be unset without special_token_masking, got 'first'. There are no masked "
            "tokens. Name them in special_token_masking."
        )
