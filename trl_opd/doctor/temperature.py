# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Checks of temperatures: the teacher answers at the one asked for, and the student samples at the one the loss believes.

At temperature τ the log-probs of one token are logits / τ up to a constant. So differences of two entries times τ are
the same at every τ, and across two questions the slope of one answer's differences over the other's is τ / τ'.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..collators import Scores
from ..findings import Finding
from ..teachers import CachedTeacher, LocalTeacher
from ..teachers.base import leaves
from ..teachers.replay import Replay
from .exam import Exam, blocked
from .measure import sampling_probs
from .samples import Piece
from .scoring import Entries, difference, distributions, entries_of, full_logprobs, student_answer
from .thresholds import LIMITS

_OTHER = 2.0  # times the run's temperature, asked for beside it
_NORMALIZED = 2e-3  # by which a sum of probabilities may be above 1
_FULL_TOKENS = 256
_FITTED = 1024  # tokens of which the sampling temperature is found
_LEAST_PAIRS = 30
_OTHER_ANSWERS = 0.1  # relative difference of a slope

CHECK = "temperature"


@dataclass
class Slope:
    """y ≈ slope · x over differences of entries from their token's mean."""

    slope: float
    r2: float
    num: int


def check_temperature(exam: Exam) -> list[Finding]:
    """Of the teacher."""
    found = [finding for answered in exam.answered[:1] for x in answered.entries for finding in _normalized(exam, x)]
    if exam.noise:
        return [*found, *blocked(CHECK, "the teacher does not agree with itself (see determinism).")]
    local = [leaf for leaf in leaves(exam.teacher) if isinstance(leaf, LocalTeacher)]
    if exam.is_local:  # the temperature is the loss's own, if their logits are what their head gives
        return found + _local(exam, local)
    if any(isinstance(leaf, CachedTeacher) for leaf in leaves(exam.teacher)):
        return [*found, *_shape_of(exam), Finding(CHECK, "ok", f"the scores are stored at {_tau(exam):g}, the run's")]
    return found + _asked_again(exam) + _shape_of(exam)


def _tau(exam: Exam) -> float:
    return exam.trainer.args.divergence_temperature


def _normalized(exam: Exam, entries: Entries) -> list[Finding]:
    """Lists whose probabilities cannot be those of one distribution."""
    if entries.ids is None or entries.logprobs is None or not len(entries.logprobs):
        return []
    total = entries.logprobs.double().exp().sum(-1)
    size = exam.trainer.student_vocab_size
    whole = (entries.ids >= 0).sum(-1) >= size
    over, short = float(total.max()), float(total[whole].min()) if bool(whole.any()) else 1.0
    if over <= 1 + _NORMALIZED and short >= 1 - 2 * _NORMALIZED:
        return []
    value = over if over > 1 + _NORMALIZED else short
    return [
        Finding(
            CHECK,
            "error",
            f"teacher {exam.name}: the probabilities of its {entries.ids.shape[-1]} entries sum to {value:.4g}",
            "They are not those of a distribution: its log-probs are not normalised over the vocabulary at the "
            f"temperature asked for, {_tau(exam):g}.",
            "Return log_softmax(logits / temperature) over the whole vocabulary, and take the top k of that.",
        )
    ]


def _local(exam: Exam, local: list[LocalTeacher]) -> list[Finding]:
    """Teachers in this process against their own full logits at the run's temperature."""
    found = []
    for place, leaf in enumerate(leaves(exam.teacher)):
        if leaf not in local or leaf.model is None or isinstance(leaf.model, str):
            continue
        apart = _from_logits(exam, leaf, place)
        if apart is None:
            continue
        difference_, entries = apart
        allowed = exam.allowed(entries) / 3  # of the mean
        seen = f"teacher {leaf.name!r}: log-probs in the run and from its own logits at {_tau(exam):g} differ by {difference_:.2g} nats on average"  # noqa: E501
        if difference_ <= allowed:
            found.append(Finding(CHECK, "ok", f"{seen} (allowed: {allowed:.2g})"))
            continue
        why = "The student is compared with another distribution than the teacher's at the run's temperature."
        do = "Use the teacher's own forward, without patches of it or of its lm_head. If its config.json names a logit scale that transformers applies, report the architecture."  # noqa: E501
        found.append(Finding(CHECK, "error", f"{seen} (allowed: {allowed:.2g})", why, do))
    return found or [Finding(CHECK, "ok", f"the teacher is projected at {_tau(exam):g}, as the student is")]


def _from_logits(exam: Exam, leaf: LocalTeacher, place: int) -> tuple[float, Entries] | None:
    """Mean difference of a leaf's log-probs; `None` if no sample is its own."""
    few, size = exam.few, exam.trainer.shared_vocab_size
    if few.piece.has_images:
        return None
    entries = few.entries
    routed = entries[0].name != "" and not entries[0].partial
    names = dict(zip(getattr(exam.teacher, "names", []), getattr(exam.teacher, "members", []), strict=False))
    mine = [x for i, x in enumerate(entries) if (names.get(x.name) is leaf if routed else i == place)]
    if not mine or mine[0].sampled is None or not len(mine[0].rows):
        return None
    differences = []
    for row in sorted(set(mine[0].rows.tolist()))[:2]:
        one = few.piece.select([row]).first_tokens(_FULL_TOKENS)
        with exam.trainer.accelerator.autocast(), leaf._weights():
            plain = full_logprobs(leaf.model, one.question(), _tau(exam), size, leaf.device)[one.mask]
        ours = mine[0].of_row(row).sampled
        assert ours is not None
        differences.append((ours[: len(plain)].double() - plain.double()).abs())
    return float(torch.cat(differences).mean()), mine[0]


def _asked_again(exam: Exam) -> list[Finding]:
    """Teachers that are told the temperature: asked at another one, the answers must change accordingly."""
    few, tau = exam.few, _tau(exam)
    other = tau * _OTHER
    try:
        scores: Scores = few.piece.ask(other)
    except Exception as error:
        return [Finding(CHECK, "info", f"teacher {exam.name} cannot be asked at temperature {other:g}: {error}")]
    answers = entries_of(few.piece, scores, other, like=few.entries)
    found = []
    for one, two in zip(few.entries, answers, strict=True):
        if one.dtype != two.dtype and one.ids is None and two.ids is None:
            continue
        found.append(_follows(exam, one, two, other))
    return found


def _follows(exam: Exam, one: Entries, two: Entries, other: float) -> Finding:
    tau = _tau(exam)
    same = difference(one, two, everywhere=False) <= exam.allowed(one)
    who = f"teacher {exam.name}"
    if same and tau == 1.0:
        return Finding(CHECK, "ok", f"{who} answers at 1 whatever is asked for, and the run's temperature is 1")
    why = "The student would be compared at one temperature and the teacher at another: their divergence is not 0 where they agree."  # noqa: E501
    do = "Return log_softmax(logits / batch.temperature). vLLM and SGLang ignore the temperature for the log-probs of a text: with them set distill_temperature=1.0 (and temperature=1.0 beside rewards)."  # noqa: E501
    if same:
        seen = f"{who} gives the same log-probs at temperature {other:g} as at {tau:g}, the run's: it ignores the one asked for"  # noqa: E501
        return Finding(CHECK, "error", seen, why, do)
    fit = slope_of([(one, two)])
    if fit is None:
        return Finding(CHECK, "ok", f"{who}: log-probs of the sampled tokens follow the temperature")
    expected = tau / other
    seen = f"{who}: from temperature {tau:g} to {other:g} the differences between its entries become {fit.slope:.3g} times as large"  # noqa: E501
    if abs(fit.slope / expected - 1) <= _OTHER_ANSWERS:
        return Finding(CHECK, "ok", f"{seen}, as they should ({expected:.3g})")
    return Finding(CHECK, "error", f"{seen}, and should become {expected:.3g} times", why, do)


def _shape_of(exam: Exam) -> list[Finding]:
    """A teacher that looks like the student at another temperature than the one that was asked for."""
    fit = slope_of([pair for answered in exam.answered for pair in _matched(answered.student, answered.entries)])
    if fit is None or fit.num < _LEAST_PAIRS:
        return []
    if fit.r2 < LIMITS.same_shape or not fit.slope > 0 or abs(math.log(fit.slope)) <= math.log1p(LIMITS.slope):
        return []
    return [
        Finding(
            CHECK,
            "warning",
            f"teacher {exam.name}: its log-probs are those of the student at {1 / fit.slope:.3g} times the "
            f"temperature that was asked for, {_tau(exam):g} (R² {fit.r2:.3f})",
            "Two models that differ in nothing but how sharp they are were most likely scored at two temperatures.",
            "Return log_softmax(logits / batch.temperature), divided once. Where it is meant (a sharper teacher of "
            "the same model), this is no fault.",
        )
    ]


def _matched(ours: list[Entries], theirs: list[Entries]) -> list[tuple[Entries, Entries]]:
    by_name = {x.name: x for x in ours}
    return [(by_name[x.name], x) for x in theirs if x.name in by_name and not x.partial]


def slope_of(pairs: Sequence[tuple[Entries, Entries]]) -> Slope | None:
    """Slope of the second answers over the first, over likely entries that both name; `None` if there are too few."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    for one, two in pairs:
        if one.ids is None or two.ids is None or one.logprobs is None or two.logprobs is None:
            continue
        for a, x, b, y in zip(*(t.split(256) for t in (one.ids, one.logprobs, two.ids, two.logprobs)), strict=True):
            same = (a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]
            there = torch.where(same, y.double()[:, None, :], -torch.inf).amax(-1)  # of `two`, in the places of `one`
            good = (x > LIMITS.likely) & (there > LIMITS.likely)
            for values, out in ((x.double(), xs), (there, ys)):
                kept = torch.where(good, values, 0.0)
                mean = kept.sum(-1, keepdim=True) / good.sum(-1, keepdim=True).clamp(min=1)
                out.append((kept - mean)[good])
    if not xs:
        return None
    x, y = torch.cat(xs), torch.cat(ys)
    xy, xx, yy = float((x * y).sum()), float(x.square().sum()), float(y.square().sum())
    return Slope(xy / xx, xy * xy / (xx * yy), len(x)) if min(xx, yy) > 1e-9 else None


# The student's samples


def check_sampling(exam: Exam) -> list[Finding]:
    """
    Whether the rollouts are samples of the student at the temperature that the loss believes.

    The sum of log-probs less their expectations is, over samples of a model, a martingale: over its standard deviation
    it is about normal, whatever the length of the completions.
    """
    trainer, tokens = exam.trainer, exam.tokens
    where = _settings(trainer)
    if isinstance(trainer.rollout_func, Replay):
        return blocked(CHECK, "the rollouts are stored completions, not samples of this student.")
    if trainer.repetition_penalty not in (None, 1.0):
        return blocked(CHECK, "repetition_penalty makes the samples another distribution's than the student's.")
    variance = float(tokens.variance.sum())
    if variance <= 0:
        return blocked(CHECK, "the student leaves no choice between tokens.")
    z = float(tokens.excess.sum()) / math.sqrt(variance)
    mean = float(tokens.excess.mean())
    seen = f"rollouts: the mean log-prob of {len(tokens)} sampled tokens is {mean:+.3f} nats from that of samples {where} (z = {z:.1f})"  # noqa: E501
    if abs(z) <= LIMITS.z:
        return [Finding(CHECK, "ok", seen)]
    found = fit_temperature(exam)
    if abs(found / trainer.temperature - 1) <= LIMITS.sampling:
        return [Finding(CHECK, "ok", f"{seen}, and {found:.3g} is the temperature that fits them best")]
    overrides = trainer.args.generation_kwargs
    return [
        Finding(
            CHECK,
            "error",
            f"{seen}; they look like samples at temperature {found:.2g}",
            "The loss takes them for samples of the student at its temperature: importance ratios, entropies and "
            "advantages are computed for another policy than the one that wrote the tokens.",
            (
                f"Remove what generation_kwargs={overrides!r} changes, or set temperature={found:.2g}. "
                if overrides
                else ""
            )
            + "Check that the engine samples with the trainer's temperature, top_p, top_k and min_p "
            "(vLLM: --generation-config vllm), and that a rollout_func hands them on.",
        )
    ]


def _settings(trainer: object) -> str:
    """What is believed of the sampling."""
    values = {name: getattr(trainer, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    plain = {"top_p": 1.0, "top_k": -1}
    kept = [f"{name} {value:g}" for name, value in values.items() if value and value != plain.get(name)]
    return "at " + ", ".join(kept)


def fit_temperature(exam: Exam) -> float:
    """The sampling temperature under which the sampled tokens are as likely as they should be."""
    pieces, left = [], _FITTED
    for answered in exam.answered:
        if left > 0:
            pieces.append(answered.piece)
            left -= int(answered.piece.loss_mask.sum())
    low, high = math.log(0.02), math.log(50.0)
    answers = [(piece, student_answer(piece)) for piece in pieces]
    for _ in range(24):
        middle = (low + high) / 2
        if sum(_excess(exam, *pair, math.exp(middle)) for pair in answers) > 0:  # likelier than at this temperature
            high = middle
        else:
            low = middle
    return math.exp((low + high) / 2)


def _excess(exam: Exam, piece: Piece, student: object, temperature: float) -> float:
    """Σ of the sampled tokens' logits less their expectation at a temperature; rises with it."""
    ids: Tensor = piece.completion_ids[piece.loss_mask]
    total, start = 0.0, 0
    for logprobs in distributions(piece, student, piece.loss_mask, 1.0):  # type: ignore[arg-type]
        tokens = ids[start : start + len(logprobs), None].clamp(max=logprobs.shape[1] - 1)
        start += len(logprobs)
        logprobs = logprobs.double().clamp(min=-1e4)
        weights = sampling_probs(exam.trainer, logprobs / temperature)
        total += float((logprobs.gather(-1, tokens)[:, 0] - (weights * logprobs).sum(-1)).sum())
    return total
