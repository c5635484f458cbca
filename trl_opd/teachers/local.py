# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""A teacher whose weights live in this process."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..collators import TeacherBatch, TeacherScores
from ..heads import HeadCall, add_head_branch
from ..kernels import fused_linear_divergence
from ..kernels.projection import Head

if TYPE_CHECKING:
    from trl import GRPOTrainer


@dataclass
class ScoreOutput(ModelOutput):
    """Output of a teacher's forward: what the support needs."""

    hidden_states: Tensor | None = None
    sampled_logprobs: Tensor | None = None


class LocalTeacher:
    """
    A teacher model in this process: loaded, frozen, sharded like the student, never saved with it.

    Answers with hidden states and head (the trainer projects them chunk by chunk, beside the student's), or with the
    sampled tokens' log-probs where the support is `"sampled"`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): Path, hub id, or a model.
        init_kwargs: For `from_pretrained`; `dtype` defaults to `"auto"`.
    """

    scores_in_loss = True

    def __init__(self, model: "str | PreTrainedModel", **init_kwargs: Any):
        self.model: Any = model
        self.init_kwargs = {"dtype": "auto", **init_kwargs}
        self._snapshot: Head | None = None
        self._config: Any = None if isinstance(model, str) else model.config

    @property
    def name(self) -> str:
        """The path or id of its weights."""
        if isinstance(self.model, str):
            return self.model
        return get_config_model_id(self._config) or type(self.model).__name__

    @property
    def vocab_size(self) -> int:
        """Entries of its head."""
        return self._config.get_text_config().vocab_size

    def prepare(self, trainer: "GRPOTrainer") -> None:
        """Load, freeze, and wrap the weights as accelerate is configured."""
        if isinstance(self.model, str):
            if trainer.args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
                self.init_kwargs["device_map"] = None
            self.model = create_model_from_path(self.model, **self.init_kwargs)
        model = self.model
        self._config = model.config
        model.requires_grad_(False)
        model.eval()
        add_head_branch(model.get_base_model() if is_peft_model(model) else model, trainer.args.cast_lm_head_to_fp32)
        if trainer.is_deepspeed_enabled:
            self.model = prepare_deepspeed(model, trainer.accelerator)
        elif trainer.is_fsdp_enabled:
            self.model = prepare_fsdp(model, trainer.accelerator)
        else:
            self.model = trainer.accelerator.prepare_model(model, evaluation_mode=True)

    def __call__(self, batch: TeacherBatch) -> TeacherScores:
        return score_with(self.model, batch, self._live_head)

    def _live_head(self, head: Head) -> Head:
        """A head that can still be read when the forward is over. FSDP frees what it gathered, so a copy is kept."""
        if not isinstance(self.model, (FullyShardedDataParallel, FSDPModule)):
            return head
        if self._snapshot is None:
            bias = None if head.bias is None else head.bias.clone()
            self._snapshot = Head(head.weight.clone(), bias, head.logit_scale, head.softcap)
        return self._snapshot


def score_with(model: Any, batch: TeacherBatch, live_head: Any = lambda head: head) -> TeacherScores:
    """Run `model` (with a head branch) over a batch without gradient and collect what its support needs."""
    num_tokens, sampled = batch.num_completion_tokens, batch.support == "sampled"
    kept: dict[str, Head] = {}

    def call(hidden_states: Tensor, head: Head, aux_loss: Tensor | None) -> ScoreOutput:
        hidden_states = hidden_states[:, -num_tokens - 1 : -1]
        if not sampled:
            kept["head"] = live_head(head)
            return ScoreOutput(hidden_states=hidden_states)
        mask = batch.completion_mask.to(hidden_states.device)
        logprobs = fused_linear_divergence(
            hidden_states.flatten(0, 1),
            head.weight,
            student_bias=head.bias,
            student_logit_scale=head.logit_scale,
            student_softcap=head.softcap,
            temperature=batch.temperature,
            target_ids=batch.completion_ids.to(hidden_states.device).flatten(),
            mask=mask.flatten(),
            per_token_grad=True,
        ).student_logprobs
        assert logprobs is not None
        return ScoreOutput(sampled_logprobs=logprobs.view_as(mask))

    with torch.no_grad():
        output = model(**_inputs(batch), head_call=HeadCall(call))
    if sampled:
        return TeacherScores(sampled_logprobs=output["sampled_logprobs"])
    return TeacherScores(hidden_states=output["hidden_states"], head=kept["head"])


def _inputs(batch: TeacherBatch) -> Mapping[str, Any]:
    return {**batch.model_inputs, "input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
