# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
`trl-opd train`: what `trl grpo` is for GRPOTrainer, with `teacher_model` beside (or instead of) `reward_funcs`.

    trl-opd train --config examples/opd_lora.yaml
    trl-opd train --config examples/opd_lora.yaml --dry-run
    accelerate launch -m trl_opd.train --config examples/opd_lora.yaml
    torchrun --nproc-per-node 8 -m trl_opd.train --config examples/opd_lora.yaml
"""

import json
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl import DatasetMixtureConfig, ModelConfig, get_peft_config, get_quantization_config
from trl import rewards as trl_rewards
from trl.rewards import get_soft_overlong_punishment
from trl.scripts.grpo import GRPOScriptArguments

from . import cli_help
from .checks import Run, check_run
from .config import OnPolicyDistillConfig
from .data import Splits, choose_splits, load_splits
from .doctor import before_weights, check_facts
from .doctor.known import gather
from .imports import load_object
from .memory_estimate import MemoryEstimate, estimate_memory
from .plan import Plan, make_plan
from .preflight import config_of, student_kwargs
from .progress import shorten
from .recipes import RecipeParser
from .resume import RESUME, Start, decide_start, describe_config, move_aside, save_from_checkpoint, write_config
from .trainer import OnPolicyDistillTrainer

PROG = "trl-opd train"


@dataclass
class OnPolicyDistillScriptArguments(GRPOScriptArguments):
    """
    Script arguments of `trl-opd train`: those of `trl grpo`, the teacher, and how to start.

    Args:
        teacher_model (`str`, *optional*):
            Path, hub id, `base` (the student without its adapter), `adapter:NAME`, `self`, `cache:DIR`, URLs separated
            by commas, or a JSON object of these by the names in the dataset's `teacher` column.
        teacher_view (`str`, *optional*):
            Dotted import path of a function that makes the teacher's prompts (see [`OnPolicyDistillTrainer`]).
        reference_model (`list[str]`, *optional*):
            Further models that `target` is made of, as `teacher_model`.
        prompt_column (`str`, *optional*):
            The dataset's column that holds the prompts, if it is not `prompt`.
        resume (`str`, *optional*, defaults to `"auto"`):
            What becomes of checkpoints in `output_dir`: `"auto"` goes on with a run of the same configuration and
            refuses another's, `"always"` goes on in any case, `"never"` starts anew and moves them to `_earlier.N`.
            `resume_from_checkpoint` wins over it.
        dry_run (`bool`, *optional*, defaults to `False`):
            Check everything that needs no weights, print the plan, and stop.
        traceback (`bool`, *optional*, defaults to `False`):
            Show where in the code an error of the configuration arose.
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
    prompt_column: str | None = field(
        default=None, metadata={"help": "The dataset's column that holds the prompts, if it is not 'prompt'."}
    )
    resume: str = field(
        default="auto",
        metadata={
            "help": "What becomes of checkpoints in `output_dir`: 'auto' goes on with a run of the same configuration "
            "and refuses another's, 'always' goes on in any case, 'never' starts anew and keeps them in _earlier.N.",
            "choices": list(RESUME),
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check everything that needs no weights, print the plan, and stop."}
    )
    traceback: bool = field(
        default=False, metadata={"help": "Show where in the code an error of the configuration arose."}
    )


def make_parser(prog: str = PROG) -> RecipeParser:
    """The parser of all fields."""
    return RecipeParser(
        (OnPolicyDistillScriptArguments, OnPolicyDistillConfig, ModelConfig, DatasetMixtureConfig), prog=prog
    )


def load_reward(name: str) -> str | Callable:
    """A reward function by its name in `trl.rewards` or its dotted import path; a model's path stays a string."""
    if name == "get_soft_overlong_punishment":  # makes a reward function; with these values in `trl grpo`
        return get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
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


def trainer_arguments(
    script_args: OnPolicyDistillScriptArguments,
    args: OnPolicyDistillConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> tuple[dict[str, Any], Any, Splits]:
    """The trainer's arguments from a parsed command line, all splits of its dataset, and those that are used."""
    if not model_args.model_name_or_path:
        raise ValueError(
            "model_name_or_path must be given, got none. There is no student to train. Set it to a path or hub id."
        )
    _check_quantized(model_args)
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
    dataset = load_splits(script_args, mixture, seed=args.seed)
    splits = choose_splits(dataset, script_args, evaluate=args.eval_strategy != "no", seed=args.seed)
    arguments = {
        "model": model_args.model_name_or_path,
        "teacher_model": parse_teacher(script_args.teacher_model),
        "teacher_view": view,
        "reference_model": script_args.reference_model,
        "reward_funcs": rewards or None,
        "args": args,
        "train_dataset": splits.train,
        "eval_dataset": splits.evaluation,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": _peft_config(model_args),
    }
    return arguments, dataset, splits


def _peft_config(model_args: ModelConfig) -> Any:
    """As in `trl`, but a single name stays one: as a text, PEFT takes it for an expression over whole paths."""
    config = get_peft_config(model_args)
    target = getattr(config, "target_modules", None)
    if isinstance(target, str) and re.fullmatch(r"\w+", target):
        config.target_modules = {target}
    return config


def _check_quantized(model_args: ModelConfig) -> None:
    bits = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(model_args, name)), None)
    if bits and not model_args.use_peft:
        raise ValueError(
            f"use_peft must be true with {bits}, got false. Quantized weights cannot be trained, only an adapter on "
            "them. Set use_peft: true."
        )


def make_trainer(
    script_args: OnPolicyDistillScriptArguments,
    args: OnPolicyDistillConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> tuple[OnPolicyDistillTrainer, Any]:
    """The trainer of a parsed command line, and its dataset."""
    arguments, dataset, _ = trainer_arguments(script_args, args, model_args, mixture)
    return OnPolicyDistillTrainer(**arguments), dataset


class _Planned(BaseException):
    """Ends a dry run where the weights would be loaded. Not an Exception: nothing may mistake it for a failure."""


def build(parsed: Sequence[Any], start: Start, *, dry: bool, show: Callable[[Plan], None]) -> Any:
    """
    Check a parsed command line, show its plan, and build the trainer.

    Args:
        parsed: Script arguments, configuration, model arguments and mixture.
        start ([`resume.Start`]): Whether it resumes.
        dry (`bool`): Stop before weights are loaded, and return `None`.
        show (`Callable`): Called with the [`plan.Plan`].
    """
    script_args, args = parsed[:2]
    arguments, _, splits = trainer_arguments(*parsed)

    def look(run: Run, teacher_tokenizers: list[Any]) -> None:
        findings = None
        if dry and args.preflight != "off" and run.teacher is not None:
            findings = check_facts(gather(run, teacher_tokenizers), memory=args.device.type == "cuda")
        show(
            make_plan(
                run,
                _estimate(run, arguments["quantization_config"]),
                splits,
                start,
                dataset=_dataset_name(script_args, parsed[3]),
                rewards=[x if isinstance(x, str) else x.__name__ for x in arguments["reward_funcs"] or []],
                findings=findings,
                with_assumptions=dry,
            )
        )
        if dry:
            raise _Planned

    try:
        if arguments["teacher_model"] is None:  # plain GRPO: its trainer does not look before it loads
            plain = {"train_dataset": splits.train, "eval_dataset": splits.evaluation}
            run = Run(args, arguments["model"], None, bool(arguments["reward_funcs"]), plain)
            run.peft_config = arguments["peft_config"]
            check_run(run)
            look(run, [])
            return OnPolicyDistillTrainer(**arguments)
        with before_weights(look):
            return OnPolicyDistillTrainer(**arguments)
    except _Planned:
        return None


def _estimate(run: Run, quantization_config: Any) -> MemoryEstimate:
    """An estimate of the memory; of a model that cannot be built on the meta device, the reason why there is none."""
    if config_of(run.model, student_kwargs(run.args)) is None:
        raise ValueError(
            f"model_name_or_path must be a model's folder or a hub id, got {run.model!r}, whose config.json cannot be "
            "read. Nothing can be loaded from it. Check the path or id, its revision, and your access to the hub."
        )
    try:
        return estimate_memory(run, quantization_config=quantization_config)
    except Exception as error:  # models bring code of their own: that they have no estimate must not stop a run
        return MemoryEstimate(assumptions=[f"not estimated ({type(error).__name__}: {error})."])


def _dataset_name(script_args: Any, mixture: DatasetMixtureConfig) -> str:
    if mixture.datasets:
        return "a mixture of " + ", ".join(d.path for d in mixture.datasets)
    name = script_args.dataset_name
    return name if isinstance(name, str) else ", ".join(map(str, name))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, plan, train, save; returns the exit code (see `trl-opd train --help`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if set(argv) & {"-h", "--help"}:
        print(cli_help.TRAIN, end="")
        return 0
    if {"--help-all", "--help_all"} & set(argv):
        from .all_fields import all_fields

        print(all_fields(make_parser(), OnPolicyDistillScriptArguments))
        return 0
    # TRL 1.16 calls gradient checkpointing by the names that transformers 5 renamed: nothing that a user can mend
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)
    with errors_of_the_user("--traceback" in argv):
        parsed = make_parser().parse_args_and_config(argv)
        script_args, args = parsed[:2]
        config = describe_config(*parsed)
        start = _decide_together(args, config, script_args.resume)
        if start.finished and not script_args.dry_run:
            return _finish_again(args, start)
        plans: list[Plan] = []

        def show(plan: Plan) -> None:
            plans.append(plan)
            say(f"\n{plan.text()}\n")

        trainer = build(parsed, start, dry=script_args.dry_run, show=show)
    if trainer is None:
        say("This was a dry run: no weights were loaded. Leave out --dry-run to train.")
        return int(args.preflight == "strict" and bool(plans[-1].problems))
    return _train(trainer, args, script_args, config, start)


def _train(trainer: Any, args: Any, script_args: Any, config: dict[str, Any], start: Start) -> int:
    state = PartialState()
    if state.is_main_process:
        move_aside(start)
        write_config(args.output_dir, config)
    state.wait_for_everyone()
    shorten(trainer)
    try:
        trainer.train(resume_from_checkpoint=start.checkpoint)
    except KeyboardInterrupt:
        say(f"\nInterrupted after step {trainer.state.global_step}. The same command goes on at the last checkpoint.")
        return 130
    alarm = next((c.stopped_by for c in trainer.callback_handler.callbacks if getattr(c, "stopped_by", None)), None)
    if alarm is not None:
        say(
            f"Stopped by an alarm, with a checkpoint. {alarm}\nNo model was saved in {args.output_dir} itself. What "
            f"happened: trl-opd report {args.output_dir}"
        )
        return 1
    trainer.save_model(args.output_dir)
    say(f"The model is in {args.output_dir}. What happened: trl-opd report {args.output_dir}")
    if args.push_to_hub:
        name = script_args.dataset_name
        trainer.push_to_hub(dataset_name=name if isinstance(name, str) else None)
    if hasattr(trainer, "end"):  # transformers 5.18: close trackers and process group
        trainer.end()
    return 0


def _finish_again(args: Any, start: Start) -> int:
    for message in start.messages:
        say(message)
    if start.unsaved and PartialState().is_main_process:
        save_from_checkpoint(args, str(start.checkpoint))
        say(f"Its model had not been saved: it is now in {args.output_dir}.")
    return 0


def _decide_together(args: Any, config: dict[str, Any], resume: str) -> Start:
    """The main process looks at the output folder, so that no other finds it changed."""
    state = PartialState()
    decision: list[Any] = [None]
    if state.is_main_process:
        try:
            decision = [decide_start(args, config, resume)]
        except ValueError as error:
            decision = [error]
    if state.num_processes > 1:
        broadcast_object_list(decision)
    if isinstance(decision[0], ValueError):
        raise decision[0]
    return decision[0]


def say(text: str) -> None:
    """Print once, on the main process."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


@contextmanager
def errors_of_the_user(traceback: bool = False, prog: str = PROG) -> Iterator[None]:
    """
    Inside, what is wrong with a configuration ends the program with exit code 2 and its message alone.

    Args:
        traceback (`bool`): Raise it as it is instead.
        prog (`str`): Name of the command.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if traceback:
            raise
        rank = os.environ.get("RANK", "0")
        text = f"{prog}: error: {error}\n(--traceback shows where this arose.)"
        if sys.stderr.isatty():
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            fill = [textwrap.fill(x, width, break_long_words=False, break_on_hyphens=False) for x in text.split("\n")]
            text = "\n".join(fill)
        print(text if rank == "0" else f"[process {rank}] {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    sys.exit(main())
