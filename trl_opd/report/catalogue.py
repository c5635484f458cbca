# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Which numbers of a run are drawn together, and what a healthy run looks like in each picture."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """
    One picture.

    Args:
        title (`str`): Its heading.
        metrics (`tuple[str, ...]`): What is drawn in it, where the run has it.
        unit (`str`): Of the y axis.
        healthy (`str`): One sentence: what it tells, and what a healthy run looks like.
        group (`str`): The heading under which it stands.
    """

    title: str
    metrics: tuple[str, ...]
    unit: str
    healthy: str
    group: str = ""


@dataclass(frozen=True)
class KeyNumber:
    """A number of the overview; `better` is the direction of a healthy run, where there is one."""

    metric: str
    title: str
    unit: str
    better: str = ""  # "down", "up", "zero"
    percent: bool = False


NOT_SMOOTHED = frozenset({"num_tokens", "learning_rate"})  # without noise: a mean would only shift them
KEY_NUMBERS = (
    KeyNumber("distill/reverse_kl", "Reverse KL", "nats", "down"),
    KeyNumber("distill/overlap", "Top-k overlap", "", "up", percent=True),
    KeyNumber("distill/overlap_advantage", "Overlap advantage", "nats", "zero"),
    KeyNumber("distill/student_entropy", "Student entropy", "nats"),
    KeyNumber("distill/teacher_entropy", "Teacher entropy", "nats"),
    KeyNumber("distill/entropy_gap", "Entropy gap", "nats", "down"),
    KeyNumber("completions/mean_length", "Length", "tokens"),
    KeyNumber("completions/clipped_ratio", "Truncated", "", "", percent=True),
    KeyNumber("reward", "Reward", "", "up"),
    KeyNumber("grad_norm", "Gradient norm", ""),
)

GROUPS: dict[str, tuple[Chart, ...]] = {
    "Divergences": (
        Chart(
            "Reverse and forward KL",
            ("distill/reverse_kl", "distill/forward_kl"),
            "nats per token",
            "The distance to the teacher on the student's own completions: it should fall, fast at first and then "
            "slowly; a sudden spike comes before many collapses.",
        ),
        Chart(
            "Log-prob gap of the sampled tokens",
            ("distill/teacher_student_gap",),
            "nats",
            "Teacher's minus student's log-prob of what the student sampled: below zero at the start, it should rise "
            "towards zero.",
        ),
        Chart(
            "Divergence that is trained",
            ("distill/divergence",),
            "nats per token",
            "The divergence to the target, where the target is not the plain teacher: it should fall as the target "
            "allows.",
        ),
        Chart(
            "Loss",
            ("loss", "distill/loss"),
            "",
            "The distillation term should fall on the whole; with rewards or a policy gradient its level says little, "
            "the KLs say more.",
        ),
        Chart(
            "Weight of the target",
            ("distill/target_coef",),
            "",
            "The coefficient of a target that moves, as its schedule or its rule sets it.",
        ),
    ),
    "Overlap with the teacher": (
        Chart(
            "Top-k overlap",
            ("distill/overlap",),
            "share",
            "The share of the student's likeliest tokens that are the teacher's too: in runs that work it rises (in "
            "the literature from about 72% to 91%); where it stands still the teacher is too far away.",
        ),
        Chart(
            "Overlap advantage",
            ("distill/overlap_advantage",),
            "nats",
            "How much better the teacher likes its own likeliest tokens than the student's: below zero, and it should "
            "approach zero.",
        ),
        Chart(
            "Teacher's rank of the sampled tokens",
            ("distill/teacher_rank",),
            "rank",
            "The geometric mean of where the student's tokens stand in the teacher's order: 1 is its favourite, and "
            "the curve should fall towards it.",
        ),
        Chart(
            "Tokens that the teacher rejects",
            ("distill/rejected_share",),
            "share",
            "The share of sampled tokens that are not among the teacher's likeliest: it should fall, to the few per "
            "cent that sampling always leaves.",
        ),
    ),
    "Entropies": (
        Chart(
            "Entropy of student and teacher",
            ("distill/student_entropy", "distill/teacher_entropy", "entropy"),
            "nats",
            "The student should approach the teacher and stay there; a student that falls far below it is collapsing.",
        ),
        Chart(
            "Entropy gap",
            ("distill/entropy_gap",),
            "nats",
            "The mean distance of the two entropies, token by token: it should narrow.",
        ),
    ),
    "Completions": (
        Chart(
            "Length",
            ("completions/mean_length", "completions/min_length", "completions/max_length"),
            "tokens",
            "Lengths should drift towards the teacher's and settle; a jump to the limit, or a fall to nothing, is a "
            "failure on its way.",
        ),
        Chart(
            "Length of the completions that ended",
            (
                "completions/mean_terminated_length",
                "completions/min_terminated_length",
                "completions/max_terminated_length",
            ),
            "tokens",
            "The same without truncated completions: if it stays while the length above rises, completions do not end "
            "any more.",
        ),
        Chart(
            "Truncated and repetitive completions",
            ("completions/clipped_ratio", "completions/repetitive_share"),
            "share",
            "Both should stay low; when they jump together, the collapse is about thirty steps away.",
        ),
        Chart(
            "Repetition",
            ("completions/repetition",),
            "zlib ratio",
            "How far the ends of the completions can be compressed: prose stands at 2 to 4 and should stay there, "
            "above 10 it is a loop.",
        ),
        Chart(
            "Distinct and empty completions",
            ("completions/distinct_share", "completions/empty_share"),
            "share",
            "Distinct near 1 and empty near 0 are healthy; a fall of the first is mode collapse, a rise of the second "
            "a student that answers nothing.",
        ),
    ),
    "Rewards": (
        Chart(
            "Reward",
            ("reward",),
            "",
            "It should rise or hold; a reward that falls while the KL falls means that the teacher teaches something "
            "else than the task.",
        ),
        Chart(
            "Reward functions",
            (r"re:rewards/.+/mean",),
            "",
            "The mean of each reward function: the one that falls is the one the sum hides.",
        ),
        Chart(
            "Spread of the rewards",
            ("reward_std", r"re:rewards/.+/std", "frac_reward_zero_std"),
            "",
            "Without a spread inside the groups the policy-gradient term has nothing to learn from.",
        ),
        Chart(
            "Correlation of reward and distillation signal",
            ("distill/reward_correlation",),
            "Pearson",
            "Above zero, teacher and reward want the same; clearly below zero, they pull against each other.",
        ),
    ),
    "Optimizer": (
        Chart(
            "Gradient norm",
            ("grad_norm",),
            "",
            "Before clipping; it should stay in its range, with rare spikes: a steady rise asks for a lower learning "
            "rate.",
        ),
        Chart(
            "Learning rate",
            ("learning_rate",),
            "",
            "As the schedule has it: for LoRA about 1e-4, for all weights about 1e-6 to 2e-5 are common.",
        ),
        Chart(
            "KL to the reference model",
            ("kl",),
            "nats per token",
            "GRPO's own penalty: how far the student has moved from where it started; it should grow slowly.",
        ),
        Chart(
            "Clipped ratios",
            (r"re:(clip_ratio/.+|cispo_clip_ratio)",),
            "share",
            "The share of tokens that the surrogate clips: zero with fresh completions, a few per cent with reused "
            "ones.",
        ),
    ),
    "Weights and importance": (
        Chart(
            "Effective sample size",
            ("distill/effective_sample_size",),
            "share",
            "How many of the tokens carry the loss after all weights: near 1 all do, below 0.1 a few tokens decide "
            "everything.",
        ),
        Chart(
            "Share of the loss by token weight",
            ("distill/loss_share/light", "distill/loss_share/even", "distill/loss_share/heavy"),
            "share",
            "Where the loss comes from: a weighting that does its work moves it to the heavy tokens, without leaving "
            "nothing for the rest.",
        ),
        Chart(
            "Weights",
            ("distill/token_weight", "distill/weighted_share", "distill/sample_weight", "distill/importance_weight"),
            "mean",
            "The means of the weights: as the weighting promises, and steady.",
        ),
        Chart(
            "Importance ratio",
            (
                "distill/importance_ratio",
                "distill/importance_ratio_max",
                r"re:sampling/importance_sampling_ratio/.+",
            ),
            "ratio",
            "The student against the policy that sampled: the mean near 1; a maximum far above it means completions "
            "that are too old, or an engine that disagrees.",
        ),
        Chart(
            "Disagreement of trainer and engine",
            (r"re:sampling/sampling_logp_difference/.+",),
            "nats",
            "Log-probs of the generation engine against the trainer's: small and flat.",
        ),
    ),
    "Speed": (
        Chart(
            "Step time and teacher wait",
            ("step_time", "distill/teacher_wait"),
            "seconds",
            "The wait for the teacher should be a small part of the step; if it is most of it, score in larger "
            "batches or with more servers.",
        ),
        Chart(
            "Tokens a second",
            ("distill/tokens_per_second",),
            "tokens/s",
            "It should be flat; it falls when completions grow, or when a server is shared.",
        ),
        Chart("Tokens seen", ("num_tokens",), "tokens", "The sum of all tokens so far: a straight line."),
        Chart(
            "Skipped",
            (r"re:distill/skipped_.+",),
            "",
            "What was left out of the training: zero, or as few as the filters explain.",
        ),
    ),
    "Tools": (
        Chart(
            "Tool calls",
            (r"re:tools/.+",),
            "per completion",
            "Calls and failures: failures should fall, and calls should not vanish with them.",
        ),
    ),
}
