# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Where completions come from: the student, a dataset, the teacher, or the student as it was some steps ago.

GKD's λ, DistiLLM's replay, PACED's phases: one draw for each generation batch, the same on all processes. LUFFY, KEPO
and BRTS: off-policy members in the student's groups. Fast OPD: a length that grows during training.
"""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback
from trl.models.utils import disable_gradient_checkpointing

from .completions import dataset_completion
from .injection import find_failures, injected_rows
from .replay_buffer import ReplayBuffer, Replayed
from .rollout_checks import is_scheduled, samples_student_only
from .sample_weights import resolve_sample_weighting
from .stopping import stop_together
from .teachers.base import teacher_name
from .teachers.generation import generate_from_teacher, teacher_prompts

if TYPE_CHECKING:
    from .trainer import OnPolicyDistillTrainer

Rollout = tuple[list[list[int]], list[list[float | None]] | None]  # completion ids, and an engine's log-probs


class RolloutSources:
    """
    The origin of each generation batch of a run.

    With probability `student_fraction` the student samples it; with probability `replay_fraction` rows and
    completions are drawn from the student's earlier batches (until the buffer holds a batch, the student samples
    instead); else `off_policy_source` completes the student's prompts. Inside a batch of the student's,
    `injected_completions` members of each group, its last ones, are `off_policy_source`'s, always or where no
    completion of the group has a reward above 0. Evaluations sample from the student.

    The draw depends on the seed, the optimizer step and the batch's place in it, so that a resumed run goes on as it
    would have. It takes nothing from the generators that sampling uses: a run that only samples from the student is,
    bit for bit, one without this class.

    What is kept of a batch's origin are two columns: `on_policy`, boolean `(B,)`, whether the current student sampled
    it, and `sampled_step`, `(B,)`, the optimizer steps that its student had taken (for completions of a dataset or a
    teacher: now). Off-policy completions have no log-probs of a sampler. In vLLM's importance correction, their ratio
    is 1.

    Papers: GKD (2306.13649), DistiLLM (2402.03898), LUFFY (2504.14945), KEPO (2602.00400). Deviations: the buffer is
    drawn from without its filling being evaluated first (schedule `replay_fraction` for that); injected completions
    are taken as they come, KEPO's have several attempts and must be rewarded.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.

    Raises:
        ValueError: If something else makes the rollouts, or the buffer is smaller than a batch.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer: Any = trainer
        args = trainer.args
        self.buffer = ReplayBuffer(args.replay_size)
        self.active = not samples_student_only(args)
        self.replays = self.active and (args.replay_fraction > 0 or is_scheduled(args, "replay_fraction"))
        self._turn = 0  # of this batch in its optimizer step
        self._rows: Sequence[Mapping[str, Any]] = []
        self._source = "student"
        self._replayed: list[Replayed] = []
        self._first = False
        self._off_policy: set[int] = set()
        self._mixed = False  # whether there are such rows on any process
        self._completion_ids: list[list[int]] = []
        self._rewards: Tensor | None = None
        if not self.active:
            return
        self._check(trainer)
        trainer.add_callback(_Follow(self))

    def _check(self, trainer: Any) -> None:
        if trainer._is_vlm:
            raise ValueError(
                "student_fraction must be 1, and injected_completions 0, with a vision-language student. Completions "
                "of other sources than the student are not supported there yet. Unset them."
            )
        if trainer.tools or trainer.rollout_func is not None:
            raise ValueError(
                "student_fraction must be 1, and injected_completions 0, with tools, environments, rollout_func or "
                "stored completions (teacher_model='cache:...'). They make the rollouts. Unset one of them."
            )
        rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
        if self.replays and trainer.args.replay_size < rows:
            raise ValueError(
                f"replay_size must be at least a process's generation batch, {rows} completions, got "
                f"{trainer.args.replay_size}. No batch could be drawn from it. Raise it."
            )

    # The generation batch, piece by piece, as GRPOTrainer makes it

    def begin(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        A generation batch begins.

        Args:
            rows (`list[dict]`): Its dataset rows.

        Returns:
            `list[dict]`: Those that take their place: themselves, or replayed ones.
        """
        self._rows, self._source, self._first = rows, "student", True
        self._off_policy, self._mixed, self._rewards = set(), False, None
        self._replayed, self._completion_ids = [], []
        if not self.active or not self.trainer.model.training:
            return rows
        args = self.trainer.args
        generator = random.Random(f"{args.seed}/{self.trainer.state.global_step}/{self._turn}")
        self._turn += 1
        self._source = self._draw(generator, len(rows))
        if self._source == "replay":
            self._replayed = self.buffer.draw(generator, len(rows))
            self._rows = [dict(entry.row) for entry in self._replayed]
        return self._rows  # type: ignore[return-value]

    def _draw(self, generator: random.Random, num: int) -> str:
        args = self.trainer.args
        if args.student_fraction >= 1:
            return "student"
        share = generator.random()
        if share < args.student_fraction:
            return "student"
        if share < args.student_fraction + args.replay_fraction:
            return "replay" if len(self.buffer) >= num else "student"
        return args.off_policy_source

    def generate(self, prompt_ids: list[list[int]], sample: Callable[[], Rollout]) -> Rollout:
        """
        Its completions.

        Args:
            prompt_ids (`list[list[int]]`): The student's prompts.
            sample (`Callable`): `sample()` → ids and log-probs of the student's own completions.

        Returns:
            `tuple`: Ids; log-probs of an engine, `None` in the place of those that are not known.
        """
        first, self._first = self._first, False
        if not first or not self.active or not self.trainer.model.training:
            return sample()
        everything = range(len(prompt_ids))
        logprobs: Any = None
        if self._source == "student":
            ids, logprobs = sample()
            members = self._injected(prompt_ids, ids)
            if members is not None:
                ids, logprobs = self._inject(prompt_ids, ids, logprobs, members)
        else:
            if self._source == "replay":
                ids = [entry.completion_ids.tolist() for entry in self._replayed]
            else:
                ids = self._from_source(prompt_ids, everything, 0)
            self._off_policy, self._mixed = set(everything), True
            if self.trainer.use_vllm and self.trainer.vllm_importance_sampling_correction:
                logprobs = [[None] * len(row) for row in ids]  # not known, which it takes for a ratio of 1
        self._completion_ids = ids
        return ids, logprobs

    def take_rewards(self) -> Tensor | None:
        """Its rewards `(all B, functions)`, if they are known before GRPOTrainer asks for them."""
        rewards, self._rewards = self._rewards, None
        return rewards

    def mark(self, output: dict[str, Any]) -> None:
        """It is complete: add `on_policy` and `sampled_step`, count, and remember what the student wrote."""
        if not self.active:
            return
        step, ids = self.trainer.state.global_step, output["completion_ids"]
        on_policy = [i not in self._off_policy for i in range(len(ids))]
        steps = [entry.step for entry in self._replayed] or [step] * len(ids)
        output["on_policy"] = torch.tensor(on_policy, device=ids.device)
        output["sampled_step"] = torch.tensor(steps, device=ids.device)
        self._set_sampling_logprobs(output)
        if not self.trainer.model.training:
            return
        if self.replays and self._source == "student":
            logprobs = self._logprobs(output, "sampling_per_token_logps") if self._keeps_logprobs else None
            self.buffer.push(self._rows, self._completion_ids, step, self._unit(len(ids)), logprobs)
        self._count(sum(on_policy), len(ids))

    def _set_sampling_logprobs(self, output: dict[str, Any]) -> None:
        """An engine's log-probs, where it did not sample: the student's as it is now, or was when it did."""
        name = "sampling_per_token_logps"
        if self._mixed and name in output:
            output[name] = torch.where(output["on_policy"][:, None], output[name], self._logprobs(output))
        kept = [entry.logprobs for entry in self._replayed if entry.logprobs is not None]
        if kept and len(kept) == len(self._replayed):
            width = output["completion_ids"].shape[1]
            padded = [functional.pad(row, (0, width - len(row))) for row in kept]
            output[name] = torch.stack(padded).to(output["completion_ids"].device)

    @property
    def _keeps_logprobs(self) -> bool:
        """Whether a weight compares the student with the one that sampled."""
        return any("drift" in w.needs for w in resolve_sample_weighting(self.trainer.args.sample_weighting))

    def _logprobs(self, output: dict[str, Any], *names: str) -> Tensor:
        """The student's log-probs of a batch, `(B, T)`: those that are there, else of another pass."""
        for name in (*names, "old_per_token_logps"):
            if name in output:
                return output[name]
        trainer = self.trainer
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        size, width = trainer.args.per_device_train_batch_size, output["completion_ids"].shape[1]
        checkpointing = trainer.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(trainer.model, checkpointing):
            logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, batch_size=size)
        return logps

    def _unit(self, num: int) -> int:
        """Rows of a process that a draw must not separate."""
        group = self.trainer.num_generations
        return group if num % group == 0 else num

    def _count(self, on_policy: int, num: int) -> None:
        """Metrics: shares of completions, over all processes, and how many all buffers hold."""
        metrics = self.trainer.mode_metrics
        metrics.add_sum("rollout/student_share", _float(on_policy), num)
        if self.replays:
            metrics.add_sum("rollout/replayed_share", _float(len(self._replayed)), num)
            held = len(self.buffer) * self.trainer.accelerator.num_processes
            metrics.add_sum("rollout/replay_size", _float(held), 1.0)

    # Off-policy completions

    def _from_source(self, prompt_ids: Sequence[list[int]], picked: Sequence[int], start: int) -> list[list[int]]:
        """Completions of the rows `picked`, whose place in the group is counted from `start`."""
        trainer = self.trainer

        def make() -> list[list[int]]:
            if trainer.args.off_policy_source == "dataset":
                places = [(i, self._member(i, len(prompt_ids)) - start) for i in picked]
                return [dataset_completion(trainer, self._rows[i], prompt_ids[i], place) for i, place in places]
            rows = [self._rows[i] for i in picked]
            prompts, members = teacher_prompts(trainer, rows, [prompt_ids[i] for i in picked])
            return generate_from_teacher(trainer.teacher, trainer, prompts, members)

        return self._together(make)

    def _member(self, row: int, num: int) -> int:
        """The place of a row in its group."""
        return (self.trainer.accelerator.process_index * num + row) % self.trainer.num_generations

    def _together(self, make: Callable[[], Any]) -> Any:
        """The result, unless a process failed: then all stop, with a checkpoint."""
        result = problem = None
        try:
            result = make()
        except Exception as error:  # of whatever kind: the other processes wait for this one
            problem = error
        stop_together(self.trainer, teacher_name(self.trainer.teacher), problem)
        return result

    def _injected(self, prompt_ids: list[list[int]], ids: list[list[int]]) -> list[int] | None:
        """Rows that are not to be the student's; `None` if that is so on no process."""
        args = self.trainer.args
        if not args.injected_completions:
            return None
        failed = None
        if args.injected_when == "group_failure":
            failed, self._rewards = find_failures(self.trainer, self._rows, prompt_ids, ids)
            if not failed:
                return None
        return injected_rows(self.trainer, len(ids), failed)

    def _inject(self, prompt_ids: list[list[int]], ids: list[list[int]], logprobs: Any, members: list[int]) -> Rollout:
        first = self.trainer.num_generations - self.trainer.args.injected_completions
        ids, logprobs = list(ids), None if logprobs is None else list(logprobs)
        for i, row in zip(members, self._from_source(prompt_ids, members, first), strict=True):
            ids[i] = row
            if logprobs is not None:
                logprobs[i] = [None] * len(row)
        self._off_policy, self._mixed = set(members), True
        return ids, logprobs

    # With checkpoints

    def save_state(self, folder: str) -> None:
        """Write the buffer of this process. All processes call it."""
        if self.replays:
            self.buffer.save(self._path(folder))

    def load_state(self, folder: str) -> None:
        """
        Continue from [`save_state`].

        Raises:
            ValueError: If the checkpoint has no buffer of this process.
        """
        if not self.replays:
            return
        path = self._path(folder)
        if not os.path.exists(path):
            raise ValueError(
                f"The checkpoint {folder} must hold {os.path.basename(path)} to resume with replay_fraction, but does "
                "not. The draws would not be those of the run. Resume with as many processes, from a run with "
                "replay_fraction."
            )
        self.buffer.load(path)

    def _path(self, folder: str) -> str:
        return os.path.join(folder, f"replay_buffer_{self.trainer.accelerator.process_index}.pt")


class _Follow(TrainerCallback):
    def __init__(self, sources: RolloutSources):
        self.sources = sources

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.sources.buffer = ReplayBuffer(self.sources.buffer.capacity)

    def on_step_begin(self, args, state, control, **kwargs):
        self.sources._turn = 0

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.sources.trainer
        if trainer._step % (args.steps_per_generation * trainer.num_iterations) == 0:
            self.sources.buffer.commit()


def _float(value: int) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)
