# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The teacher's side of a generation batch: its prompts, when it is asked, and when its answers are waited for."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.trainer.utils import pad

from .collators import Scores, TeacherBatch, collate_teacher_batch
from .student import require_scores, student_top_ids
from .teachers import RoutedTeacher
from .teachers.answers import TeacherScoreError, find_bad_score
from .teachers.base import AnsweredScores, PendingScores, collect, submit, teacher_name
from .views import PromptRenderer, TeacherView, make_groups, make_renderer, renders_alike

if TYPE_CHECKING:
    from .trainer import OnPolicyDistillTrainer

_NO_VIEW, _OVERFLOW = 1, 2  # why a sample is left out


class TeacherSide:
    """
    What a trainer knows of its teacher between two generation batches.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
        teacher ([`Teacher`]): Its teacher.
        processing_classes (`Sequence[Any]`):
            The teacher's tokenizer (`None`: not known); of a [`RoutedTeacher`] one for each member.
        view (`Callable`, *optional*): `teacher_view` of the trainer.
    """

    def __init__(
        self,
        trainer: "OnPolicyDistillTrainer",
        teacher: Any,
        processing_classes: Sequence[Any],
        view: TeacherView | None = None,
    ):
        self.trainer, self.teacher, self.view = trainer, teacher, view
        self.renderers: list[PromptRenderer] = [make_renderer(trainer, p) for p in processing_classes]
        self.alike = [renders_alike(renderer, trainer) for renderer in self.renderers]
        self._pending: dict[str, PendingScores | None] = {}
        self._asked = False
        self._examples: Sequence[Mapping[str, Any]] = []
        self._prompts: list[Any] = []
        self._ids: tuple[list[list[int]], list[list[int]]] = ([], [])
        self._completions: list[Any] = []
        self._rewards: list[float | None] = []
        self._extra: dict[str, Tensor] = {}

    @property
    def may_skip(self) -> bool:
        """Whether samples may be left out, on this process or another."""
        return self.view is not None or self.trainer.args.teacher_overflow == "skip"

    @property
    def completions(self) -> Sequence[Any]:
        """This process's completions of the generation batch, as reward functions get them."""
        return self._completions

    @property
    def completion_ids(self) -> Sequence[list[int]]:
        """Their tokens, those of tools included."""
        return self._ids[1]

    # The generation batch: noted piece by piece, as GRPOTrainer makes it

    def begin(self, examples: list[dict[str, Any]]) -> None:
        """A generation batch begins: its dataset rows."""
        self._examples, self._asked, self._extra, self._rewards = examples, False, {}, []

    def note_rollouts(self, prompts: list[Any], rollouts: tuple) -> None:
        """Its completions exist: a teacher that answers in its own time is asked now."""
        prompt_ids, completion_ids, tool_mask, completions, _, _, images, _ = rollouts
        self._prompts, self._ids, self._completions = prompts, (prompt_ids, completion_ids), completions
        early = getattr(self.teacher, "asynchronous", False) and self.view is None and images is None
        if early and not self._requests_ids:
            self._submit(self._padded(prompt_ids, completion_ids, tool_mask))

    def note_rewards(self, rewards_per_func: Tensor) -> None:
        """Its rewards, of all processes, `(all B, functions)`."""
        weights = self.trainer.reward_weights.to(rewards_per_func.device)
        self._rewards = (rewards_per_func * weights).nansum(1).tolist() if self.trainer.has_rewards else []

    def finish(self, output: dict[str, Any]) -> None:
        """It is complete: ask those who were not asked yet, and keep in it what the micro-batches need."""
        if not self._asked:
            self._gather_groups()
            self._submit(output)
        output.update(self._extra)
        if self.may_skip:
            self._count_skipped(self._extra.get("teacher_skipped"))
        rows = len(output["completion_ids"])
        output["teacher_rows"] = torch.arange(rows, device=output["completion_ids"].device)

    def _count_skipped(self, skipped: Tensor | None) -> None:
        """Metrics: samples of a generation batch, over all processes, that are left out, and why."""
        for reason, name in ((_NO_VIEW, "view"), (_OVERFLOW, "overflow")):
            number = torch.zeros(()) if skipped is None else (skipped == reason).sum().cpu()
            total = number.double() * self.trainer.accelerator.num_processes
            self.trainer.mode_metrics.add_sum(f"distill/skipped_{name}", total, 1.0)

    def _submit(self, inputs: dict[str, Any]) -> None:
        """Ask about the whole generation batch. A failure of any kind stops all processes."""
        self._asked = True
        trainer, pending, started = self.trainer, None, time.perf_counter()
        problem: Any = None
        try:
            self._extra = self._make_extra(inputs)
        except Exception as error:
            problem = error
        trainer.stop_on(problem, inputs)  # before the processes speak to each other about their questions
        try:
            inputs = {**inputs, **self._extra}
            mask = trainer.distill_mask(inputs)
            question = self.question(inputs, mask, examples=self._examples)
            if self._requests_ids:
                question.requested_ids = student_top_ids(trainer, inputs)
            pending = submit(self.teacher, question, trainer.student_vocab_size)
            if isinstance(pending, AnsweredScores):
                problem = self._check(pending.scores, mask)
        except Exception as error:  # of whatever kind: the other processes wait for this one
            problem = error
        trainer.stop_on(problem, inputs)
        if pending is not None:
            trainer.add_wait(time.perf_counter() - started, 0.0)
        self._pending[self._mode] = pending

    @property
    def _mode(self) -> str:
        return "train" if self.trainer.model.training else "eval"

    @property
    def _requests_ids(self) -> bool:
        """Whether the teacher is asked for entries that the student chooses."""
        return self.trainer.args.support == "student_top_k" and getattr(self.teacher, "takes_requested_ids", False)

    def _padded(self, prompt_ids: list, completion_ids: list, tool_mask: list | None) -> dict[str, Tensor]:
        """The batch as GRPOTrainer is about to make it."""
        trainer = self.trainer

        def stack(rows: list, value: int, side: str) -> Tensor:
            rows = [torch.tensor(row) for row in rows]
            padded = pad(rows, padding_value=value, padding_side=side, pad_to_multiple_of=trainer.pad_to_multiple_of)
            return padded.to(trainer.accelerator.device)

        filler = trainer._tokenizer.pad_token_id
        inputs = {
            "prompt_ids": stack(prompt_ids, filler, "left"),
            "prompt_mask": stack([[1] * len(row) for row in prompt_ids], 0, "left"),
            "completion_ids": stack(completion_ids, filler, "right"),
            "completion_mask": stack([[1] * len(row) for row in completion_ids], 0, "right"),
        }
        if tool_mask is not None:
            inputs["tool_mask"] = stack(tool_mask, 1, "right")
        return inputs

    # Views

    def _make_extra(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The teacher's prompts where they are not the student's, who goes to whom, and who is left out."""
        device = inputs["completion_ids"].device
        extra: dict[str, Tensor] = {}
        members = [0] * len(self._examples)
        if isinstance(self.teacher, RoutedTeacher):
            extra["teacher_index"] = self.teacher.route(self._examples).to(device)
            members = extra["teacher_index"].tolist()
        own, skipped = self._own_prompts(members)
        prompt_ids = [ours if theirs is None else theirs for ours, theirs in zip(self._ids[0], own, strict=True)]
        too_long = [self._is_too_long(*row) for row in zip(prompt_ids, self._ids[1], members, skipped, strict=True)]
        reasons = [_NO_VIEW if skip else _OVERFLOW * long for skip, long in zip(skipped, too_long, strict=True)]
        if any(reasons):
            extra["teacher_skipped"] = torch.tensor(reasons, device=device)
        written = [ids is not None and self._has_tokenizer(member) for ids, member in zip(own, members, strict=True)]
        if any(ids is not None for ids in own) or (any(reasons) and not self.trainer._is_vlm):
            # One token stands for a prompt that is left out, so that no sequence is longer than the teacher takes
            kept = [
                (ids if theirs else self._known(ids))[-1 if reason else 0 :]
                for ids, theirs, reason in zip(prompt_ids, written, reasons, strict=True)
            ]
            padded = self._padded(kept, self._ids[1], None)
            extra |= {"teacher_prompt_ids": padded["prompt_ids"], "teacher_prompt_mask": padded["prompt_mask"]}
        return extra

    def _has_tokenizer(self, member: int) -> bool:
        """Whether a teacher's prompts are written by its own tokenizer, which knows no ids but the teacher's."""
        return self.renderers[member].processing_class is not self.trainer._tokenizer

    def _known(self, ids: list[int]) -> list[int]:
        """The student's prompt without ids that only the student knows."""
        limit = self.trainer.shared_vocab_size
        return ids if limit is None else [i if i < limit else 0 for i in ids]

    def _own_prompts(self, members: list[int]) -> tuple[list[list[int] | None], list[bool]]:
        """For each sample the teacher's prompt where it differs from the student's, and whether it has none at all."""
        prompts = self._viewed() if self.view is not None else [x.get("teacher_prompt") for x in self._examples]
        own: list[list[int] | None] = []
        for i, (prompt, member) in enumerate(zip(prompts, members, strict=True)):
            renderer, ids = self.renderers[member], self._ids[0][i]
            if prompt is None and (self.view is not None or self.alike[member] or isinstance(self._prompts[i], str)):
                own.append(None)
                continue
            if self.trainer._is_vlm:
                if prompt is None:
                    own.append(None)  # images stand in the student's prompt
                    continue
                raise TeacherScoreError(
                    "teacher_prompt must not be given for a vision-language student: which images belong to the "
                    "teacher's prompt is not known. Leave the column out."
                )
            try:
                theirs = renderer.render(self._prompts[i] if prompt is None else prompt, ids, self._tools(i))
            except Exception as error:  # the template's, too
                raise TeacherScoreError(f"A prompt cannot be rendered for the teacher: {error}") from error
            own.append(None if theirs == list(ids) else theirs)
        return own, [self.view is not None and prompt is None for prompt in prompts]

    def _gather_groups(self) -> None:
        """For `teacher_view`, the completions of all processes: a group may be spread over them."""
        if self.view is not None and self.trainer.accelerator.num_processes > 1:
            self._completions = gather_object(self._completions)

    def _viewed(self) -> list[Any]:
        """What `teacher_view` makes of each rollout."""
        assert self.view is not None
        trainer, n, completions = self.trainer, len(self._examples), self._completions
        rewards = self._rewards or [None] * len(completions)
        size = trainer.num_generations if self._mode == "train" else trainer.num_generations_eval
        groups = make_groups(completions, rewards, size)
        start = trainer.accelerator.process_index * n
        views = []
        for example, j in zip(self._examples, range(start, start + n), strict=True):
            try:
                views.append(self.view(example, completions[j], rewards[j], groups[j]))
            except Exception as error:
                raise TeacherScoreError(
                    f"teacher_view failed with {error!r} for the prompt {_end_of(example.get('prompt'))}."
                ) from error
        return views

    def _tools(self, i: int) -> list | None:
        trainer = self.trainer
        if trainer.environment_factories is not None:
            return trainer._env_tools[trainer._batch_environments[i]]
        return trainer.tools

    def _is_too_long(self, prompt_ids: list[int], completion_ids: list[int], member: int, skipped: bool) -> bool:
        """Whether the teacher cannot take a sample whole."""
        args, teacher = self.trainer.args, self.teacher
        if isinstance(teacher, RoutedTeacher):
            teacher = teacher.members[member]
        limit = args.teacher_max_length or getattr(teacher, "max_length", None)
        length = len(prompt_ids) + len(completion_ids)
        if skipped or limit is None or length <= limit:
            return False
        if args.teacher_overflow == "error":
            raise TeacherScoreError(
                f"A sample for teacher {teacher_name(teacher)!r} has {length} tokens ({len(prompt_ids)} of them in "
                f"the teacher's prompt), but it takes {limit}. Cutting it would take away the problem. Set "
                "teacher_overflow='skip', a smaller max_completion_length, or shorter prompts."
            )
        return True

    # The micro-batch

    def question(self, inputs: Mapping[str, Any], mask: Tensor, **extra: Any) -> TeacherBatch:
        """What the teacher is asked about a batch."""
        args = self.trainer.args
        return collate_teacher_batch(
            inputs,
            mask,
            vocab_size=self.trainer.shared_vocab_size,
            temperature=args.divergence_temperature,
            support=args.support,
            support_size=args.support_size,
            **extra,
        )

    def answer(self, inputs: dict[str, Any], mask: Tensor, model_inputs: Mapping[str, Any]) -> Scores:
        """The teacher's answer about a micro-batch, checked on all processes together."""
        trainer, started = self.trainer, time.perf_counter()
        question = self.question(inputs, mask, model_inputs=model_inputs)
        scores: Any = None
        pending = self._pending.get(self._mode)
        try:
            scores = collect(self.teacher, pending, inputs["teacher_rows"], question, trainer.student_vocab_size)
            problem = self._check(scores, mask)
        except Exception as error:
            problem = error
        if pending is not None:
            trainer.add_wait(time.perf_counter() - started, 1 / trainer.accumulation)
        trainer.stop_on(problem, inputs)
        return scores

    def _check(self, scores: Scores, mask: Tensor) -> Any:
        require_scores(scores, self.trainer.args.credit, teacher_name(self.teacher))
        return find_bad_score(scores, mask)


def _end_of(prompt: Any) -> str:
    """The end of a prompt, for a message."""
    text = str(prompt)
    return repr(text if len(text) <= 60 else f"...{text[-60:]}")
