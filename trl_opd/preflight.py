# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Checks of the trainer's arguments that need no weights, so that bad input fails before a GPU minute is spent."""

import os
import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PromptLearningConfig
from torch import nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PretrainedConfig

from .config import OnPolicyDistillConfig
from .kernels.dispatch import why_not_triton
from .vocabulary import as_tokenizer
from .weighting import special_token_ids


def check_sources(
    args: OnPolicyDistillConfig, teacher: object, has_rewards: bool, environment_factory: object
) -> None:
    """A teacher or a reward is required, and rewards need something to compare."""
    if teacher is None and not has_rewards and environment_factory is None:
        raise ValueError(
            "teacher_model or reward_funcs must be given, got neither. There is nothing to train towards. Pass "
            "teacher_model= to distil, reward_funcs= for GRPO, or both."
        )
    if teacher is None and args.num_generations < 2:  # type: ignore[operator]
        raise ValueError(
            f"num_generations must be at least 2 without a teacher, got {args.num_generations}. GRPO compares the "
            "completions of one prompt: with a single one every advantage is zero. Set num_generations, or pass "
            "teacher_model=."
        )
    if teacher is not None and has_rewards:
        check_reward_group(args)


def check_reward_group(args: OnPolicyDistillConfig) -> None:
    """Beside a teacher, rewards that are trained on need two completions a prompt."""
    if args.num_generations < 2 and args.reward_coef > 0:  # type: ignore[operator]
        raise ValueError(
            f"num_generations must be at least 2 with rewards, got {args.num_generations}. GRPO compares the "
            "completions of one prompt: with a single one every advantage is zero and the reward trains nothing. Set "
            "num_generations, or reward_coef=0 to log the rewards only."
        )


def check_mix(args: OnPolicyDistillConfig, has_rewards: bool) -> None:
    """Combinations of the distillation with GRPO's other terms."""
    needs_logprobs = needs_per_token_grad(args, has_rewards)
    if needs_logprobs and args.divergence_temperature != args.temperature:
        raise ValueError(
            f"distill_temperature must equal temperature ({args.temperature}) beside rewards, beta or an entropy "
            f"bonus, got {args.distill_temperature!r}. They share one projection with the divergence. Leave "
            "distill_temperature unset."
        )
    reason = why_not_triton(args.device) if args.loss_backend == "triton" else None
    if reason is not None:
        raise ValueError(
            f"loss_backend='triton' cannot be used: {reason}. Leave loss_backend='auto', which takes Triton where it "
            "runs."
        )
    if needs_logprobs and args.loss_backend == "liger":
        raise ValueError(
            "loss_backend must be 'auto' or 'torch' beside rewards, beta or an entropy bonus, got 'liger'. Liger "
            "returns a scalar, and these terms need differentiable log-probs from the same projection."
        )


def needs_per_token_grad(args: OnPolicyDistillConfig, has_rewards: bool) -> bool:
    """Whether GRPO's part of the loss has a gradient of its own."""
    entropy_bonus = args.entropy_coef != 0.0 or args.use_adaptive_entropy
    return (has_rewards and args.reward_coef > 0) or args.beta != 0.0 or entropy_bonus


def check_student(model: Any) -> None:
    """A deep copy of a model that a trainer has patched samples with the weights of the original."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = vars(model).get("forward") if isinstance(model, nn.Module) else None
    while forward is not None:
        if getattr(forward, "__self__", model) is not model:
            raise ValueError(
                "model must run its own weights, got a copy of a model that a trainer had patched: its forward still "
                "calls the original, so the student would never see what it learns. Build it anew: "
                "type(model)(model.config), then load_state_dict(model.state_dict())."
            )
        function = getattr(forward, "__func__", forward)
        names = getattr(getattr(function, "__code__", None), "co_freevars", ())
        cells = dict(zip(names, getattr(function, "__closure__", None) or (), strict=True))
        forward = cells["original_forward"].cell_contents if "original_forward" in cells else None


def check_dataset(dataset: Any, name: str, environment_factory: object) -> None:
    """The `prompt` column must exist, unless an environment brings the prompts."""
    if isinstance(dataset, (dict, DatasetDict, IterableDatasetDict)):
        for split, part in dataset.items():
            check_dataset(part, f"{name}[{split!r}]", environment_factory)
        return
    columns = dataset.column_names if isinstance(dataset, (Dataset, IterableDataset)) else None
    if columns is not None and "prompt" not in columns and environment_factory is None:
        raise ValueError(
            f"{name} must have a 'prompt' column, got {columns}. The student completes prompts, as text or as a list "
            "of messages. Rename the column that holds them: dataset.rename_column(..., 'prompt')."
        )


def check_peft(peft_config: PeftConfig | None, model: object) -> None:
    """Adapters that the distillation head would not see."""
    configs = list(getattr(model, "peft_config", {}).values()) if isinstance(model, nn.Module) else []
    for config in [peft_config, *configs]:
        if isinstance(config, PromptLearningConfig):
            raise ValueError(
                f"peft_config must adapt weights, got {type(config).__name__}. Prompt learning prepends virtual "
                "tokens, which would shift every position against the teacher's. Use e.g. LoraConfig."
            )
        targets = getattr(config, "target_modules", None)
        if _targets_head(targets):
            shown = targets if isinstance(targets, str) else sorted(targets)  # type: ignore[arg-type]
            raise ValueError(
                f"peft_config must not target the language-model head, got target_modules={shown!r}. The "
                "divergence multiplies by the head's weight directly, so its adapter would never be trained. Remove "
                "it from target_modules, or train the whole head with modules_to_save=['lm_head']."
            )


def _targets_head(targets: Any) -> bool:
    """Whether `target_modules` (names, or one regular expression over the full name) covers an output embedding."""
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in ("lm_head", "base.lm_head", "embed_out"))
    return any(name.split(".")[-1] in ("lm_head", "embed_out") for name in targets or ())


def check_path(path: str, what: str) -> None:
    """A string that looks like a path must be a model's folder."""
    path = os.path.expanduser(path)
    looks_local = path.startswith((os.sep, "./", "../")) or path.count("/") > 1
    if (looks_local or os.path.exists(path)) and not os.path.isfile(os.path.join(path, "config.json")):
        state = "has no config.json" if os.path.isdir(path) else "does not exist"
        raise ValueError(
            f"{what} must be a model's folder or a hub id, got {path!r}, which {state}. Nothing can be loaded from "
            "it. Check the path, or save the model there with save_pretrained."
        )


def _load(auto: Any, path: str, kwargs: Mapping[str, Any]) -> Any:
    """A config, tokenizer or processor that may not be there."""
    keep = {k: kwargs[k] for k in ("revision", "trust_remote_code", "subfolder", "token", "cache_dir") if k in kwargs}
    try:
        return auto.from_pretrained(path, **keep)
    except (OSError, ValueError, KeyError):
        return None


def config_of(model: object, kwargs: Mapping[str, Any]) -> PretrainedConfig | None:
    return _load(AutoConfig, model, kwargs) if isinstance(model, str) else getattr(model, "config", None)


def tokenizer_of(model: object, config: PretrainedConfig | None, kwargs: Mapping[str, Any]) -> Any:
    path = model if isinstance(model, str) else getattr(config, "_name_or_path", None)
    if not path:
        return None
    tokenizer = as_tokenizer(_load(AutoTokenizer, path, kwargs) or _load(AutoProcessor, path, kwargs))
    # Where no tokenizer was saved, transformers makes up one of the model's type that knows a few special tokens only
    made_up = tokenizer is not None and not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    return None if made_up else tokenizer


def student_tokenizer(model: Any, args: OnPolicyDistillConfig, processing_class: object) -> Any:
    kwargs = student_kwargs(args)
    return as_tokenizer(processing_class) or tokenizer_of(model, config_of(model, kwargs), kwargs)


def student_kwargs(args: OnPolicyDistillConfig) -> Mapping[str, Any]:
    return {"trust_remote_code": args.trust_remote_code, **_as_dict(args.model_init_kwargs)}


def check_masked_tokens(args: OnPolicyDistillConfig, model: Any, processing_class: object) -> None:
    """The tokens of `special_token_masking` must be tokens; a tokenizer that is not known yet is asked later."""
    if args.special_token_masking:
        tokenizer = student_tokenizer(model, args, processing_class)
        if tokenizer is not None:
            special_token_ids(args.special_token_masking, tokenizer)


def _as_dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
