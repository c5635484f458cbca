# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Why each alarm matters, and what to try: fields of the configuration, in the order in which to try them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """What follows from a sign (`why`), and the remedies (`do`)."""

    why: str
    do: str


# By alarm, or "alarm: kind"
ADVICE: Mapping[str, Advice] = {
    "truncation_and_repetition": Advice(
        "Completions that end in loops until they are cut: this comes some 30 steps before a collapse, and the "
        "student goes on to learn from its own loops.",
        "Go back to a checkpoint before the jump, with half the learning_rate. Set mask_truncated_completions=True, "
        "or a shorter max_completion_length to begin with. Weigh the tokens (token_weighting) or mix in the forward "
        "KL (divergence='generalized_jsd'). Run `trl-opd doctor`: a student that never sees the EOS token its "
        "teacher ends with does this from the first step on.",
    ),
    "entropy_collapse": Advice(
        "The student hardly samples alternatives any more. The reverse KL cannot bring back what is never sampled, "
        "and groups of completions become equal.",
        "Mix in the forward KL (divergence='generalized_jsd', or 'entropy_gated_kl'), sample at temperature=1.0 "
        "without top_k or top_p, lower the learning_rate; with rewards lower reward_coef, or set entropy_coef.",
    ),
    "overlap_stalled": Advice(
        "The student does not come nearer to this teacher: their likeliest tokens stay apart. In runs that succeed "
        "their overlap rises from the first steps on. Further steps cost, and teach little.",
        "Take a nearer teacher (a smaller one, or of the student's own family), or fine-tune the student on some of "
        "the teacher's answers first (an SFT cold start), with prompts such as the teacher was trained on. Run "
        "`trl-opd doctor` for templates and tokens that differ. If overlap and KL are steady rather than stuck, "
        "raise the learning_rate.",
    ),
    "kl_spike": Advice(
        "The student has left the teacher faster than the loss can pull it back. What it samples from here on is "
        "text that the teacher has hardly anything to say about.",
        "Go back to the last checkpoint with half the learning_rate, a longer warmup_steps or a smaller "
        "max_grad_norm. With policy gradients set advantage_clip, or credit='direct'. With several steps on the same "
        "completions (steps_per_generation, num_iterations) take fewer.",
    ),
    "gradient_norm": Advice(
        "The loss has become steep: steps of this size undo what was learnt, and Adam's moments keep them for many "
        "more.",
        "Go back to the last checkpoint with half the learning_rate and a smaller max_grad_norm. With policy "
        "gradients set advantage_clip. With a sampled support take support='student_top_k', whose gradient is less "
        "noisy. Look in `trl-opd report` at the tokens with the largest gaps, and mask them (special_token_masking) "
        "if they are a template's.",
    ),
    "gradient_norm: not finite": Advice(
        "A step with this gradient destroys the student, or is skipped.",
        "Train in bf16 instead of fp16 (or cast_lm_head_to_fp32=True), and lower the learning_rate. Go back to the "
        "last checkpoint: later ones may hold NaN.",
    ),
    "empty_completions": Advice(
        "There is nothing to distil in a completion that ends at once, and its end token is then the only thing "
        "trained.",
        "Run `trl-opd doctor`: the chat template may end the turn for the student, or its end token may be the "
        "padding token. Mask the end token (special_token_masking), set min_new_tokens in generation_kwargs, and "
        "lower the learning_rate or reward_coef if rewards favour short answers.",
    ),
    "teacher_disagreement": Advice(
        "The student writes ever more tokens that are not among the teacher's likeliest. On such text the teacher's "
        "distribution is no guide.",
        "Lower the learning_rate, or reward_coef if rewards pull the other way. Take a nearer teacher or an SFT cold "
        "start, shorten max_completion_length (teachers are least reliable late in a text that is not theirs), or "
        "weigh the tokens (token_weighting). Run `trl-opd doctor` for templates and tokens that differ.",
    ),
    "teacher_disagreement: several": Advice(
        "The student follows one teacher and not the other: where their prompts look alike, they pull it in "
        "different directions, and the one with fewer or weaker tokens loses.",
        "Balance the prompts of the dataset's `teacher` column, tell the tasks apart in the prompts, or distil one "
        "teacher after the other. Compare the farther one with `trl-opd doctor`: its template or tokens may differ.",
    ),
    "reward_falls_with_kl": Advice(
        "The student comes nearer to the teacher and further from the task: it copies what the teacher does, answers "
        "included that score worse than its own did.",
        "Raise reward_coef over distill_coef (or decay distill_coef with schedules), gate the distillation by the "
        "reward (reward_mix='gate'), or take a teacher that is better at this task: check its own reward first. Keep "
        "the checkpoint with the best reward.",
    ),
    "not_a_number": Advice(
        "The optimizer turns one NaN into a student of NaN. What follows is lost.",
        "Go back to the last checkpoint. Train in bf16 instead of fp16, give the teacher a dtype that does not "
        "overflow (teacher_model_init_kwargs={'dtype': 'bfloat16'}), and look for tokens to which the teacher gives "
        "no probability (`trl-opd doctor` compares the vocabularies).",
    ),
}


def advice_for(alarm: str, kind: str = "") -> Advice:
    """Of an alarm, and of one of its kinds."""
    return ADVICE[f"{alarm}: {kind}" if kind else alarm]
