# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
One pass over the samples: every token that the student wrote, and what both models think of it.

Shapes: N tokens of all sequences (row by row), V vocabulary, K entries, E ids that end a completion.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..collators import MixedScores, RoutedScores, Scores, TeacherScores
from ..teachers.answers import find_bad_score
from .samples import Piece
from .scoring import Entries, distributions, entries_of, student_answer, student_pass


@dataclass
class Tokens:
    """
    Tokens of the student, with NaN where something is not known. Log-probs are at `divergence_temperature`.

    Args:
        row (`torch.Tensor`): Index of its completion, `(N,)`.
        position (`torch.Tensor`): Its place in the completion, `(N,)`.
        ids (`torch.Tensor`): The token, `(N,)`.
        distilled (`torch.Tensor`): Whether the distillation trains it, boolean `(N,)`.
        last (`torch.Tensor`): Whether it ends its completion, boolean `(N,)`.
        student (`torch.Tensor`), entropy (`torch.Tensor`): The student's log-prob and entropy, `(N,)`.
        excess (`torch.Tensor`), variance (`torch.Tensor`):
            Its log-prob at the sampling temperature less its expectation, and the variance of it, `(N,)`.
        end (`torch.Tensor`), own_rank (`torch.Tensor`): Its probability of an end, and its rank of the token, `(N,)`.
        teacher (`torch.Tensor`), rank (`torch.Tensor`): The teacher's log-prob of it, and its rank there, `(N,)`.
        best (`torch.Tensor`), best_logprob (`torch.Tensor`): The teacher's likeliest entry, -1 if not known, `(N,)`.
        reverse_kl, forward_kl, overlap (`torch.Tensor`): Of the run's head; of a target, the teacher's, `(N,)`.
    """

    row: Tensor
    position: Tensor
    ids: Tensor
    distilled: Tensor
    last: Tensor
    student: Tensor
    entropy: Tensor
    excess: Tensor
    variance: Tensor
    end: Tensor
    own_rank: Tensor
    teacher: Tensor
    rank: Tensor
    best: Tensor
    best_logprob: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    overlap: Tensor

    @property
    def gap(self) -> Tensor:
        """Teacher's less student's log-prob, `(N,)`."""
        return self.teacher - self.student

    def pick(self, tokens: Tensor) -> "Tokens":
        """Some tokens, boolean `(N,)`."""
        return Tokens(**{f.name: getattr(self, f.name)[tokens] for f in fields(Tokens)})

    def __len__(self) -> int:
        return len(self.row)


@dataclass
class Answered:
    """A piece, the teachers' answers about it, and the student's log-probs of the entries that they name."""

    piece: Piece
    entries: list[Entries]
    student: list[Entries] = field(default_factory=list)


def measure(batch: Piece) -> tuple[Tokens, list[Answered]]:
    """
    Ask the teacher about a batch, and look at every token.

    Raises:
        TeacherScoreError, ...: What the teacher raises, and `ValueError` for scores that are not finite.
    """
    parts, answered, row = [], [], 0
    for piece in batch.split():
        scores = piece.ask()
        bad = find_bad_score(scores, piece.mask)
        if bad is not None:
            raise ValueError(f"its score of completion token {bad[1]} is {bad[2]}")
        student = student_answer(piece)
        entries = entries_of(piece, scores)
        looked_up = [x for x in entries if x.ids is not None]
        at_ids = [_student_entries(piece, student, x) for x in looked_up]
        tokens = _tokens(piece, student, scores, entries)
        tokens.row += row
        row += len(piece.completion_ids)
        parts.append(tokens)
        answered.append(Answered(piece, entries, at_ids))
    joined = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Tokens)}
    return Tokens(**joined), answered


def _student_entries(piece: Piece, student: TeacherScores, theirs: Entries) -> Entries:
    """The student's log-probs of a teacher's entries."""
    assert theirs.ids is not None and student.hidden_states is not None
    mask = _mask_of(piece, theirs)
    found, start = [], 0
    for logprobs in distributions(piece, student, mask):
        ids = theirs.ids[start : start + len(logprobs)]
        start += len(logprobs)
        known = (ids >= 0) & (ids < logprobs.shape[1])
        found.append(logprobs.gather(-1, ids.clamp(0, logprobs.shape[1] - 1)).masked_fill(~known, -torch.inf))
    values = torch.cat(found) if found else torch.zeros(theirs.ids.shape)
    return Entries(theirs.name, theirs.rows, ids=theirs.ids, logprobs=values)


def _mask_of(piece: Piece, entries: Entries) -> Tensor:
    """The tokens that an answer is about, `(B, T)`."""
    rows = torch.zeros(len(piece.completion_ids), dtype=torch.bool, device=piece.mask.device)
    rows[entries.rows] = True
    return piece.mask & rows[:, None]


def _tokens(piece: Piece, student: TeacherScores, scores: Scores, entries: list[Entries]) -> Tokens:
    trainer, mask = piece.trainer, piece.loss_mask
    where = mask.nonzero()
    ids = piece.completion_ids[mask]
    unknown = torch.full_like(ids, torch.nan, dtype=torch.float64)
    ends = torch.tensor(sorted(set(trainer.eos_token_ids)), device=ids.device)
    own = _student_columns(piece, student, ends)
    tokens = Tokens(
        row=where[:, 0].clone(),
        position=where[:, 1],
        ids=ids,
        distilled=piece.mask[mask],
        last=torch.isin(ids, ends),
        **own,
        **{n: unknown.clone() for n in ("teacher", "rank", "best_logprob", "reverse_kl", "forward_kl", "overlap")},
        best=torch.full_like(ids, -1),
    )
    for found in entries:
        if not found.partial:  # what a mixture says of a token is not what one of its members says
            _fill(tokens, _mask_of(piece, found)[mask], found)
    if trainer.objective.uses_distributions:
        _fill_divergences(tokens, piece, scores, mask)
    return tokens


def _fill(tokens: Tokens, inside: Tensor, found: Entries) -> None:
    for name, values in (("teacher", found.sampled), ("rank", found.ranks)):
        if values is not None:
            getattr(tokens, name)[inside] = values.double()
    if found.ids is not None and found.logprobs is not None and found.ids.numel():
        value, place = found.logprobs.max(-1)
        tokens.best_logprob[inside] = value.double()
        tokens.best[inside] = found.ids.gather(-1, place[:, None])[:, 0]
        if found.sampled is None:  # those of them that are in the list
            at = (found.ids == tokens.ids[inside][:, None]) & (found.ids >= 0)
            known = found.logprobs.masked_fill(~at, -torch.inf).amax(-1).double()
            tokens.teacher[inside] = known.masked_fill(~at.any(-1), torch.nan)


def _fill_divergences(tokens: Tokens, piece: Piece, scores: Scores, mask: Tensor) -> None:
    output = student_pass(piece, scores)
    assert output.log_probs is not None and output.entropy is not None
    tokens.student, tokens.entropy = output.log_probs[mask].double(), output.entropy[mask].double()
    for name in ("reverse_kl", "forward_kl", "overlap"):
        values: Tensor | None = getattr(output, name)
        if values is not None:
            column = values[mask].double()
            column[~tokens.distilled] = torch.nan
            setattr(tokens, name, column)
    if isinstance(scores, (MixedScores, RoutedScores)) and output.teacher_logprobs is not None:
        column, missing = output.teacher_logprobs[mask].double(), tokens.teacher.isnan() & tokens.distilled
        tokens.teacher[missing] = column[missing]


def _student_columns(piece: Piece, student: TeacherScores, ends: Tensor) -> dict[str, Tensor]:
    """Of the student alone: its log-probs and entropy, and what a sample of its distribution is expected to have."""
    trainer, mask = piece.trainer, piece.loss_mask
    ids, start = piece.completion_ids[mask], 0
    columns: dict[str, list[Tensor]] = {n: [] for n in ("student", "entropy", "excess", "variance", "end", "own_rank")}
    for logprobs in distributions(piece, student, mask):
        tokens = ids[start : start + len(logprobs), None].clamp(max=logprobs.shape[1] - 1)
        start += len(logprobs)
        logprobs = logprobs.double() if logprobs.shape[1] < 4096 else logprobs
        own = logprobs.gather(-1, tokens)
        columns["student"].append(own[:, 0])
        columns["own_rank"].append((logprobs > own).sum(-1) + 1)
        columns["entropy"].append(-(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1))
        columns["end"].append(logprobs[:, ends[ends < logprobs.shape[1]]].exp().sum(-1))
        # At the sampling temperature: logits are these log-probs times τ, up to a constant
        scale = trainer.args.divergence_temperature / trainer.temperature
        sampled = (logprobs * scale).log_softmax(-1)
        weights = sampling_probs(trainer, sampled)
        finite = sampled.clamp(min=-1e4)
        mean = (weights * finite).sum(-1)
        columns["excess"].append(finite.gather(-1, tokens)[:, 0] - mean)
        columns["variance"].append(((weights * finite.square()).sum(-1) - mean.square()).clamp(min=0))
    joined = {name: torch.cat(values).double() if values else ids[:0].double() for name, values in columns.items()}
    return joined


def sampling_probs(trainer: Any, logprobs: Tensor) -> Tensor:
    """Probabilities `(n, V)` that the student is sampled with: cut by top_k, top_p and min_p as in generation."""
    suppressed = getattr(getattr(trainer, "generation_config", None), "suppress_tokens", None) or []
    known = [i for i in suppressed if i < logprobs.shape[1]]
    if known:
        logprobs = logprobs.index_fill(-1, torch.tensor(known, device=logprobs.device), -torch.inf)
    warpers = LogitsProcessorList()
    if (trainer.top_k or 0) > 0:
        warpers.append(TopKLogitsWarper(min(trainer.top_k, logprobs.shape[1])))
    if trainer.top_p < 1.0:
        warpers.append(TopPLogitsWarper(trainer.top_p))
    if trainer.min_p:
        warpers.append(MinPLogitsWarper(trainer.min_p))
    return warpers(None, logprobs).softmax(-1)
