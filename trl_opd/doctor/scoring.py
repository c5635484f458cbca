# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What answers say of tokens, in one form for teachers of every kind, and two ways to a student's log-probs: the head of
the run, and the model's own full logits.

Shapes: B sequences, T completion tokens, N flattened tokens of a mask (row by row), V vocabulary, K entries, H hidden.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..collators import MixedScores, RoutedScores, Scores, TeacherBatch, TeacherScores
from ..distill_head import distillation_head
from ..heads import gather_heads
from ..kernels.operands import whole
from ..kernels.projection import shape_logits
from ..student import MicroBatch, StudentOutput
from ..targets import Target
from ..teachers.scoring import score_with
from .samples import Piece
from .thresholds import LIMITS, tolerance

TOP = 16  # entries that are compared, the papers' k
_CHUNK = 256  # tokens whose full distributions exist at a time


@dataclass
class Entries:
    """
    What one teacher says of N tokens.

    Args:
        name (`str`): Whose answer, where there are several.
        rows (`torch.Tensor`): The sequence of each token, `(N,)`.
        sampled (`torch.Tensor`, *optional*): Log-probs of the sampled tokens, `(N,)`.
        ids (`torch.Tensor`, *optional*): Likeliest entries, below 0 is padding, `(N, K)`.
        logprobs (`torch.Tensor`, *optional*): Their log-probs, `(N, K)`.
        ranks (`torch.Tensor`, *optional*): Rank of the sampled token, 1 is the best; K + 1 if not listed, `(N,)`.
        entropy (`torch.Tensor`, *optional*): Of whole distributions, `(N,)`.
        dtype (`torch.dtype`): Of the hidden states or the head, the coarser of them, or of the log-probs.
        partial (`bool`): Whether the teacher is one of a mixture.
    """

    name: str
    rows: Tensor
    sampled: Tensor | None = None
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    ranks: Tensor | None = None
    entropy: Tensor | None = None
    dtype: torch.dtype = torch.float32
    partial: bool = False

    def of_row(self, row: int) -> "Entries":
        """Those of one sequence, as the only one."""
        return self.pick(self.rows == row, torch.zeros_like(self.rows))

    def pick(self, tokens: Tensor, rows: Tensor | None = None) -> "Entries":
        """Some tokens, boolean `(N,)`."""
        names = ("sampled", "ids", "logprobs", "ranks", "entropy")
        values: dict[str, Any] = {n: None if getattr(self, n) is None else getattr(self, n)[tokens] for n in names}
        return replace(self, rows=(self.rows if rows is None else rows)[tokens], **values)


def named_answers(scores: Scores) -> Iterator[tuple[str, Tensor | None, TeacherScores, bool]]:
    """Every teacher's answer: its name, the sequences it is about (`None`: all), whether it is one of a mixture."""
    parts: Mapping[str, Any] = scores.parts if isinstance(scores, RoutedScores) else {"": (None, scores)}
    for name, (rows, part) in parts.items():
        members: Sequence[TeacherScores] = part.members if isinstance(part, MixedScores) else [part]
        for i, member in enumerate(members):
            several = len(members) > 1
            yield (f"{name} member {i + 1}".strip() if several else name), rows, member, isinstance(part, MixedScores)


def entries_of(
    piece: Piece, scores: Scores, temperature: float | None = None, like: Sequence[Entries] | None = None
) -> list[Entries]:
    """
    An answer about a piece, one [`Entries`] a teacher.

    Args:
        piece ([`Piece`]): The question.
        scores (`Scores`): The answer.
        temperature (`float`, *optional*): That was asked for, by default the run's.
        like (`Sequence[Entries]`, *optional*): Earlier answers about the same tokens, whose entries to look up.
    """
    wanted = {} if like is None else {entries.name: entries.ids for entries in like}
    found = []
    for name, rows, answer, partial in named_answers(scores):
        mask = piece.mask
        if rows is not None:
            mask = torch.zeros_like(mask).index_copy_(0, rows, mask[rows])
        place = mask if rows is None else mask[rows]
        where = mask.nonzero()[:, 0]
        if answer.hidden_states is not None:
            entries = dense_entries(piece, answer, place, mask, temperature, wanted.get(name))
        else:
            entries = Entries(name, where)
            if answer.topk_ids is not None and answer.topk_logprobs is not None:
                entries.ids, entries.logprobs = answer.topk_ids[place], answer.topk_logprobs[place].float()
                entries.logprobs = entries.logprobs.masked_fill(entries.ids < 0, -torch.inf)
                entries.ranks = _list_rank(entries, piece.completion_ids[mask])
                entries.dtype = answer.topk_logprobs.dtype
        if answer.sampled_logprobs is not None:
            entries.sampled, entries.dtype = answer.sampled_logprobs[place], answer.sampled_logprobs.dtype
        entries.name, entries.rows, entries.partial = name, where, partial
        found.append(entries)
    return found


def _list_rank(entries: Entries, tokens: Tensor) -> Tensor:
    """Rank of each token in its list."""
    assert entries.ids is not None and entries.logprobs is not None
    found = entries.ids == tokens[:, None]
    own = entries.logprobs.masked_fill(~found, -torch.inf).amax(-1, keepdim=True)
    rank = (entries.logprobs > own).sum(-1) + 1
    return torch.where(found.any(-1), rank, entries.ids.shape[1] + 1)


def dense_entries(
    piece: Piece, answer: TeacherScores, place: Tensor, mask: Tensor, temperature: float | None, ids: Tensor | None
) -> Entries:
    """[`Entries`] of hidden states at `place` (among the answer's rows), tokens at `mask` (among the piece's)."""
    assert answer.hidden_states is not None and answer.head is not None
    tokens = piece.completion_ids[mask]
    dtypes = (answer.hidden_states.dtype, answer.head.weight.dtype)
    entries = Entries("", mask.nonzero()[:, 0], dtype=max(dtypes, key=tolerance))
    columns: dict[str, list[Tensor]] = {"sampled": [], "ids": [], "logprobs": [], "ranks": [], "entropy": []}
    start = 0
    for logprobs in distributions(piece, answer, place, temperature):
        rows = slice(start, start + len(logprobs))
        start += len(logprobs)
        sampled = logprobs.gather(-1, tokens[rows, None].clamp(max=logprobs.shape[1] - 1))
        top = logprobs.topk(min(TOP, logprobs.shape[1])).indices if ids is None else ids[rows]
        columns["sampled"].append(sampled[:, 0])
        columns["ids"].append(top)
        columns["logprobs"].append(logprobs.gather(-1, top.clamp(min=0)).masked_fill(top < 0, -torch.inf))
        columns["ranks"].append((logprobs > sampled).sum(-1) + 1)
        columns["entropy"].append(-(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1))
    for name, values in columns.items():
        setattr(entries, name, torch.cat(values) if values else None)
    return entries


def distributions(
    piece: Piece, answer: TeacherScores, place: Tensor, temperature: float | None = None
) -> Iterator[Tensor]:
    """Log-probs `(n, V)` of some tokens at a time, from hidden states `(B, T, H)` at `place`, boolean `(B, T)`."""
    trainer, head, hidden = piece.trainer, answer.head, answer.hidden_states
    assert head is not None and hidden is not None
    temperature = trainer.args.divergence_temperature if temperature is None else temperature
    size = trainer.shared_vocab_size
    with gather_heads(head.weight, head.bias)():
        weight, bias = whole(head.weight)[:size], head.bias
        bias = None if bias is None else whole(bias)[:size]
        for rows in hidden[place].split(_CHUNK):
            logits = functional.linear(rows.to(weight.device, weight.dtype), weight, bias)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            shape_logits(logits, head.logit_scale, head.softcap, temperature, need_slope=False)
            yield logits.log_softmax(-1)


def difference(one: Entries, other: Entries, everywhere: bool, share: float = 1.0) -> float:
    """
    Largest difference in nats of two answers about the same tokens, over the sampled ones and common entries.

    Args:
        one ([`Entries`]), other ([`Entries`]): The answers.
        everywhere (`bool`): Whether over all entries, or where one of the two is likely.
        share (`float`, *optional*, defaults to `1.0`): Of the entries, the nearest ones.
    """
    pairs = []
    if one.sampled is not None and other.sampled is not None:
        pairs.append((one.sampled, other.sampled))
    if one.ids is not None and other.ids is not None:
        assert one.logprobs is not None and other.logprobs is not None
        if one.ids.shape == other.ids.shape and torch.equal(one.ids, other.ids):
            pairs.append((one.logprobs.flatten(), other.logprobs.flatten()))
        else:
            for a, x, b, y in zip(
                *(t.split(_CHUNK) for t in (one.ids, one.logprobs, other.ids, other.logprobs)), strict=True
            ):
                same = (a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]
                pairs.append((x[:, :, None].expand_as(same)[same], y[:, None, :].expand_as(same)[same]))
    apart = []
    for a, b in pairs:
        a, b = a.double(), b.double()
        kept = a.isfinite() | b.isfinite() if everywhere else torch.maximum(a, b) > LIMITS.likely
        kept |= a.isnan() | b.isnan()
        apart.append((a - b)[kept].abs())
    return nearest_share(torch.cat(apart), share) if apart else 0.0


def nearest_share(apart: Tensor, share: float) -> float:
    """The largest of a share of some differences `(n,)`, the smallest ones; NaN is infinite."""
    if not len(apart):
        return 0.0
    place = max(1, math.ceil(share * len(apart)))
    return float(apart.nan_to_num(nan=torch.inf).kthvalue(place).values)


def full_logprobs(model: Any, batch: TeacherBatch, temperature: float, size: int | None, device: Any = None) -> Tensor:
    """
    Log-probs of the completion tokens `(B, T)` from the model's own full logits: no head of ours, no shift but this.
    """
    ids, mask, num = batch.input_ids, batch.attention_mask, batch.num_completion_tokens
    device = ids.device if device is None else device
    output = model(input_ids=ids.to(device), attention_mask=mask.to(device), **batch.model_inputs)
    logits = output.logits[:, -num - 1 : -1, :size]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, batch.completion_ids.to(device)[..., None])[..., 0].to(ids.device)


# The student in the run's head


def student_answer(piece: Piece) -> TeacherScores:
    """The student as a teacher's forward sees it: its hidden states and head."""
    with piece.trainer.accelerator.autocast():
        return score_with(piece.trainer.model, piece.student_question())


def student_pass(piece: Piece, scores: Scores) -> StudentOutput:
    """
    The student's forward with the run's head against `scores`: log-probs, entropy, KL divergences, overlap, `(B, T)`.
    Of a target with references, they are those of the teacher.
    """
    trainer, args = piece.trainer, copy.copy(piece.trainer.args)
    args.temperature_adaptation, args.off_policy_divergence = 0.0, None
    args.divergence, args.divergence_kwargs = "reverse_kl", None
    if args.loss_backend == "liger":  # which tells the loss and nothing else
        args.loss_backend = "auto"
    mask, loss_mask = piece.mask, piece.loss_mask
    weights = mask.float()
    batch = MicroBatch(
        piece.inputs, loss_mask, mask, reduction=weights, weights=weights, teachers=trainer.teacher_names
    )
    head = distillation_head(
        batch,
        scores,
        args,
        vocab_size=trainer.shared_vocab_size,
        per_token_grad=False,
        overlap_top_k=TOP,
        target=Target((1.0,)),
        statistics={},
    )
    return piece.through_trainer(lambda model_inputs, _: trainer.model(**model_inputs, head_call=head))


def student_logprobs(piece: Piece) -> tuple[Tensor, Tensor]:
    """The student's log-probs of its tokens and its entropies, `(B, T)`, by the run's own function."""
    if piece.trainer.objective.uses_distributions:
        output = student_pass(piece, student_answer(piece))
        assert output.log_probs is not None and output.entropy is not None
        return output.log_probs, output.entropy
    num = piece.completion_ids.shape[1]

    def forward(model_inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
        output = piece.trainer.model(**model_inputs, labels=labels, fused_lm_head=True)
        return output.log_probs[:, -num:], output.entropy[:, -num:]

    return piece.through_trainer(forward)
