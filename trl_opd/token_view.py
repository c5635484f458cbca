# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Sampled completions token by token: what both models thought of each.

On the steps that are logged, the values of the micro-batches of the optimizer step are kept on the device and fetched
once, on the main process only. GRPOTrainer shuffles a generation batch before it splits it, so completions are found
again by the row that `teacher_rows` holds, and in its completions log by how many have been logged before them.
"""

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .quietly import Quietly
from .run_facts import FOLDER
from .student import sampled_answer, sampled_ranks
from .teachers.answers import is_dense
from .token_files import VALUES, choose, make_table, read_and_extend, write_table
from .token_text import TokenTexts, legend, render_tokens

if TYPE_CHECKING:
    from rich.text import Text

    from .student import MicroBatch
    from .trainer import OnPolicyDistillTrainer

__all__ = ["TokenRow", "TokenView", "legend", "render_tokens"]


@dataclass
class TokenRow:
    """
    A completion token by token.

    Args:
        place (`int`): How many completions were logged before it.
        logged (`dict[str, Any]`): What GRPOTrainer logs of it: `prompt`, `completion`, its rewards, `advantage`.
        token_ids (`list[int]`): T tokens.
        mask (`np.ndarray`): Those that are distilled, boolean, `(T,)`.
        values (`dict[str, np.ndarray | None]`):
            Each `(T,)`, NaN outside the mask; `None` where it is not known. Log-probs, gap and KL in nats.
    """

    place: int
    logged: dict[str, Any]
    token_ids: list[int]
    mask: np.ndarray
    values: dict[str, np.ndarray | None]

    @property
    def mean_gap(self) -> float:
        """Mean of teacher − student log-prob; NaN where it is not known."""
        gap = self.values["token_gap"]
        return float("nan") if gap is None or not self.mask.any() else float(np.nanmean(gap))


@dataclass
class _Rollouts:
    """What was logged of this process's part of a generation batch."""

    first: int  # place of its first completion
    logged: list[dict[str, Any] | None]


@dataclass
class _Seen:
    """A micro-batch, on the device."""

    rollouts: _Rollouts
    rows: Tensor  # (B,), in the generation batch
    token_ids: Tensor  # (B, T)
    lengths: Tensor  # (B,)
    mask: Tensor  # (B, T)
    values: dict[str, Tensor | None]  # (B, T)


class TokenView:
    """
    Keeps the tokens of completions of each logged step, and writes them beside the completions log.

    With `log_completions` all completions in GRPOTrainer's file that this process has seen get the columns; without,
    a file of the same form gets `token_view` of them, spread from those that the teacher likes least to those that it
    likes best.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer = trainer
        self.shown: list[TokenRow] = []  # of the last logged training step, for people
        self.shown_step = -1
        self._on = bool(trainer.args.token_view) and trainer.accelerator.is_main_process
        self._quietly = Quietly("The token view", "The run goes on without it")
        self._logged = 0  # completions that GRPOTrainer has logged, of all processes
        self._rollouts: dict[str, _Rollouts] = {}
        self._seen: deque[_Seen] = deque()
        self._seen_at: tuple[str, int] = ("train", -1)
        self._rows: dict[int, TokenRow] = {}  # those of the step, by place
        self._rows_step = -1
        self._is_new = False  # whether the line that is logged brought rows of training
        self._texts: TokenTexts | None = None

    @property
    def _is_on(self) -> bool:
        return self._on and not self._quietly.failed

    @property
    def _mode(self) -> str:
        return "train" if self.trainer.model.training else "eval"

    # What the trainer tells

    def note_rollouts(self, output: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        """A generation batch is complete, in the order in which GRPOTrainer has logged it."""
        if not self._is_on:
            return
        with self._quietly:
            trainer, rows = self.trainer, len(output["completion_ids"])
            total = rows * trainer.accelerator.num_processes
            logs = trainer._logs
            columns = {"prompt": logs["prompt"], "completion": logs["completion"], **logs["rewards"]}
            columns["advantage"] = logs["advantages"]
            newest = {name: list(values)[-total:] for name, values in columns.items()}
            gone = total - len(newest["prompt"])  # the log may be shorter than a batch of an evaluation
            logged = [
                None if i < gone else {name: values[i - gone] for name, values in newest.items()} for i in range(rows)
            ]
            self._rollouts[self._mode] = _Rollouts(self._logged, logged)
            self._logged += total

    def note_tokens(self, batch: "MicroBatch", logps: Tensor, entropies: Tensor) -> None:
        """The objective of a micro-batch is formed."""
        trainer = self.trainer
        if not self._is_on or not trainer._is_logged or not (trainer.model.training or trainer.args.log_completions):
            return
        with self._quietly:
            at = (self._mode, trainer.state.global_step)
            if at != self._seen_at:  # of an optimizer step that was not logged after all
                self._seen.clear()
                self._seen_at = at
            inputs = batch.inputs
            seen = _Seen(
                self._rollouts[self._mode],
                rows=inputs["teacher_rows"],
                token_ids=inputs["completion_ids"],
                lengths=_lengths(inputs, trainer._tokenizer.pad_token_id),
                mask=batch.distill_mask,
                values=token_values(batch, logps),
            )
            self._seen.append(seen)
            kept = sum(len(s.rows) for s in self._seen)
            while not trainer.model.training and kept - len(self._seen[0].rows) >= trainer.args.generation_batch_size:
                kept -= len(self._seen.popleft().rows)  # the completions log has forgotten them, too

    def before_log(self) -> None:
        """GRPOTrainer is about to log and to write its completions log: fetch what was seen."""
        if not self._is_on:
            return
        self._is_new = False
        with self._quietly:
            mode, step = self._seen_at
            step += mode == "train"  # that step is now done
            if self._seen and step == self.trainer.state.global_step:
                rows = [row for seen in self._seen for row in _fetch(seen)]
                if self._rows_step != step:
                    self._rows, self._rows_step = {}, step
                self._rows |= {row.place: row for row in rows}
                if mode == "train":
                    self.shown, self.shown_step = choose(rows, self.trainer.args.token_view), step
                    self._is_new = bool(rows)
            self._seen.clear()

    def after_log(self) -> None:
        """It has."""
        if not self._is_on or self._rows_step != self.trainer.state.global_step or not self._rows:
            return
        with self._quietly:
            trainer = self.trainer
            # Without a completions log they are a part of the record, which is not uploaded with the model
            folder = Path(trainer.args.output_dir, *([] if trainer.log_completions else [FOLDER]), "completions")
            path = folder / f"completions_{self._rows_step:05d}.parquet"
            if trainer.log_completions:
                write_table(read_and_extend(path, self._in_log(), self.texts), path)
                if self._is_new:
                    self._print()
            elif self._is_new:
                os.makedirs(path.parent, exist_ok=True)
                write_table(make_table(self._rows_step, self.shown, self.texts), path)

    # Its parts

    def _in_log(self) -> list[TokenRow | None]:
        """For each entry of GRPOTrainer's completions log its tokens, where they were seen."""
        log = self.trainer._logs["completion"]
        first = self._logged - len(log)
        rows = [self._rows.get(first + i) for i in range(len(log))]
        return [
            row if row is not None and row.logged["completion"] == completion else None
            for row, completion in zip(rows, log, strict=True)
        ]

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Texts of the tokens of a completion."""
        if self._texts is None:
            self._texts = TokenTexts(self.trainer._tokenizer)
        return self._texts(token_ids)

    def rendered(self, rows: Sequence[TokenRow], *, marks: bool = False, max_tokens: int = 512) -> list["Text"]:
        """Completions as coloured text, with their prompts and a legend."""
        from rich.text import Text

        parts = [legend(marks=marks)]
        for row in rows:
            texts, gaps = self.texts(row.token_ids)[:max_tokens], row.values["token_gap"]
            parts.append(
                Text(f"\n{_end_of(row.logged['prompt'])}   (mean gap {row.mean_gap:+.3f} nats)", style="bold")
            )
            parts.append(render_tokens(texts, None if gaps is None else gaps.tolist(), row.mask.tolist(), marks=marks))
            if len(row.token_ids) > max_tokens:
                parts.append(Text(f"... and {len(row.token_ids) - max_tokens} more tokens", style="dim"))
        return parts

    def _print(self) -> None:
        from rich.console import Console

        trainer, console = self.trainer, Console()
        rows = [row for row in self._in_log() if row is not None]
        rows = choose(rows, trainer.num_completions_to_print or trainer.args.token_view)
        for part in self.rendered(rows, marks=console.color_system is None or console.no_color):
            console.print(part)


def token_values(batch: "MicroBatch", logps: Tensor) -> dict[str, Tensor | None]:
    """
    What is known of the tokens of a micro-batch, by the name of the column, each `(B, T)`.

    Args:
        batch ([`MicroBatch`]): With its objective formed.
        logps (`torch.Tensor`): The student's log-probs of the sampled tokens, `(B, T)`.
    """
    student: Tensor | None = logps
    teacher: Tensor | None
    if batch.output is None:
        assert batch.scores is not None
        teacher, kl = sampled_answer(batch.scores, logps.shape), None
    else:
        student = _known(batch, "log_probs") if _known(batch, "divergence") is not None else None
        teacher, kl = _known(batch, "teacher_logprobs"), _known(batch, "reverse_kl")
    values: dict[str, Tensor | None] = {
        "token_gap": None if teacher is None or student is None else teacher - student,
        "token_student_logprob": student,
        "token_teacher_logprob": teacher,
        "token_reverse_kl": kl,
        "token_teacher_rank": _ranks(batch),
        "token_weight": batch.token_weights,
    }
    # A copy: what the objective has computed need not live until the log
    nothing = torch.full_like(logps, float("nan"), dtype=torch.float32)
    return {
        name: None if x is None else torch.where(batch.distill_mask, x.detach().float(), nothing)
        for name, x in values.items()
    }


def _known(batch: "MicroBatch", name: str) -> Tensor | None:
    """A statistic of the fused divergence; NaN for sequences of a teacher that does not give it."""
    if not batch.parts:
        value: Tensor | None = getattr(batch.output, name)
        return value
    known = [(rows, x) for _, rows, part in batch.parts if (x := getattr(part, name)) is not None and len(rows)]
    if not known:
        return None
    whole = torch.full(batch.distill_mask.shape, float("nan"), device=batch.distill_mask.device)
    for rows, x in known:
        whole[rows] = x.detach().float()
    return whole


def _ranks(batch: "MicroBatch") -> Tensor | None:
    """Ranks of the sampled tokens under the teacher where the whole vocabulary tells, 1 is the best; else NaN."""
    if batch.scores is None:
        return None
    if is_dense(batch.scores):
        return _known(batch, "teacher_rank")
    given = sampled_ranks(batch.scores, batch.distill_mask.shape)
    return None if given is None else given.float().masked_fill(given < 1, float("nan"))


def _lengths(inputs: dict[str, Any], pad_token_id: int) -> Tensor:
    """Tokens of each completion, `(B,)`; of one whose mask GRPO has emptied, those before the padding."""
    length: Tensor = inputs["completion_mask"].sum(1)
    ids: Tensor = inputs["completion_ids"]
    last = ((ids != pad_token_id) * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax(1)
    return torch.where(length > 0, length, last)


def _fetch(seen: _Seen) -> list[TokenRow]:
    rows, lengths = seen.rows.tolist(), seen.lengths.tolist()
    ids, mask = seen.token_ids.cpu(), seen.mask.cpu().numpy()
    values = {name: None if seen.values[name] is None else seen.values[name].cpu().numpy() for name in VALUES}  # type: ignore[union-attr]
    found = []
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        logged = seen.rollouts.logged[row]
        if logged is None:
            continue
        own = {name: None if x is None else x[i, :length] for name, x in values.items()}
        own = {name: None if x is None or (np.isnan(x).all() and mask[i].any()) else x for name, x in own.items()}
        found.append(TokenRow(seen.rollouts.first + row, logged, ids[i, :length].tolist(), mask[i, :length], own))
    return found


def _end_of(prompt: Any) -> str:
    """The end of a prompt, in one line."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        prompt = prompt[-1].get("content", "")
        if isinstance(prompt, list):
            prompt = " ".join(str(block.get("text", f"[{block.get('type')}]")) for block in prompt)
    text = " ".join(str(prompt).split())
    return text if len(text) <= 100 else f"...{text[-97:]}"
