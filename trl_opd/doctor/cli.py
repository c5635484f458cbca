# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
`trl-opd doctor`: what is wrong with a run, before it is started.

    trl-opd doctor --student PATH --teacher PATH_OR_URL --dataset prompts.jsonl
    trl-opd doctor --config run.yaml                    # the file of `trl-opd train`, and any of its fields
    trl-opd doctor --config run.yaml --no-weights       # tokens, templates and settings only: seconds
    trl-opd doctor --config run.yaml --json --fail-on error > findings.json
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import IO, Any

from ..findings import Finding
from .show import as_json, counts, show

_ALIASES = {"student": "model_name_or_path", "teacher": "teacher_model", "dataset": "dataset_name"}
_SCANNED = 1000  # rows of the training data that are counted (lengths, duplicates, empty prompts)

_DESCRIPTION = """\
Looks for what makes distillation runs fail silently: tokens at which the
student does not stop, chat templates that differ by a token, another
vocabulary, a teacher that is too far or that answers otherwise every time,
completions that are cut, learning rates and memory. Each finding says what was
seen, why it matters and what to set.
"""
_EPILOG = """\
Any other option is a field of `trl-opd train` (see its --help), so a YAML file
of a run can be examined as it is. Nothing is trained, and nothing is written
beside --output.

Exit code: 0 if nothing is wrong, 1 if something is (see --fail-on), 2 if the
options themselves are.
"""


def build_parser() -> argparse.ArgumentParser:
    """The doctor's own options."""
    parser = argparse.ArgumentParser(
        prog="trl-opd doctor",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="trl-opd doctor --student M --teacher T --dataset D [options]\n"
        "       trl-opd doctor --config run.yaml [options]",
    )
    models = parser.add_argument_group("the run")
    models.add_argument("--student", metavar="M", help="path or hub id of the student (model_name_or_path)")
    models.add_argument("--teacher", metavar="T", help="path, hub id, URL, 'self', 'base' ... (teacher_model)")
    models.add_argument("--dataset", metavar="D", help="prompts: a .jsonl, .json, .parquet or .csv file, or a hub id")
    models.add_argument("--config", metavar="FILE", help="YAML file of `trl-opd train`")
    looked = parser.add_argument_group("what is looked at")
    looked.add_argument("--samples", metavar="N", type=_positive, default=8, help="prompts to render and score (8)")
    looked.add_argument("--no-weights", action="store_true", help="load no model: tokens, templates and settings only")
    form = parser.add_argument_group("what is printed")
    form.add_argument("--json", action="store_true", help="JSON on standard output and nothing else")
    form.add_argument("--output", metavar="FILE", help="write the report there too (JSON if it ends in .json)")
    form.add_argument(
        "--fail-on",
        choices=("warning", "error"),
        default="warning",
        help="the least severe finding with which the exit code is 1 (warning)",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = build_parser()
    try:
        options, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
        if not any((options.config, options.student, "--model_name_or_path" in rest)):
            parser.error("say what to look at: --student, --teacher and --dataset, or --config run.yaml")
        with _stdout_for_the_report() as stdout:
            findings, facts = examine(options, rest)
            report(findings, facts, options, stdout)
    except SystemExit as end:  # argparse's, ours and the run's
        return end.code if isinstance(end.code, int) else 2
    return facts["exit_code"]


@contextmanager
def _stdout_for_the_report() -> Iterator[IO[str]]:
    """Inside, whatever libraries print goes to standard error, also from below Python."""
    stdout = sys.stdout
    stdout.flush()
    try:
        number = stdout.fileno()
        kept = os.dup(number)
    except (OSError, ValueError):  # a stream that is no file
        with redirect_stdout(sys.stderr):
            yield stdout
        return
    try:
        os.dup2(sys.stderr.fileno(), number)
        report_to = os.fdopen(os.dup(kept), "w", encoding=stdout.encoding, errors="replace")
        with report_to, redirect_stdout(sys.stderr):
            yield report_to
    finally:
        os.dup2(kept, number)
        os.close(kept)


def report(findings: Sequence[Finding], facts: dict[str, Any], options: argparse.Namespace, stdout: IO[str]) -> None:
    """Print, write, and set the exit code among the facts."""
    number = counts(findings)
    facts["exit_code"] = int(bool(number["error"] or (number["warning"] and options.fail_on == "warning")))
    if options.json:
        print(as_json(findings, facts), file=stdout)
    else:
        show(findings, facts, stdout)
    stdout.flush()
    if options.output:
        with open(os.path.expanduser(options.output), "w", encoding="utf-8") as f:
            if options.json or options.output.endswith(".json"):
                print(as_json(findings, facts), file=f)
            else:
                show(findings, facts, f)


def examine(options: argparse.Namespace, rest: Sequence[str]) -> tuple[list[Finding], dict[str, Any]]:
    """
    Everything that the options ask for.

    Returns:
        `list[Finding]`: What was found.
        `dict`: `student`, `teacher`, `dataset`, `weights` (whether any were loaded), `prompts` side by side.
    """
    progress("reading the configuration ...")
    # TRL 1.16 calls gradient checkpointing by the names that transformers 5 renamed: nothing that a user can mend
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)
    facts: dict[str, Any] = {"student": None, "teacher": None, "dataset": None, "weights": False, "prompts": []}
    try:
        parsed = _parse(options, rest)
    except ValueError as error:  # of the configuration's own checks
        return [Finding("start", "error", str(error))], facts
    script_args, args, model_args, mixture = parsed
    facts["student"], facts["teacher"] = model_args.model_name_or_path, script_args.teacher_model
    facts["dataset"] = script_args.dataset_name or ", ".join(
        str(d.data_files or d.path) for d in mixture.datasets or []
    )
    if script_args.teacher_model is None:
        raise _bad_options("--teacher must be given. There is nothing to compare the student with")
    findings = _run_checks(parsed, args, options, facts)
    return findings, facts


def _parse(options: argparse.Namespace, rest: Sequence[str]) -> Any:
    """The arguments of `trl-opd train`, with a run that writes nothing."""
    import torch

    from ..train import make_parser  # (slow to import)

    arguments = list(rest)
    for name, field in _ALIASES.items():
        if getattr(options, name) is not None:
            arguments += [f"--{field}", getattr(options, name)]
    if options.config:
        arguments += ["--config", options.config]
    if not torch.accelerator.is_available() and "--use_cpu" not in arguments:
        progress("this machine has no accelerator: looking on the CPU")
        arguments += ["--use_cpu", "true"]
    return make_parser("trl-opd doctor").parse_args_and_config(arguments)


def _bad_options(text: str) -> SystemExit:
    print(f"trl-opd doctor: error: {text}.", file=sys.stderr)
    return SystemExit(2)


def _run_checks(parsed: Any, args: Any, options: argparse.Namespace, facts: dict[str, Any]) -> list[Finding]:
    """The checks without weights while the trainer is built, and those with weights when it is."""
    from ..train import make_trainer
    from . import before_weights

    findings = list[Finding]()
    with tempfile.TemporaryDirectory() as folder, before_weights(_Look(options, findings, facts)):
        args.output_dir, args.preflight, args.report_to = folder, "off", []
        args.push_to_hub, args.log_completions, args.log_completions_hub_repo = False, False, None
        try:
            progress("building the trainer ...")
            trainer, _ = make_trainer(*parsed)
        except _Enough:
            return findings
        except Exception as error:
            return [*findings, not_started(error)]
        facts["weights"] = True
        return findings + _with_weights(trainer, options)


def _with_weights(trainer: Any, options: argparse.Namespace) -> list[Finding]:
    from .models import check_models

    try:
        return check_models(trainer, num_samples=options.samples, progress=progress)
    except Exception as error:
        return [not_started(error)]


class _Enough(Exception):
    """The trainer needs no building any further."""


class _Look:
    """The checks without weights, at the moment when the trainer is about to load them."""

    def __init__(self, options: argparse.Namespace, findings: list[Finding], facts: dict[str, Any]):
        self.options, self.findings, self.facts = options, findings, facts

    def __call__(self, run: Any, teacher_tokenizers: list[Any]) -> None:
        from . import check_facts, gather
        from .templates import side_by_side

        progress("comparing tokens, templates and settings ...")
        number = self.options.samples
        known = gather(run, teacher_tokenizers, num_samples=number, num_scanned=_SCANNED, read_streams=True)
        self.findings += check_facts(known)
        # An error of a template is a finding already
        with suppress(Exception):
            self.facts["prompts"] = side_by_side(known, [(t, known.readings(t)) for t in known.teachers])
        if self.options.no_weights:
            self.findings += self._servers(run, known.student.tokenizer)
            raise _Enough

    def _servers(self, run: Any, tokenizer: Any) -> list[Finding]:
        """The checks of [`RemoteTeacher.check`], which ask the servers alone."""
        from ..teachers import RemoteTeacher
        from ..teachers.base import leaves

        findings = list[Finding]()
        for leaf in leaves(run.teacher):
            if isinstance(leaf, RemoteTeacher):
                progress("asking the teacher's servers ...")
                findings += leaf.check(
                    support=run.args.support,
                    support_size=run.args.support_size,
                    temperature=run.args.divergence_temperature,
                    max_completion_length=run.args.max_completion_length,
                    tokenizer=tokenizer,
                )
        return findings


def not_started(error: Exception) -> Finding:
    """What kept the trainer from being built."""
    trace, files = error.__traceback__, set[str]()
    while trace is not None:
        files.add(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    text = str(error) or type(error).__name__
    seen = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
    if "trl_opd.vocabulary" in files:
        return Finding("vocabulary", "error", seen)
    return Finding("start", "error", seen, "The trainer cannot be built, so that nothing behind this was looked at.")


def progress(text: str) -> None:
    """A line on standard error."""
    print(f"trl-opd doctor: {text}", file=sys.stderr, flush=True)
