# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What an entry of the catalogue holds: one method of the literature, and how this library expresses it."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SLOTS: Mapping[str, tuple[str, ...]] = {
    "rollout": (
        "student_fraction",
        "replay_fraction",
        "replay_size",
        "off_policy_source",
        "off_policy_weight",
        "off_policy_divergence",
        "off_policy_divergence_kwargs",
        "injected_completions",
        "injected_when",
        "injected_shaping",
        "num_generations",
        "temperature",
        "top_p",
        "top_k",
        "max_completion_length",
    ),
    "teacher": (),
    "view": ("teacher_sync", "teacher_sync_steps", "teacher_sync_rate", "teacher_chat_template"),
    "target": ("target", "target_kwargs", "distill_temperature"),
    "divergence": ("divergence", "divergence_kwargs"),
    "support": ("support", "support_size", "support_tail"),
    "credit": (
        "credit",
        "direct_coef",
        "discount",
        "return_horizon",
        "return_from_next",
        "return_normalization",
        "advantage_signal",
        "advantage_power",
        "advantage_baseline",
        "advantage_floor",
        "advantage_clip",
        "advantage_whitening",
        "importance_weighting",
        "importance_low",
        "importance_high",
        "ratio_anchor",
        "num_iterations",
        "epsilon",
        "epsilon_high",
        "loss_type",
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_max",
    ),
    "weight": ("token_weighting", "temperature_adaptation", "special_token_masking", "special_token_occurrence"),
    "reward": (
        "reward_mix",
        "reward_mix_kwargs",
        "distill_coef",
        "reward_coef",
        "scale_rewards",
        "beta",
        "entropy_coef",
        "mask_truncated_completions",
    ),
    "schedule": ("schedules", "sample_weighting"),
}
SLOT_OF: Mapping[str, str] = {name: slot for slot, names in SLOTS.items() for name in names}


@dataclass(frozen=True)
class Need:
    """What a method needs beside prompts: in words, how to give it, the slot it fills, the fields that ask for it."""

    what: str
    give: str
    slot: str
    fields: tuple[str, ...] = ()


NEEDS: Mapping[str, Need] = {
    "teacher_prompt": Need(
        "the dataset column `teacher_prompt`, or the argument teacher_view",
        "Add the column (text or messages: what the teacher sees instead of the prompt), or pass teacher_view=",
        "view",
    ),
    "several_teachers": Need(
        "a teacher for each sample: a dict of teachers and the dataset column `teacher`",
        'Pass teacher_model={"math": ..., "code": ...} and a column `teacher` with its keys',
        "teacher",
    ),
    "mixture": Need(
        "several teachers for every sample: the argument teacher_model as a MixtureTeacher",
        "Pass teacher_model=MixtureTeacher([...], weights, mixture)",
        "teacher",
    ),
    "reference_model": Need(
        "the argument reference_model",
        "Pass reference_model= (a path, a model, 'base', 'self', a URL)",
        "target",
        ("target",),
    ),
    "two_references": Need(
        "two models in the argument reference_model",
        "Pass reference_model=[first, second]",
        "target",
        ("target",),
    ),
    "rewards": Need(
        "the argument reward_funcs (a verifier)",
        "Pass reward_funcs=",
        "reward",
    ),
    "demonstrations": Need(
        "the dataset column `completion`",
        "Add the column (the completions that the student did not sample)",
        "rollout",
        ("student_fraction", "replay_fraction", "off_policy_source", "injected_completions"),
    ),
    "generating_teacher": Need(
        "a teacher in this process, which can sample completions",
        "Pass teacher_model= as a path or a model",
        "rollout",
        ("student_fraction", "off_policy_source", "injected_completions"),
    ),
    "group": Need(
        "several completions a prompt",
        "Set num_generations to at least 2",
        "rollout",
        ("num_generations",),
    ),
    "tools": Need(
        "completions of several turns: the argument tools, rollout_func or environment_factory",
        "Pass tools=, rollout_func= or environment_factory=",
        "rollout",
    ),
}

KINDS = ("slots", "pipeline", "not_yet")
FIDELITIES = ("exact", "as published code", "approximation", "sketch")
EVIDENCE: Mapping[str, str] = {
    "V": "read in the paper or its official code",
    "S": "taken from abstracts, notes and other people's code",
    "R": "recalled, not read again",
    "U": "uncertain",
}
TEACHERS: Mapping[str, str] = {
    "FULL": "the whole vocabulary",
    "TOPK": "its top-k log-probs",
    "TOK": "log-probs of the sampled tokens",
    "TEXT": "text",
    "HIDDEN": "hidden states",
    "NONE": "nothing: there is no teacher",
}
_DEFAULT_TEACHER = "Qwen/Qwen3-8B"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """
    One method of the literature.

    Args:
        name (`str`): Value of `OnPolicyDistillConfig(recipe=...)`.
        title (`str`): Its name in print.
        paper (`str`): Title of the paper.
        authors (`str`): Surnames, separated by commas; "et al." at the end where there are more.
        year (`int`): Of publication.
        idea (`str`): Why these values, in a sentence.
        formula (`str`): The objective. s and t are the student's and the teacher's next-token distributions, y_t the
            sampled token, ℓ = log t(y_t) − log s(y_t), sg the stop-gradient; losses are minimised, A is an advantage.
        arxiv (`str`, *optional*): Its arXiv id.
        url (`str`, *optional*): Where it is, if not on arXiv.
        venue (`str`, *optional*): Where it was published.
        section (`str`, *optional*): Section of the survey arXiv 2604.00626 (version 3) that lists it.
        axes (`str`): Feedback signal / teacher access / granularity, in the survey's words.
        teacher (`str`): What the teacher has to give: keys of `TEACHERS` joined by " + ".
        kind (`str`): `"slots"` (fields of the configuration express it), `"pipeline"` (trainers of TRL do, see `how`)
            or `"not_yet"` (it needs a mechanism of its own, see `how`).
        fields (`dict[str, Any]`): Fields of the configuration that it sets.
        published (`dict[str, Any]`): Values of the paper that depend on model and budget: shown, never set.
        needs (`tuple[str, ...]`): Keys of `NEEDS`.
        fidelity (`str`, *optional*): `"exact"`, `"as published code"`, `"approximation: ..."` or `"sketch"`.
        evidence (`str`): How the formula is known, a key of `EVIDENCE`.
        left_out (`str`): What of the method is not in the fields.
        conflict (`str`): Where sources disagree, and which one is followed.
        watch (`str`): What to look at in the metrics.
        how (`str`): For the other two kinds: how to reach it, or why it is not there.
        teacher_model (`str`): What the runnable YAML names as the teacher.
        aliases (`tuple[str, ...]`): Other names that find it.
    """

    name: str
    title: str
    paper: str
    authors: str
    year: int
    idea: str
    formula: str
    arxiv: str | None = None
    url: str | None = None
    venue: str | None = None
    section: str | None = None
    axes: str = "logit / white-box / token"
    teacher: str = "FULL"
    kind: str = "slots"
    fields: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    fidelity: str | None = None
    evidence: str = "V"
    left_out: str = ""
    conflict: str = ""
    watch: str = ""
    how: str = ""
    teacher_model: str | None = _DEFAULT_TEACHER
    aliases: tuple[str, ...] = ()

    @property
    def slots(self) -> tuple[str, ...]:
        """Which of the ten slots it changes, in their order."""
        used = {SLOT_OF[name] for name in self.fields} | {NEEDS[need].slot for need in self.needs}
        if self.kind == "slots" and self.teacher_model != _DEFAULT_TEACHER:
            used.add("teacher")
        return tuple(slot for slot in SLOTS if slot in used)

    @property
    def fidelity_class(self) -> str:
        """The first word or words of `fidelity`: one of `FIDELITIES`, or the kind where there is none."""
        return self.kind if self.fidelity is None else self.fidelity.partition(":")[0]

    @property
    def link(self) -> str | None:
        """Where the paper is."""
        return self.url if self.arxiv is None else f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def citation(self) -> str:
        """Its BibTeX entry. Authors are surnames, as far as this library names them."""
        names = [name.strip() for name in self.authors.removesuffix("et al.").split(",") if name.strip()]
        names += ["others"] if self.authors.endswith("et al.") else []
        first = names[0].split()[-1].lower() if names else "anonymous"
        first = unicodedata.normalize("NFKD", first)  # an accent becomes a character of its own, and goes
        key = re.sub(r"\W", "", f"{first}{self.year}{self.name.replace('_', '')}")
        # Braces keep BibTeX from splitting a surname of two words, and from lowering a title
        authors = " and ".join(name if name == "others" else f"{{{name}}}" for name in names)
        lines = [f"title  = {{{{{self.paper}}}}}", *([f"author = {{{authors}}}"] if names else [])]
        lines.append(f"year   = {{{self.year}}}")
        if self.venue:
            lines.append(f"note   = {{{self.venue}}}")
        if self.arxiv:
            lines += [f"eprint = {{{self.arxiv}}}", "archivePrefix = {arXiv}"]
        if self.link:
            lines.append(f"url    = {{{self.link}}}")
        return f"@misc{{{key},\n" + "".join(f"    {line},\n" for line in lines) + "}"
