# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What a run is going to do, in one screen, before it does it."""

import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .checks import Run
from .data import Splits
from .findings import Finding
from .memory_estimate import MemoryEstimate
from .model_sizes import BNB_4BIT, BNB_4BIT_PLAIN, BNB_8BIT, INT8
from .recipes import get_recipe
from .resume import Start
from .teachers import AdapterTeacher, CachedTeacher, LocalTeacher, RemoteTeacher, RoutedTeacher, SelfTeacher
from .teachers.base import leaves, teacher_name
from .teachers.target import TargetTeacher

_LABEL = 11  # characters of the labels' column
_QUANTIZED = {INT8: "8 bits", BNB_8BIT: "8 bits", BNB_4BIT: "4 bits", BNB_4BIT_PLAIN: "4 bits"}


@dataclass
class Plan:
    """
    A run's plan.

    Args:
        sections (`dict[str, list[str]]`): Paragraphs by their label, in the order in which they are shown.
        findings (`Sequence[Finding]`, *optional*): Of the checks before the start, where they were made.
    """

    sections: dict[str, list[str]] = field(default_factory=dict)
    findings: Sequence[Finding] | None = None

    @property
    def problems(self) -> list[Finding]:
        """What is wrong."""
        return [finding for finding in self.findings or () if finding.is_problem]

    def text(self, width: int | None = None) -> str:
        """
        The plan as plain text.

        Args:
            width (`int`, *optional*): In characters. Defaults to the terminal's, 80 to 119.
        """
        width = width or min(max(shutil.get_terminal_size((80, 24)).columns, 80), 119)
        lines: list[str] = []
        for label, paragraphs in self.sections.items():
            for i, paragraph in enumerate(paragraphs):
                lines += _wrap(paragraph, width, label if i == 0 else "")
        for finding in self.problems:
            lines += ["", *textwrap.wrap(f"[{finding.severity}] {finding}", width, break_on_hyphens=False)]
        return "\n".join(lines)


def _wrap(text: str, width: int, label: str) -> list[str]:
    """A paragraph beside its label; lines of a table (which begin with a blank) are kept as they are."""
    if text.startswith(" "):
        return [f"{label:<{_LABEL}}{text}"[:width].rstrip()]
    # Paths are not broken, so that they can be copied
    wrapped = textwrap.wrap(text, width - _LABEL, break_on_hyphens=False, break_long_words=False)
    return [f"{label if i == 0 else '':<{_LABEL}}{line}" for i, line in enumerate(wrapped)]


def make_plan(
    run: Run,
    estimate: MemoryEstimate,
    splits: Splits,
    start: Start,
    *,
    dataset: str = "the dataset",
    rewards: Sequence[str] = (),
    findings: Sequence[Finding] | None = None,
    with_assumptions: bool = False,
) -> Plan:
    """
    The plan of a run.

    Args:
        run ([`checks.Run`]): The trainer's arguments, the teacher resolved.
        estimate ([`MemoryEstimate`]): Its memory, and its models on the meta device.
        splits ([`data.Splits`]): What is trained and evaluated on.
        start ([`resume.Start`]): Whether it resumes.
        dataset (`str`): Name of the dataset.
        rewards (`Sequence[str]`): Names of the reward functions.
        findings (`Sequence[Finding]`, *optional*): Of the checks before the start, if they were made.
        with_assumptions (`bool`): Whether to say what the estimate rests on.

    Returns:
        [`Plan`]
    """
    args = run.args
    sections = {
        "Recipe": _recipe(args),
        "Student": _student(run, estimate),
        "Teacher": _teachers(run, estimate),
        "Objective": [_objective(run, rewards)],
        "Data": _data(splits, dataset),
        "Step": [_step(args)],
        "Length": [_length(args, splits)],
        "Optimizer": [_optimizer(args)],
        "Memory": _memory(estimate, with_assumptions),
        "Writes": [_writes(args)],
        "Start": [_start(start), *start.messages],
    }
    if findings is not None:
        bad = sum(finding.severity == "error" for finding in findings)
        warnings = sum(finding.severity == "warning" for finding in findings)
        found = f"{_count(bad, 'error')} and {_count(warnings, 'warning')}" if bad or warnings else "nothing is wrong"
        sections["Checks"] = [f"{found}; `trl-opd doctor` looks deeper, with the weights."]
    sections["Report"] = [f"trl-opd report {args.output_dir}   (at any time from the first log line on)"]
    return Plan({label: lines for label, lines in sections.items() if lines}, findings)


def _recipe(args: Any) -> list[str]:
    if args.recipe is None:
        return []
    recipe = get_recipe(args.recipe)
    lines = [f"{recipe.name}: {recipe.paper}. {recipe.link or ''}".rstrip(), f"Fidelity: {recipe.fidelity}."]
    changes = args.recipe_changes or {}
    if changes:
        lines.append(
            "Changed: " + ", ".join(f"{k}={_value(new)} (not {_value(old)})" for k, (old, new) in changes.items())
        )
    return lines


def _student(run: Run, estimate: MemoryEstimate) -> list[str]:
    size = estimate.student
    name = run.model if isinstance(run.model, str) else type(run.model).__name__
    if size is None:
        return [str(name)]
    base = size.model.get_base_model() if hasattr(size.model, "get_base_model") else size.model
    trained = size.num_trained
    total = size.num_parameters - (trained if size.adapter_bytes else 0)
    lines = [f"{name}: {type(base).__name__}, {_number(total)} parameters in {_dtype(size)}."]
    if run.peft_config is not None:
        kind = getattr(run.peft_config.peft_type, "value", run.peft_config.peft_type)
        rank = f" of rank {run.peft_config.r}" if hasattr(run.peft_config, "r") else ""
        kind = {"LORA": "LoRA"}.get(kind, kind)
        lines.append(f"{kind}{rank}: {_number(trained)} parameters are trained, {trained / total:.2%} of the model's.")
    else:
        lines.append("All of them are trained.")
    return lines


def _dtype(size: Any) -> str:
    name = str(size.dtype).removeprefix("torch.")
    return f"{name} with {_QUANTIZED[size.quantization]} in its linear layers" if size.quantization else name


def _teachers(run: Run, estimate: MemoryEstimate) -> list[str]:
    if run.teacher is None:
        return ["none: this is GRPO on the rewards alone."]
    lines: list[str] = []
    routes: dict[int, list[str]] = {}
    if isinstance(run.teacher, RoutedTeacher):
        for name, member in zip(run.teacher.names, run.teacher.members, strict=True):
            for leaf in leaves(member):
                routes.setdefault(id(leaf), []).append(name)
    references = run.teacher.members[1:] if isinstance(run.teacher, TargetTeacher) else []
    for leaf in {id(leaf): leaf for leaf in leaves(run.teacher)}.values():
        text = _one_teacher(leaf, estimate, run.args)
        if id(leaf) in routes:
            text = f"{', '.join(routes[id(leaf)])}: {text}"
        elif any(leaf is reference for reference in references):
            text = f"reference: {text}"
        lines.append(text)
    if run.teacher_view is not None:
        lines.append(f"It reads the prompts of {getattr(run.teacher_view, '__name__', 'teacher_view')}.")
    return lines


def _one_teacher(leaf: Any, estimate: MemoryEstimate, args: Any) -> str:
    name = teacher_name(leaf)
    if isinstance(leaf, LocalTeacher):
        size = estimate.teachers.get(name)
        what = f"{_number(size.num_parameters)} parameters in {_dtype(size)}, " if size is not None else ""
        where = f"on {leaf.device}" if leaf.device is not None else "on the student's device"
        where += {None: "", "model": ", in CPU memory while the student trains", "layers": ", layer by layer"}[
            leaf.offload
        ]
        return f"{name}: {what}{where}."
    if isinstance(leaf, AdapterTeacher):
        kind = "its base weights" if name == "base" else f"its adapter {name.partition(':')[2]}"
        return f"{name}: the student with {kind}; no second model."
    if isinstance(leaf, SelfTeacher):
        moves = {"frozen": "its weights of the start", "live": "its weights of the moment"}
        return f"self: the student with {moves.get(leaf.sync, f'weights that follow it ({leaf.sync})')}."
    if isinstance(leaf, RemoteTeacher):
        return f"{name}: behind a server; it is asked when training starts."
    if isinstance(leaf, CachedTeacher):
        return f"{name}: stored scores; no model."
    return f"{name}: a {type(leaf).__name__}."


def _objective(run: Run, rewards: Sequence[str]) -> str:
    args = run.args
    if run.teacher is None:
        return f"GRPO ({args.loss_type}) on {', '.join(rewards)}; {args.num_generations} completions a prompt."
    parts = [args.divergence + (f" {_value(args.divergence_kwargs)}" if args.divergence_kwargs else "")]
    if args.target != "teacher":
        parts.append(f"to the target {args.target} {_value(args.target_kwargs or {})}".replace(" {}", ""))
    if args.support == "full":
        parts.append("over the whole vocabulary")
    elif args.support == "sampled":
        parts.append("at the sampled token")
    else:
        parts.append(f"over {args.support} (K = {args.support_size}, tail: {args.support_tail})")
    text = " ".join(parts) + f"; credit: {args.credit}; temperature {args.divergence_temperature:g}"
    for name in ("token_weighting", "sample_weighting", "special_token_masking", "schedules"):
        value = getattr(args, name)
        text += f"; {name}: {_value(list(value) if isinstance(value, Mapping) else value)}" if value else ""
    if args.student_fraction != 1.0:
        text += f"; {args.student_fraction:.0%} of the batches from the student"
    if args.distill_coef != 1.0:
        text += f"; distill_coef {args.distill_coef:g}"
    if rewards:
        mix = {"add": "plus", "multiply": "times", "gate": "gated by"}.get(args.reward_mix, args.reward_mix)
        text += f"; {mix} {args.reward_coef:g} x rewards ({', '.join(rewards)})"
    return f"{text}."


def _data(splits: Splits, dataset: str) -> list[str]:
    text = f"{dataset}, {splits.train_name}: {_rows(splits.train)}"
    text += f"; evaluation: {_rows(splits.evaluation)}." if splits.evaluation is not None else "; no evaluation."
    return [text, *splits.notes]


def _rows(dataset: Any) -> str:
    return f"{len(dataset):,} prompts" if hasattr(dataset, "__len__") else "streamed"


def completions_per_step(args: Any) -> int:
    """Completions of an optimizer step, over all processes."""
    return args.per_device_train_batch_size * max(1, args.world_size) * args.gradient_accumulation_steps


def num_steps(args: Any, num_prompts: int | None) -> int | None:
    """
    Optimizer steps of a run; `None` if the dataset has no known length.

    Args:
        args ([`OnPolicyDistillConfig`]): Of the run.
        num_prompts (`int`, *optional*): Rows of the dataset.
    """
    if args.max_steps > 0:
        return int(args.max_steps)
    if num_prompts is None:
        return None
    # GRPO's sampler leaves out what does not fill a generation batch, and gives that batch for each of its iterations
    batches = num_prompts // (args.generation_batch_size // args.num_generations)
    micro_batches = batches * args.steps_per_generation * args.num_iterations
    per_epoch = max(math.ceil(micro_batches / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * per_epoch)


def _step(args: Any) -> str:
    completions = completions_per_step(args)
    per_prompt = args.num_generations
    tokens = completions * args.max_completion_length
    processes = max(1, args.world_size)
    text = f"{_count(completions // per_prompt, 'prompt')} x {_count(per_prompt, 'completion')} of at most "
    text += f"{args.max_completion_length:,} tokens: up to {_number(tokens)} tokens a step ("
    text += f"{args.per_device_train_batch_size} in a micro-batch x {args.gradient_accumulation_steps} accumulated x "
    text += f"{_count(processes, 'process', 'processes')})."
    sampled = args.generation_batch_size
    engine = f"vLLM ({args.vllm_mode})" if args.use_vllm else "transformers"
    return f"{text} {engine} samples {sampled} completions at a time."


def _length(args: Any, splits: Splits) -> str:
    rows = len(splits.train) if hasattr(splits.train, "__len__") else None
    steps = num_steps(args, rows)
    if steps is None:
        return f"{args.num_train_epochs:g} epochs of a streamed dataset."
    completions = steps * completions_per_step(args)
    text = f"{_count(steps, 'step')}, {_number(completions)} completions"
    if rows:
        epochs = completions / (rows * args.num_generations * args.num_iterations)
        text += f", {epochs:.3g} epochs"
    return f"{text}."


def _optimizer(args: Any) -> str:
    name = getattr(args.optim, "value", args.optim)
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    text = f"{name}, learning rate {args.learning_rate:g}, {schedule}"
    text += f" after {args.warmup_steps:g} steps of warmup" if args.warmup_steps else ""
    text += f", weight decay {args.weight_decay:g}" if args.weight_decay else ""
    return f"{text}, gradients clipped at {args.max_grad_norm:g}." if args.max_grad_norm else f"{text}."


def _memory(estimate: MemoryEstimate, with_assumptions: bool) -> list[str]:
    if not estimate.parts:
        return estimate.assumptions
    device = f" of the device's {size_text(estimate.device_total)}" if estimate.device_total else ""
    lines = [f"about {size_text(estimate.total)}{device} for each process at the peak (an estimate):"]
    for name, size in sorted(estimate.parts.items(), key=lambda part: -part[1]):
        phase = estimate.phases[name]
        lines.append(f" {size_text(size):>10}  {name}{'' if phase == 'always' else f' (while {phase})'}")
    lines += [f" {size_text(size):>10}  {name} (not on this device)" for name, size in estimate.elsewhere.items()]
    return lines + (estimate.assumptions if with_assumptions else [])


def _writes(args: Any) -> str:
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    saves = {"no": "no checkpoints", "epoch": "a checkpoint each epoch", "best": "a checkpoint at each best score"}
    checkpoints = saves.get(strategy, f"a checkpoint every {args.save_steps:g} steps")
    reports = [name for name in args.report_to or [] if name != "none"]
    text = f"{args.output_dir}: {checkpoints}, then the model"
    text += f"; reported to {', '.join(reports)}" if reports else ""
    return f"{text}; pushed to the hub." if args.push_to_hub else f"{text}."


def _start(start: Start) -> str:
    if start.finished:
        return f"nothing to do: all {start.step} steps are done."
    return f"resumes after step {start.step} ({start.checkpoint})." if start.checkpoint else "at step 0."


# Words and numbers


def size_text(size: float) -> str:
    """Bytes in GiB, MiB or KiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= 0.95 * unit:
            return f"{size / unit:.1f} {name}" if size < 100 * unit else f"{size / unit:.0f} {name}"
    return f"{size / 2**10:.1f} KiB"


def _number(number: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:g}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
