# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
`trl-opd doctor`: what is wrong with a run, before it is started.

The checks of this package see a run's arguments, tokenizers and first prompts, and no weights: all processes find the
same. `doctor.models` holds those that need weights.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..checks import Run
from ..findings import Finding
from .known import Known, Reading, RunFacts, gather

logger = logging.getLogger("trl_opd")

_TITLE = "Before training, trl-opd looked at tokens, templates and settings and found:"


_look: ContextVar[Callable[[Run, list[Any]], None] | None] = ContextVar("look_before_weights", default=None)


@contextmanager
def before_weights(look: Callable[[Run, list[Any]], None]) -> Iterator[None]:
    """Inside, a trainer calls `look(run, teacher_tokenizers)` when it is about to load its weights."""
    token = _look.set(look)
    try:
        yield
    finally:
        _look.reset(token)


def preflight(run: Run, teacher_tokenizers: list[Any]) -> list[Finding]:
    """
    The cheap checks, before any weight is loaded.

    Args:
        run ([`Run`]): The trainer's arguments; `run.args.preflight` says what becomes of the findings.
        teacher_tokenizers (`list`): Of `teacher_preflight.check_teacher`.

    Returns:
        `list[Finding]`: Everything that was looked at.

    Raises:
        ValueError: With `preflight="strict"`, naming everything that is wrong.
    """
    look = _look.get()
    if look is not None:
        look(run, teacher_tokenizers)
    if run.args.preflight == "off":
        return []
    findings = _attempt("start", lambda: check_facts(gather(run, teacher_tokenizers), memory=run.args.n_gpu > 0))
    problems = [finding for finding in findings if finding.is_problem]
    if not problems:
        return findings
    listed = "\n".join(f"- [{finding.severity}] {finding}" for finding in problems)
    if run.args.preflight == "strict":
        raise ValueError(
            f"preflight='strict' does not start a run with which something is wrong, and found:\n{listed}\nMend it, "
            "or set preflight='warn' to start all the same."
        )
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        logger.warning(f"{_TITLE}\n{listed}\n(preflight='strict' stops here, preflight='off' does not look.)")
    return findings


def check_facts(facts: RunFacts, *, memory: bool = True) -> list[Finding]:
    """
    All checks that need no weights.

    Args:
        facts ([`RunFacts`]): The run.
        memory (`bool`): Whether its memory is estimated too.
    """
    from .prompts import check_dataset, check_prompt_length
    from .settings import check_generation_config, check_learning_rate, check_loss_type, check_memory
    from .templates import check_chat_template, check_think_boundary, missing_student_template
    from .tokens import check_bos, check_eos, check_pad
    from .vocabularies import check_retokenization, check_special_tokens, check_vocabulary

    findings = list[Finding]()
    bare = missing_student_template(facts)
    readings = list[tuple[Known, list[Reading]]]()
    if bare is not None:
        findings.append(bare)
    else:
        for teacher in facts.teachers:
            try:
                readings.append((teacher, facts.readings(teacher)))
            except Exception as error:  # a template's; training would meet it too
                findings.append(_unreadable(teacher, error))
    readable = not findings
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("eos", lambda: check_eos(facts)),
        ("pad", lambda: check_pad(facts)),
        ("bos", lambda: check_bos(facts, readings)),
        ("special_tokens", lambda: check_special_tokens(facts, readings)),
        ("vocabulary", lambda: check_vocabulary(facts)),
        ("retokenization", lambda: check_retokenization(facts)),
        ("dataset", lambda: check_dataset(facts)),
        ("generation_config", lambda: check_generation_config(facts)),
        ("learning_rate", lambda: check_learning_rate(facts)),
        ("loss_type", lambda: check_loss_type(facts)),
    ]
    if readable:
        checks += [
            ("chat_template", lambda: check_chat_template(facts, readings)),
            ("think_boundary", lambda: check_think_boundary(facts, readings)),
            ("prompt_length", lambda: check_prompt_length(facts, readings)),
        ]
    if memory:
        checks.append(("memory", lambda: check_memory(facts)))
    return findings + [finding for name, check in checks for finding in _attempt(name, check)]


def _unreadable(teacher: Known, error: Exception) -> Finding:
    return Finding(
        "chat_template",
        "error",
        f"a prompt cannot be rendered for the student or {teacher.label}: {error}",
        "Training fails at the first batch.",
        "Mend the prompts, the chat template, or chat_template_kwargs.",
    )


def _attempt(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check that fails has found nothing, and says so."""
    try:
        return check()
    except Exception as error:
        return [Finding(name, "info", f"this check failed with {type(error).__name__}: {error}")]
