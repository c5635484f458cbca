# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
`trl-opd train`: what `trl grpo` is for GRPOTrainer, with `teacher_model` beside (or instead of) `reward_funcs`.

    trl-opd train --config examples/opd_lora.yaml
    accelerate launch -m trl_opd.train --config examples/opd_lora.yaml
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import load_dataset
from trl import DatasetMixtureConfig, ModelConfig, get_dataset, get_peft_config, get_quantization_config
from trl import rewards as trl_rewards
from trl.scripts.grpo import GRPOScriptArguments

from .config import OnPolicyDistillConfig
from .imports import load_object
from .recipes import RecipeParser
from .trainer import OnPolicyDistillTrainer


@dataclass
class OnPolicyDistillScriptArguments(GRPOScriptArguments):
    """
    Script arguments of `trl-opd train`: those of `trl grpo`, and the teacher.

    Args:
        teacher_model (`str`, *optional*):
            Path, hub id, `base` (the student without its adapter), `adapter:NAME`, `self`, `cache:DIR`, URLs separated
            by commas, or a JSON object of these by the names in the dataset's `teacher` column.
        teacher_view (`str`, *optional*):
            Dotted import path of a function that makes the teacher's prompts (see [`OnPolicyDistillTrainer`]).
        reference_model (`list[str]`, *optional*):
            Further models that `target` is made of, as `teacher_model`.
    """

    teacher_model: str | None = field(
        default=None,
        metadata={
            "help": "Teacher: a path, a hub id, 'base', 'adapter:NAME', 'self', 'cache:DIR', URLs separated by "
            "commas, or a JSON object of these by the names in the dataset's 'teacher' column."
        },
    )
    teacher_view: str | None = field(
        default=None, metadata={"help": "Import path of a function that makes the teacher's prompts."}
    )
    reference_model: list[str] | None = field(
        default=None,
        metadata={"help": "Further models that `target` is made of, as teacher_model."},
    )


def load_reward(name: str) -> str | Callable:
    """A reward function by its name in `trl.rewards` or its dotted import path; a model's path stays a string."""
    if hasattr(trl_rewards, name):
        return getattr(trl_rewards, name)
    return load_object(name, "reward_funcs must hold names of trl.rewards or dotted import paths")


def parse_teacher(teacher_model: Any) -> Any:
    """The `teacher_model` of a command line or YAML file: a JSON object becomes a dict."""
    if not isinstance(teacher_model, str) or not teacher_model.lstrip().startswith("{"):
        return teacher_model
    try:
        return json.loads(teacher_model)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"teacher_model must be a name or a JSON object, got {teacher_model!r}: {error}. Write it as "
            '\'{"math": "path/of/one", "code": "path/of/another"}\'.'
        ) from error


def load_splits(script_args: OnPolicyDistillScriptArguments, mixture: DatasetMixtureConfig) -> Any:
    """The dataset of `datasets:` (a mixture) or `dataset_name:`."""
    if mixture.datasets:
        return get_dataset(mixture)
    if not script_args.dataset_name:
        raise ValueError("dataset_name or datasets must be given, got neither. There are no prompts to complete.")
    return load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )


def make_trainer(
    script_args: OnPolicyDistillScriptArguments,
    args: OnPolicyDistillConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> tuple[OnPolicyDistillTrainer, Any]:
    """The trainer of a parsed command line, and its dataset."""
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path must be given, got none. There is no student to train.")
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    rewards: list[str | Callable] = [load_reward(name) for name in script_args.reward_funcs or []]
    if script_args.reward_model_name_or_path:
        rewards.append(script_args.reward_model_name_or_path)
    view = None
    if script_args.teacher_view:
        view = load_object(script_args.teacher_view, "teacher_view must be a dotted import path")
    dataset = load_splits(script_args, mixture)
    trainer = OnPolicyDistillTrainer(
        model=model_args.model_name_or_path,
        teacher_model=parse_teacher(script_args.teacher_model),
        teacher_view=view,
        reference_model=script_args.reference_model,
        reward_funcs=rewards or None,
        args=args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    return trainer, dataset


def main(argv: list[str] | None = None) -> None:
    """Parse, train, save."""
    parser = RecipeParser(
        (OnPolicyDistillScriptArguments, OnPolicyDistillConfig, ModelConfig, DatasetMixtureConfig),
        prog="trl-opd train",
    )
    script_args, args, model_args, mixture = parser.parse_args_and_config(argv)
    trainer, _ = make_trainer(script_args, args, model_args, mixture)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    main()
