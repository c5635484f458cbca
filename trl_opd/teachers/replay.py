# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Stored completions in the place of sampled ones."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from .answers import TeacherScoreError
from .cache import CacheReader, prompt_hash

if TYPE_CHECKING:
    from trl import GRPOTrainer

_STATE = "replay.npy"


class Replay:
    """
    A `rollout_func` that returns the completions of a cache.

    A prompt is found by its ids, as the trainer renders them. Its completions are handed out in the order in which
    they were stored, one for each time that the prompt comes up (in a group of `num_generations`, in another row of
    the dataset, in the next epoch), and again from the first when all have been. How far each prompt has come is the
    same on all processes and part of checkpoints. Evaluations start from the first each time.

    What GRPOTrainer makes of the tokens. It takes a rollout for a sample of the current student; these are not:
    - `logprobs`, which it would compare with the student's own (vLLM's importance correction, and
      `off_policy_mask_threshold`), are `None`: no student sampled the tokens. The correction needs them, so `use_vllm`
      is refused; there is nothing for an engine to generate.
    - Its ratio π/π_old is of the student with itself, at the time the batch was made. It corrects for the steps taken
      since and knows nothing of who wrote the tokens, so a policy gradient over them is biased: any `credit` but
      `"direct"`, and rewards that are trained on (`reward_coef` above 0), are refused.
    - The divergence with `credit="direct"` is defined on any prefix, whoever wrote it, as are an entropy bonus and the
      distillation metrics. What changes is which prefixes are trained on.
    - `beta` adds GRPO's estimate of the KL to a reference model from single tokens. Over these tokens it is no longer
      an estimate of that KL, but is still at least 0, and 0 where both models agree on the token.

    Args:
        reader ([`CacheReader`]): The cache.
    """

    def __init__(self, reader: CacheReader):
        self.reader = reader
        self.trainer: Any = None
        self._counts: dict[str, dict[bytes, int]] = {"train": {}, "eval": {}}
        self._before: dict[bytes, int] = {}  # counts of the last batch's prompts before it

    def prepare(self, trainer: "GRPOTrainer") -> None:
        """Refuse a run that would take the tokens for the student's own, and start from the first completions."""
        check_replay(trainer, self.reader)
        self.trainer = trainer
        trainer.add_callback(_Restart(self))

    def __call__(self, prompts: list, trainer: "GRPOTrainer") -> dict[str, Any]:
        if self.trainer is not trainer:
            self.prepare(trainer)
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        hashes = [prompt_hash(ids) for ids in prompt_ids]
        rank, everyone = trainer.accelerator.process_index, [(0, hashes)]
        if trainer.accelerator.num_processes > 1:  # a prompt's group may be spread over processes
            everyone = sorted(gather_object([(rank, hashes)]))
        self._require(trainer, [h for _, part in everyone for h in part], prompts, hashes)
        mode = "train" if trainer.model.training else "eval"
        picked = self._pick(everyone, mode)[rank]
        completions = [self.reader[key].completion_ids.tolist() for key in picked]
        return {"prompt_ids": [list(ids) for ids in prompt_ids], "completion_ids": completions, "logprobs": None}

    def _pick(self, everyone: list[tuple[int, list[bytes]]], mode: str) -> dict[int, list[bytes]]:
        counts = self._counts[mode]
        before: dict[bytes, int] = {}
        picked: dict[int, list[bytes]] = {}
        for rank, hashes in everyone:
            picked[rank] = []
            for prompt in hashes:
                keys, count = self.reader.prompts[prompt], counts.get(prompt, 0)
                before.setdefault(prompt, count)
                picked[rank].append(keys[count % len(keys)])
                counts[prompt] = count + 1
        if mode == "train":
            self._before = before
        return picked

    def _require(self, trainer: Any, everyone: list[bytes], prompts: list, hashes: list[bytes]) -> None:
        """Stop all processes together if a prompt has no completion."""
        missing = [h for h in everyone if h not in self.reader.prompts]
        if not missing:
            return
        from ..stopping import stop_together

        ours = next((p for p, h in zip(prompts, hashes, strict=True) if h not in self.reader.prompts), None)
        shown = "of another process" if ours is None else shorten(ours)
        problem = TeacherScoreError(
            f"The cache {self.reader.folder} has no completion for {len(missing)} of {len(everyone)} prompts, the "
            f"first is {shown}. {RENDERING}"
        )
        stop_together(trainer, str(self.reader.folder), problem)

    def restart(self, mode: str) -> None:
        """Begin with the first completions again."""
        self._counts[mode] = {}

    # With checkpoints

    def save_state(self, folder: str) -> None:
        """Write how far each prompt has come; inside a buffered batch, as it was before that batch."""
        trainer = self.trainer
        if trainer is None or not trainer.args.should_save:
            return
        counts = dict(self._counts["train"])
        if trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations):
            counts |= self._before  # a resumed run makes the batch again
        os.makedirs(folder, exist_ok=True)
        np.save(os.path.join(folder, _STATE), np.array([counts.get(p, 0) for p in self.reader.prompts], np.int64))

    def load_state(self, folder: str) -> None:
        """Continue from [`save_state`]."""
        if self.trainer is None:
            return
        path = os.path.join(folder, _STATE)
        if not os.path.exists(path):
            raise ValueError(
                f"The checkpoint {folder} must hold {_STATE} to resume with stored completions, but does not. The run "
                "would begin with the first ones again. Resume from a checkpoint of a run that replayed this cache."
            )
        counts = np.load(path).tolist()
        if len(counts) > len(self.reader.prompts):
            raise ValueError(
                f"The checkpoint {folder} belongs to a cache of {len(counts)} prompts, but {self.reader.folder} has "
                f"{len(self.reader.prompts)}. Resume with the cache that the run had."
            )
        self._counts["train"] = {p: n for p, n in zip(self.reader.prompts, counts, strict=False) if n}


class _Restart(TrainerCallback):
    def __init__(self, replay: Replay):
        self.replay = replay

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.replay.restart("train")

    def on_evaluate(self, args, state, control, **kwargs):
        self.replay.restart("eval")


RENDERING = (
    "The student's prompts must be those that were scored: the same dataset, chat template and chat_template_kwargs. "
    "Score them with `trl-opd score --tokenizer STUDENT`, into the same folder if they come after the rows that are "
    "there."
)


def shorten(prompt: Any, limit: int = 80) -> str:
    """A prompt for a message."""
    shown = repr(prompt)
    return shown if len(shown) <= limit else f"…{shown[-limit:]}"


def check_replay(trainer: Any, reader: CacheReader) -> None:
    """
    Refuse what would take stored completions for samples of the student.

    Raises:
        ValueError: Naming the field.
    """
    args = trainer.args
    if args.credit != "direct":
        raise ValueError(
            f"credit must be 'direct' with stored completions, got {args.credit!r}. Its gradient is right for tokens "
            "that the student sampled itself, which these are not. Set credit='direct', support='teacher_top_k'."
        )
    if getattr(trainer, "has_rewards", False) and args.reward_coef > 0:
        raise ValueError(
            f"reward_coef must be 0 with stored completions, got {args.reward_coef}. GRPO's policy gradient is right "
            "for tokens that the student sampled itself, which these are not. Set reward_coef=0 to log the rewards."
        )
    if trainer.use_vllm:
        raise ValueError(
            "use_vllm must be False with stored completions, got True. Nothing is generated, and its importance "
            "correction needs the log-probs of a student that sampled the tokens. Unset it."
        )
    if trainer.tools or trainer._is_vlm:
        raise ValueError(
            "Stored completions cannot be replayed with tools, environments or a vision-language student: calls would "
            "be made again, and images are not stored. Leave them out, or sample the completions."
        )
    if reader.longest > args.max_completion_length:
        raise ValueError(
            f"max_completion_length must be at least that of the stored completions, {reader.longest} tokens, got "
            f"{args.max_completion_length}. They are not cut. Set max_completion_length={reader.longest}."
        )


def check_prompts(trainer: Any, reader: CacheReader, dataset: Any, limit: int = 1000) -> None:
    """
    Look up prompts of a dataset, spread evenly over it, before anything is trained.

    Raises:
        ValueError: If one has no stored completion.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) == 0:
        return
    rows = torch.linspace(0, len(dataset) - 1, min(limit, len(dataset))).round().long().unique().tolist()
    prompts = [dataset[row]["prompt"] for row in rows]
    prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
    missing = [i for i, ids in enumerate(prompt_ids) if prompt_hash(ids) not in reader.prompts]
    if missing:
        raise ValueError(
            f"The dataset's prompts must have stored completions in {reader.folder}, but {len(missing)} of "
            f"{len(rows)} that were looked up have none; row {rows[missing[0]]} is {shorten(prompts[missing[0]])}. "
            f"{RENDERING}"
        )
