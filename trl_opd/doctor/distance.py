# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Checks of how far apart student and teacher are, and where: at all, by position, at the end; and of the ends."""

import math
import zlib

import torch

from ..findings import Finding
from ..teachers.base import leaves
from .exam import Exam, Means, blocked, is_known, mean_of
from .measure import Tokens
from .scoring import TOP
from .thresholds import LIMITS

_TAIL = 10_000  # characters of a completion's end that are compressed
_START = 2  # tokens at which a template or a thinking block shows
_SPECIALS = 3  # special tokens to name


def check_student_distance(exam: Exam) -> list[Finding]:
    """Whether the teacher is too far, of each of several teachers."""
    names = exam.trainer.teacher_names
    if not names:
        return [_distance(exam, exam.tokens, f"teacher {exam.name}")]
    found = []
    index = torch.cat([answered.piece.inputs["teacher_index"] for answered in exam.answered])
    for i, name in enumerate(names):
        tokens = exam.tokens.pick((index[exam.tokens.row] == i).cpu().to(exam.tokens.row.device))
        if len(tokens):
            found.append(_distance(exam, tokens, f"teacher {name!r}"))
    return found


def _distance(exam: Exam, tokens: Tokens, who: str) -> Finding:
    tokens = tokens.pick(tokens.distilled)
    gap = tokens.gap[tokens.teacher.isfinite()]
    # Of sampled tokens alone: the mean of e^ℓ − ℓ − 1, an unbiased estimate of the reverse KL that is never negative
    kl = mean_of(tokens.reverse_kl) if is_known(tokens.reverse_kl) else mean_of(torch.expm1(gap.clamp(max=50)) - gap)
    overlap, forward = mean_of(tokens.overlap), mean_of(tokens.forward_kl)
    rank = rejected = own = math.nan
    if is_known(tokens.rank):
        rank = math.exp(mean_of(tokens.rank.log()))
        width = min([TOP] + [x.ids.shape[1] for a in exam.answered for x in a.entries if x.ids is not None])
        known = ~tokens.rank.isnan()
        rejected, own = (float((x[known] > width).double().mean()) for x in (tokens.rank, tokens.own_rank))
    parts = [
        ("reverse KL {:.3g} nats", kl),
        ("forward KL {:.3g} nats", forward),
        (f"{{:.0%}} of the top {TOP} in common", overlap),
        ("sampled tokens of rank {:.2g} on average", rank),
        ("{:.0%} of them outside the teacher's top", rejected),
        ("{:.0%} outside the student's own", own),
    ]
    measured = [text.format(value) for text, value in parts if value == value]
    if not measured:
        return Finding("student_distance", "info", f"{who}: not measured, its answers name no token in common")
    seen = f"{who}: {', '.join(measured)} ({len(tokens)} tokens)"
    if overlap < LIMITS.overlap or kl > LIMITS.reverse_kl or rejected - own > LIMITS.rejected:
        return Finding(
            "student_distance",
            "warning",
            seen,
            "This teacher is far from the student (healthy runs start with about 72% in common and reach 91%, arXiv "
            f"2604.13016; the line drawn here is {LIMITS.overlap:.0%} in common, a reverse KL of "
            f"{LIMITS.reverse_kl:g}, or {LIMITS.rejected:.0%} more outside its top): what it says of the student's "
            "text is mostly that it would not have written it.",
            "First see that templates agree (chat_template, think_boundary). Then start from an SFT on some thousands "
            "of the teacher's completions (cold start), take prompts like those the teacher was trained on, mix its "
            "text in with student_fraction=0.5 and off_policy_source='teacher', or choose a nearer teacher.",
        )
    if abs(kl) < LIMITS.nothing_to_learn:
        return Finding("student_distance", "info", f"{seen}: the teacher is the student, there is nothing to learn")
    return Finding("student_distance", "ok", seen)


def check_gap_by_position(exam: Exam) -> list[Finding]:
    """Where in a completion the two disagree: its start, its course, its end."""
    tokens = exam.tokens.pick(exam.tokens.distilled & ~exam.tokens.teacher.isnan())
    if not len(tokens):
        return blocked("gap_by_position", "the teacher's log-probs of sampled tokens are not known.")
    inner = tokens.pick(~tokens.last)
    start, course = inner.position < _START, inner.position >= _START
    first, later = Means.of(inner.gap[start]), Means.of(inner.gap[course])
    found = []
    if first.below(later, LIMITS.first_tokens) and _in_most(inner.pick(start), later.mean - LIMITS.first_tokens):
        found.append(_start(exam, inner.pick(start), first, later))
    found += _drift(inner.pick(course))
    found += _end(exam, tokens.pick(tokens.last), Means.of(inner.gap))
    found += _wants_to_stop(exam, inner)
    return found or [Finding("gap_by_position", "ok", f"teacher less student, nats: {_buckets(tokens)}")]


def _in_most(tokens: Tokens, limit: float) -> bool:
    """
    Whether most completions have a token whose gap is below the limit: another beginning surprises in all of them, a
    beginning that is only wrong in some.
    """
    rows = tokens.row.unique()
    surprised = sum(bool((tokens.gap[tokens.row == row] < limit).any()) for row in rows)
    return surprised >= LIMITS.first_share * len(rows)


def buckets(tokens: Tokens) -> list[tuple[int, int, Means]]:
    """First and last position and mean gap: of 0-1, then doubling."""
    found, low, high = [], 0, _START
    last = int(tokens.position.max()) if len(tokens) else -1
    while low <= last:
        inside = (tokens.position >= low) & (tokens.position < high)
        if bool(inside.any()):
            found.append((low, high - 1, Means.of(tokens.gap[inside])))
        low, high = high, 2 * high
    return found


def _buckets(tokens: Tokens) -> str:
    return ", ".join(f"{low}-{high}: {means.mean:+.2f}" for low, high, means in buckets(tokens))


def _wants_one_beginning(tokens: Tokens) -> bool:
    """Whether the teacher would begin most completions with one token (where it is known which), as templates do."""
    best = tokens.best[(tokens.position == 0) & (tokens.best >= 0)]
    return not len(best) or int(best.unique(return_counts=True)[1].max()) >= LIMITS.one_beginning * len(best)


def _start(exam: Exam, tokens: Tokens, first: Means, later: Means) -> Finding:
    worst = tokens.pick(tokens.position == tokens.position[tokens.gap.argmin()])
    place, best = int(worst.position[0]), int(worst.best[worst.gap.argmin()])
    token = exam.shown(int(worst.ids[worst.gap.argmin()]))
    wanted = f", where the teacher would write {exam.shown(best)}" if best >= 0 else ""
    seen = (
        f"tokens 0 and 1: the gap is {first.mean:+.2f} nats, later {later.mean:+.2f}; most at token {place}, {token}"
        f"{wanted}"
    )
    if not _wants_one_beginning(tokens):
        return Finding(
            "gap_by_position",
            "info",
            f"{seen}. It would begin each completion with a token of its own",
            "Its answers begin otherwise in substance, not in form: this is what there is to learn first.",
        )
    return Finding(
        "gap_by_position",
        "warning",
        seen,
        "A teacher that is surprised by the first tokens alone expects another beginning of an answer: its chat "
        "template, or an open or closed block of thoughts, is not the one that the student's prompt ends in.",
        "Compare the rendered prompts (chat_template, think_boundary); set teacher_chat_template, "
        "teacher_chat_template_kwargs or chat_template_kwargs={'enable_thinking': ...} so that both end alike.",
    )


def _drift(tokens: Tokens) -> list[Finding]:
    parts = [part for part in buckets(tokens) if part[2].num > 1]
    if len(parts) < 3 or not parts[-1][2].below(parts[0][2], LIMITS.drift):
        return []
    return [
        Finding(
            "gap_by_position",
            "info",
            f"the gap grows along the completions, from {parts[0][2].mean:+.2f} to {parts[-1][2].mean:+.2f} nats: "
            f"{_buckets(tokens)}",
            "The student drifts to where the teacher would not be, and its judgement there is worth less.",
            "Begin with a smaller max_completion_length, or schedule it (schedules={'max_completion_length': ...}).",
        )
    ]


def _end(exam: Exam, tokens: Tokens, others: Means) -> list[Finding]:
    """Ends that the teacher would not have written."""
    if not len(tokens):
        return []
    gap = Means.of(tokens.gap)
    few = Means(gap.mean, 0.0, gap.num)  # with one or two ends there is no standard error
    if not (gap if gap.num > 2 else few).below(others, LIMITS.end):
        return []
    worst = int(tokens.gap.argmin())
    best = int(tokens.best[worst])
    instead = f" (it would write {exam.shown(best)})" if best >= 0 else ""
    return [
        Finding(
            "gap_by_position",
            "warning",
            f"the end {exam.shown(int(tokens.ids[worst]))}: the gap is {gap.mean:+.2f} nats at {gap.num} ends, and "
            f"{others.mean:+.2f} elsewhere{instead}",
            "The teacher does not end its answers with this token: the student unlearns to stop, and its completions "
            "explode in length.",
            "Give both one end of turn (the tokenizer's eos_token, generation_config.eos_token_id), or leave it out "
            f"of the distillation with special_token_masking=[{exam.written(int(tokens.ids[worst]))!r}].",
        )
    ]


def _wants_to_stop(exam: Exam, tokens: Tokens) -> list[Finding]:
    """Places inside completions where the teacher would end."""
    trainer = exam.trainer
    ends = set(trainer.eos_token_ids)
    for leaf in leaves(exam.teacher):
        config = getattr(getattr(leaf, "model", None), "generation_config", None)
        declared = getattr(config, "eos_token_id", None)
        ends |= set(declared if isinstance(declared, list) else [] if declared is None else [declared])
    at = torch.isin(tokens.best, torch.tensor(sorted(ends), device=tokens.best.device))
    at &= tokens.best_logprob > math.log(0.5)
    rows = set(tokens.row[at].tolist())
    num = len(set(exam.tokens.row.tolist()))
    if len(rows) < LIMITS.end_share * num:
        return []
    found = tokens.pick(at)
    end, token = int(found.best[0]), int(found.ids[0])
    instead = f"where the student goes on with {exam.shown(token)}"
    if end == token:
        instead = "which the student writes too, and goes on"
    return [
        Finding(
            "gap_by_position",
            "warning",
            f"in {len(rows)} of {num} completions the teacher would have stopped with {exam.shown(end)}, {instead}",
            "The student does not know where an answer ends, or its end is not the teacher's: what follows is text "
            "that the teacher never learnt to judge.",
            "Add that token to generation_config.eos_token_id of the student, or compare the chat templates; a short "
            "SFT on the teacher's completions teaches the end.",
        )
    ]


def check_truncation(exam: Exam) -> list[Finding]:
    """Completions that were cut, and why they did not end."""
    trainer, samples = exam.trainer, exam.samples
    ends = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
    cut = [i for i, ids in enumerate(samples.completion_ids) if not ids or ids[-1] not in ends]
    num, limit = len(samples.completion_ids), trainer.max_completion_length
    lengths = [len(ids) for ids in samples.completion_ids]
    seen = f"{len(cut)} of {num} completions were cut at max_completion_length={limit} (mean length {sum(lengths) / num:.0f})"  # noqa: E501
    if len(cut) <= LIMITS.truncated * num:
        return [Finding("truncation", "ok", seen)]
    ratios = [repetition(samples.texts[i]) for i in cut]
    looping = sum(ratio > LIMITS.repetition for ratio in ratios)
    why = "A completion that is cut has no end to learn from, and lengths that jump come before most collapses."
    end = float(exam.tokens.end.max()) if len(exam.tokens) else math.nan
    others = _written_specials(exam, cut)
    if looping > len(cut) / 2:
        seen += f"; {looping} of them repeat themselves (compressed {max(ratios):.0f} times)"
        do = "Raising the limit would not help: lower temperature or top_p (0.9), start from an SFT that teaches answers which end, or use an instruct model."  # noqa: E501
    elif others:
        seen += f"; inside they write {others}, which ends none"
        do = (
            "Make it an end: set generation_config.eos_token_id (a list) of the student, or the tokenizer's eos_token."
        )
    elif end < LIMITS.end_probability:
        names = " or ".join(exam.shown(i) for i in sorted(set(trainer.eos_token_ids)))
        seen += f"; nowhere does the student give {names} more than {end:.1e}"
        do = "Its end is another token, or it never learnt one: set the tokenizer's eos_token (generation_config.eos_token_id) to what its chat template ends with, or start from an SFT."  # noqa: E501
    else:
        seen += "" if math.isnan(end) else f"; the student knows its end (it gives it up to {end:.2g})"
        do = f"Raise max_completion_length to about {2 * limit}, or take shorter tasks."
    return [Finding("truncation", "warning", seen, why, do)]


def repetition(text: str) -> float:
    """Bytes over compressed bytes of a text's end: above 10 it repeats itself."""
    tail = text[-_TAIL:].encode()
    return len(tail) / len(zlib.compress(tail)) if tail else 0.0


def _written_specials(exam: Exam, cut: list[int]) -> str:
    """Special tokens that cut completions contain, most of them."""
    trainer = exam.trainer
    tokenizer = trainer._tokenizer
    ends = {*trainer.eos_token_ids, tokenizer.pad_token_id}
    special = {i for i in getattr(tokenizer, "all_special_ids", []) if i not in ends}
    counts = {i: sum(i in exam.samples.completion_ids[row] for row in cut) for i in special}
    often = sorted((i for i, n in counts.items() if n > len(cut) / 2), key=lambda i: -counts[i])
    return ", ".join(exam.shown(i) for i in often[:_SPECIALS])
