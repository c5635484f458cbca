# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
A keyword branch in a model's forward that hands the last hidden states and the live head to a callable.

`model(..., head_call=call)` runs the backbone and returns `call(hidden_states, head, aux_loss)` instead of logits.
Because it is a branch of `forward` (as TRL's fused head is), autocast and the hooks of DDP, FSDP and DeepSpeed fire
around it, and sharded parameters are whole inside it.
"""

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .kernels.operands import whole
from .kernels.projection import Head


def logit_postprocessing(config: PretrainedConfig) -> tuple[float, float | None]:
    """
    What a model does to its logits after the projection: `(scale, softcap)`.

    Cohere and MPT call the scale `logit_scale`, Muse `output_multiplier`, Falcon-H1 `lm_head_multiplier`; Granite and
    MiniCPM divide by `logits_scaling`, HyperCLOVA X multiplies by it. Gemma's softcap is `final_logit_softcapping`.
    """
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(text, name, None)
        if scale is not None:
            return float(scale), softcap
    scaling = getattr(text, "logits_scaling", None)
    if scaling is None:
        return 1.0, softcap
    return float(scaling) if text.model_type == "hyperclovax" else 1.0 / float(scaling), softcap


def gather_heads(*parameters: Tensor | None) -> Callable[[], AbstractContextManager]:
    """Context factory in which ZeRO-3 partitioned heads are whole; free elsewhere."""
    return lambda: maybe_gather_lm_head_ctx(*parameters)


HeadFunction = Callable[[Tensor, Head, Tensor | None], object]


class HeadCall:
    """
    What to do with the hidden states inside a model's forward.

    A plain object on purpose: FSDP casts and moves the tensors of containers and dataclasses among the forward's
    arguments, and log-probs must not be rounded to bf16 on the way.
    """

    def __init__(self, function: HeadFunction):
        self.function = function

    def __call__(self, hidden_states: Tensor, head: Head, aux_loss: Tensor | None) -> object:
        return self.function(hidden_states, head, aux_loss)


def add_head_branch(model: PreTrainedModel, cast_head_to_fp32: bool = False) -> None:
    """
    Add the `head_call` branch to a model's forward. Without that keyword the forward is what it was.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model (of a PEFT model: its base model). Patched in place, once.
        cast_head_to_fp32 (`bool`, *optional*, defaults to `False`):
            Whether hidden states are cast to float32 before the head, outside autocast.
    """
    if getattr(model, "_opd_head_branch", False):
        return
    original_forward = model.forward
    scale, softcap = logit_postprocessing(model.config)

    @functools.wraps(original_forward)
    def forward(self, *args, head_call: HeadCall | None = None, **kwargs):
        if head_call is None:
            return original_forward(*args, **kwargs)
        kwargs["use_cache"] = False
        text_config = self.config.get_text_config()
        if getattr(text_config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        # Backbone and head are looked up on each call, since FSDP and PEFT replace them after patching
        outputs = self.base_model(*args, **kwargs)
        aux_loss = _router_loss(text_config, outputs, kwargs)
        head = self.get_output_embeddings()
        weight, bias = head_parameters(head)
        hidden_states = outputs.last_hidden_state.to(weight.device)
        with maybe_gather_lm_head_ctx(weight, bias):
            live = Head(whole(weight), whole(bias), scale, softcap)
            if not cast_head_to_fp32:
                return head_call(hidden_states, live, aux_loss)
            with torch.autocast(hidden_states.device.type, enabled=False):
                return head_call(hidden_states.float(), live, aux_loss)

    model.forward = types.MethodType(forward, model)
    model._opd_head_branch = True


def head_parameters(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an output embedding, under PEFT those of the copy that is active now."""
    if hasattr(head, "modules_to_save"):  # PEFT trains a copy of the module
        disabled = head.disable_adapters or not head.active_adapters
        head = head.original_module if disabled else head.modules_to_save[head.active_adapters[0]]
    return head.weight, getattr(head, "bias", None)


def _router_loss(text_config: PretrainedConfig, outputs: object, kwargs: dict) -> Tensor | None:
    """The load-balancing loss of a mixture-of-experts model that returns its router logits."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(
        outputs.router_logits,  # type: ignore[attr-defined]
        text_config.num_experts,
        text_config.num_experts_per_tok,
        kwargs.get("attention_mask"),
    )
