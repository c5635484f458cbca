# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""One forward pass of a model that teaches."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model, send_to_device
from torch import Tensor
from transformers.utils import ModelOutput

from ..collators import TeacherBatch, TeacherScores
from ..heads import HeadCall
from ..kernels import fused_linear_divergence
from ..kernels.projection import Head


@dataclass
class ScoreOutput(ModelOutput):
    """Output of a teacher's forward: the sampled tokens' log-probs, where the support is these."""

    sampled_logprobs: Tensor | None = None


def takes_positions(model: Any) -> bool:
    """Whether a model's forward takes `position_ids`."""
    model = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    base = model.get_base_model() if is_peft_model(model) else model
    return "position_ids" in inspect.signature(type(base).forward).parameters


def score_with(
    model: Any,
    batch: TeacherBatch,
    live_head: Any = lambda head: head,
    device: str | torch.device | None = None,
) -> TeacherScores:
    """
    Run `model` (with a head branch) over a batch without gradient and collect what its support needs.

    Positions are left to the model, as GRPOTrainer leaves them for the student, unless the prompt is the teacher's
    own: then they skip the padding, and the answers are those of each sequence alone.

    Args:
        model (`torch.nn.Module`): The model, wrapped or not.
        batch ([`TeacherBatch`]): The question.
        live_head (`Callable[[Head], Head]`, *optional*): What makes of the head one that outlives the forward.
        device (`torch.device`, *optional*): Where the model runs, if that is not where the batch is.
    """
    num_tokens, sampled = batch.num_completion_tokens, batch.support == "sampled"
    dense = TeacherScores()

    def call(hidden_states: Tensor, head: Head, aux_loss: Tensor | None) -> ScoreOutput:
        hidden_states = hidden_states[:, -num_tokens - 1 : -1]
        if not sampled:  # kept from accelerate, which would make float32 of them: twice the memory, nothing gained
            dense.hidden_states, dense.head = hidden_states, live_head(head)
            return ScoreOutput()
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

    inputs = _inputs(model, batch)
    with torch.no_grad():
        output = model(**(inputs if device is None else send_to_device(inputs, device)), head_call=HeadCall(call))
    if sampled:
        return TeacherScores(sampled_logprobs=output["sampled_logprobs"])
    return dense


def score_student(model: Any, batch: TeacherBatch, live_head: Any = lambda head: head) -> TeacherScores:
    """
    [`score_with`] for a teacher that is the student with other weights or another adapter. Sampled tokens' log-probs
    come from the function that gives the student's: where the weights are equal, every bit of the answer is.
    """
    if batch.support != "sampled":
        return score_with(model, batch, live_head)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    labels[:, : -batch.num_completion_tokens] = -100
    with torch.no_grad():
        output = model(**_inputs(model, batch), labels=labels, fused_lm_head=True)
    return TeacherScores(sampled_logprobs=output["log_probs"][:, -batch.num_completion_tokens :])


def _inputs(model: Any, batch: TeacherBatch) -> dict[str, Any]:
    inputs = {**batch.model_inputs, "input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    # With images the model makes its own, which have several dimensions
    if batch.own_prompt and not batch.model_inputs and takes_positions(model):
        inputs["position_ids"] = batch.position_ids
    return inputs
