# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Everything about a run's arguments that can be wrong before any weight is loaded, in one order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import OnPolicyDistillConfig
from .preflight import check_dataset, check_masked_tokens, check_mix, check_peft, check_sources, check_student
from .recipes import check_needs
from .rollout_checks import check_rollout_columns, check_rollout_sources, samples_student_only
from .teacher_preflight import check_adapter, check_teacher_columns, check_teacher_fields
from .teachers import MixtureTeacher, RemoteTeacher, RoutedTeacher, SelfTeacher
from .teachers.target import TargetTeacher


@dataclass
class Run:
    """Arguments of [`OnPolicyDistillTrainer`], the teacher resolved."""

    args: OnPolicyDistillConfig
    model: Any
    teacher: Any
    has_rewards: bool
    datasets: Mapping[str, Any]
    processing_class: Any = None
    peft_config: Any = None
    quantization_config: Any = None
    teacher_view: Any = None
    num_references: int = 0
    tools: Any = None
    rollout_func: Any = None
    environment_factory: Any = None


def check_run(run: Run) -> None:
    """
    Check a run.

    Raises:
        ValueError: Naming the argument, its rule, what breaks and what to set.
    """
    args, teacher = run.args, run.teacher
    check_sources(args, teacher, run.has_rewards, run.environment_factory)
    check_teacher_fields(args, teacher)
    for name, dataset in run.datasets.items():
        check_dataset(dataset, name, run.environment_factory)
        check_teacher_columns(dataset, name, teacher, run.teacher_view)
    check_peft(run.peft_config, run.model)
    check_adapter(teacher, run.model, run.peft_config)
    if teacher is None:
        _check_plain_grpo(args)
        return
    _check_recipe(run)
    check_rollout_columns(run.datasets["train_dataset"], "train_dataset", args)
    check_rollout_sources(
        args,
        teacher,
        has_rewards=run.has_rewards,
        view=run.teacher_view,
        tools=run.tools,
        rollout_func=run.rollout_func,
        environment_factory=run.environment_factory,
    )
    _check_objective(run)
    check_student(run.model)
    check_mix(args, run.has_rewards)
    check_masked_tokens(args, run.model, run.processing_class)


def _check_plain_grpo(args: OnPolicyDistillConfig) -> None:
    """Without a teacher the trainer is GRPOTrainer: a recipe or another source of completions would be ignored."""
    if args.recipe is not None or not samples_student_only(args):
        name = "recipe" if args.recipe is not None else "student_fraction or injected_completions"
        raise ValueError(
            f"teacher_model must be given with {name}, got none. Without a teacher this is GRPO as it is. Pass "
            "teacher_model= ('self' costs no second model; distill_coef=0 leaves its loss out)."
        )


def _check_recipe(run: Run) -> None:
    """What the recipe needs beside its fields."""
    dataset = run.datasets["train_dataset"]
    check_needs(
        run.args,
        columns=getattr(dataset, "column_names", None),
        has_view=run.teacher_view is not None,
        has_rewards=run.has_rewards or run.environment_factory is not None,
        num_references=run.num_references,
        teachers=_kind(run.teacher),
        has_turns=any(x is not None for x in (run.tools, run.rollout_func, run.environment_factory)),
    )


def _kind(teacher: Any) -> str:
    """What `teacher_model=` is, in the words of [`recipes.check_needs`]."""
    if isinstance(teacher, TargetTeacher):
        return _kind(teacher.members[0])
    for kind, name in (
        (RoutedTeacher, "routed"),
        (MixtureTeacher, "mixture"),
        (SelfTeacher, "self"),
        (RemoteTeacher, "remote"),
    ):
        if isinstance(teacher, kind):
            return name
    return "one"


def _check_objective(run: Run) -> None:
    """Slots that need rewards, or that rewards would meet otherwise than it seems."""
    args = run.args
    for name, identity in (("reward_mix", "add"), ("target", "reward_tilt")):
        asks = getattr(args, name) != identity if name == "reward_mix" else args.target == identity
        if asks and not run.has_rewards and run.environment_factory is None:
            raise ValueError(
                f"reward_funcs must be given with {name}={getattr(args, name)!r}, got none. It is a function of the "
                f"rewards. Pass reward_funcs=, or unset {name}."
            )
    if args.ratio_anchor != 1.0 and not run.has_rewards and args.credit != "policy_gradient":
        raise ValueError(
            f"ratio_anchor must be 1 without a policy gradient, got {args.ratio_anchor!r}. It moves the denominator "
            "of GRPO's ratio, which nothing is multiplied with. Pass reward_funcs=, or set credit='policy_gradient'."
        )
