# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Whether `trl-opd train` goes on with what its output folder holds.

The same command line resumes at the last whole checkpoint. A checkpoint is whole if its `trainer_state.json`, which is
written last, can be read, and all files of its weights have the length that they say. `train_config.json`, which is
written before the first step, tells what a run was started with.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .config_file import near_file
from .run_facts import plain

RESUME = ("auto", "never", "always")
CONFIG_FILE = "train_config.json"
_MAY_DIFFER = re.compile(
    "|".join(
        (
            # How long the run is, what it says and where
            r"max_steps|num_train_epochs|output_dir|run_name|project|report_to|disable_tqdm|log_.*|logging_.*|trackio_.*",
            r"hub_.*|push_to_hub.*|wandb_.*|log_completions|num_completions_to_print|include_num_input_tokens_seen",
            # What it saves, evaluates and watches
            r"save_.*|enable_jit_checkpoint|eval_.*|per_device_eval_batch_size|load_best_model_at_end|metric_for_best_model",
            r"greater_is_better|do_eval|do_train|do_predict|preflight|diagnostics|token_view|on_alarm|alarm_thresholds",
            r"overlap_top_k|num_generations_eval",
            # How it resumes
            r"resume|resume_from_checkpoint|restore_callback_states_from_checkpoint|ignore_data_skip|dry_run|traceback",
            # Where and how fast it computes the same
            r"dataloader_.*|ddp_.*|local_rank|loss_backend|loss_chunk_mib|teacher_offload|teacher_batch_size|teacher_device",
            r"gradient_checkpointing.*|activation_checkpointing.*|torch_empty_cache_steps|skip_memory_metrics|debug|use_cpu",
            r"vllm_(server_.*|group_port|gpu_memory_utilization|enable_sleep_mode|tensor_parallel_size)|_.*",
        )
    )
)


@dataclass
class Start:
    """
    How a run starts.

    Args:
        checkpoint (`str`, *optional*): What is resumed.
        step (`int`): Steps that are done.
        finished (`bool`): Whether nothing is left to do.
        unsaved (`bool`): Whether a finished run's model still has to be brought to the output folder.
        messages (`list[str]`): What the user should know.
        moves (`dict[str, str]`): What is moved out of the way before the start.
    """

    checkpoint: str | None = None
    step: int = 0
    finished: bool = False
    unsaved: bool = False
    messages: list[str] = field(default_factory=list)
    moves: dict[str, str] = field(default_factory=dict)


def decide_start(args: Any, config: Mapping[str, Any], resume: str) -> Start:
    """
    Look at the output folder.

    Args:
        args ([`~transformers.TrainingArguments`]): Of the run; its `resume_from_checkpoint` wins over `resume`.
        config (`Mapping[str, Any]`): What the run is started with, of [`describe_config`].
        resume (`str`):
            `"auto"`: resume a run of the same configuration, and refuse another's. `"always"`: resume in any case.
            `"never"`: start anew; what is there is moved to `_earlier.1`, `_earlier.2`, ...

    Raises:
        ValueError: If there is a checkpoint of another configuration, or the one that was asked for is not there.
    """
    if args.resume_from_checkpoint not in (None, False):
        return _given(args)
    folder = Path(args.output_dir).expanduser()
    if resume == "never":
        return _anew(folder)
    checkpoint, skipped = last_checkpoint(folder)
    start = Start(messages=[f"{path} is left out: {reason}." for path, reason in skipped])
    if checkpoint is None:
        return start
    state = _state(checkpoint)
    if resume == "auto":
        _check_same(folder, checkpoint, config)
        _check_not_stopped(folder, checkpoint, state["global_step"])
    start.checkpoint, start.step = str(checkpoint), state["global_step"]
    start.finished = _is_finished(args, state)
    start.unsaved = start.finished and not any(_weights(folder))
    if start.finished:
        start.messages.append(
            f"Already finished: {checkpoint} has all {start.step} steps. A larger max_steps or num_train_epochs goes "
            "on from there; --resume never starts anew."
        )
    return start


def _given(args: Any) -> Start:
    given = args.resume_from_checkpoint
    folder = Path(args.output_dir).expanduser()
    if given is True or str(given).lower() in ("true", "last"):
        checkpoint, skipped = last_checkpoint(folder)
        if checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint must be unset without a checkpoint, got {given!r}, and {folder} has none "
                "that is whole. There is nothing to resume. Unset it: a run resumes by itself when it can."
            )
        messages = [f"{path} is left out: {reason}." for path, reason in skipped]
        return Start(str(checkpoint), _state(checkpoint)["global_step"], messages=messages)
    if str(given).lower() == "false":
        return Start()
    path = Path(str(given)).expanduser()
    reason = why_not_whole(path)
    if reason is not None:
        raise ValueError(
            f"resume_from_checkpoint must be a checkpoint's folder, got {given!r}: {reason}."
            f"{'' if path.exists() else near_file(str(path))}"
        )
    return Start(str(path), _state(path)["global_step"])


def _anew(folder: Path) -> Start:
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return Start()
    records = [folder / name for name in ("_opd", "completions", CONFIG_FILE)]
    old = [*checkpoints, *(path for path in records if path.exists())]
    number = next(n for n in range(1, 10**6) if not (folder / f"_earlier.{n}").exists())
    target = folder / f"_earlier.{number}"
    start = Start(moves={str(path): str(target / path.name) for path in old})
    start.messages.append(f"The checkpoints of the run before are moved to {target}.")
    return start


def _checkpoints(folder: Path) -> list[Path]:
    """Folders of checkpoints, the latest first."""
    if not folder.is_dir():
        return []
    found = {p: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", p.name) for p in folder.iterdir() if p.is_dir()}
    return sorted((p for p, m in found.items() if m), key=lambda p: -int(p.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The last whole checkpoint in a folder, and the later ones that are not, with the reason."""
    skipped: list[tuple[Path, str]] = []
    for path in _checkpoints(folder):
        reason = why_not_whole(path)
        if reason is None:
            return path, skipped
        skipped.append((path, reason))
    return None, skipped


def why_not_whole(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed; `None` if it can."""
    if not checkpoint.is_dir():
        return "it is no folder"
    try:
        state = _state(checkpoint)
    except FileNotFoundError:
        return "it has no trainer_state.json, so it was not written to its end"
    except (ValueError, OSError):
        return "its trainer_state.json cannot be read, so it was not written to its end"
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        return "its trainer_state.json is not that of a run"
    files = _weights(checkpoint)
    if not files:
        return "it has no weights"
    return next((f"its {file.name} {why}" for file in files if (why := _why_cut(file)) is not None), None)


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def _weights(folder: Path) -> list[Path]:
    """The files of a saved model or adapter, those of its index included; or the folders of a sharded one."""
    for name in ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError):
                return [index]
            return [folder / shard for shard in sorted(shards)]
        if (folder / name).is_file():
            return [folder / name]
    nested = [*folder.glob("*/adapter_model.safetensors"), *folder.glob("pytorch_model_fsdp*")]
    return sorted(nested) or sorted(folder.glob("global_step*"))


def _why_cut(file: Path) -> str | None:
    """Why a file of weights is not whole: a safetensors file says in its head how long it is."""
    if not file.exists():
        return "is missing"
    if file.suffix == ".json":
        return "cannot be read"
    if file.suffix != ".safetensors":
        return None
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            head = json.loads(opened.read(length))
    except (ValueError, OSError, MemoryError, OverflowError):
        return "is cut off"
    end = max((entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"), default=0)
    return None if file.stat().st_size == 8 + length + end else "is cut off"


def _is_finished(args: Any, state: Mapping[str, Any]) -> bool:
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    done = state.get("max_steps") and state["global_step"] >= state["max_steps"]
    return bool(done) and state.get("num_train_epochs", 0) >= args.num_train_epochs


# What a run was started with


def describe_config(*parts: Any) -> dict[str, Any]:
    """
    The fields of parsed dataclasses as JSON has them, without secrets, and the number of processes.

    Args:
        parts: Dataclasses, one of them the [`~transformers.TrainingArguments`].
    """
    config: dict[str, Any] = {}
    for part in parts:
        config |= plain({f.name: getattr(part, f.name) for f in dataclasses.fields(part)})
        if hasattr(part, "world_size"):
            config["num_processes"] = part.world_size
    return config


def write_config(output_dir: str, config: Mapping[str, Any]) -> None:
    """Keep what a run is started with, for the next one in its folder."""
    folder = Path(output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{CONFIG_FILE}.new"
    unfinished.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    os.replace(unfinished, folder / CONFIG_FILE)


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that make another run, each with its value before and now; those that one side lacks are left out."""
    same = json.loads(json.dumps(now))
    names = [name for name in same if name in before and not _MAY_DIFFER.fullmatch(name)]
    return {name: (before[name], same[name]) for name in names if before[name] != same[name]}


def _check_same(folder: Path, checkpoint: Path, config: Mapping[str, Any]) -> None:
    before = _read_config(folder)
    choices = (
        "Set another output_dir; or --resume never to start anew (what is there is kept, in _earlier.N); or --resume "
        "always to go on with these fields all the same."
    )
    if before is None:
        raise ValueError(
            f"output_dir must be empty or hold a run of this configuration, got {str(folder)!r} with "
            f"{checkpoint.name} and no {CONFIG_FILE}: what it was started with is not known. {choices}"
        )
    changed = differing(before, config)
    if changed:
        shown = [f"{name} was {_short(old)}, now {_short(new)}" for name, (old, new) in sorted(changed.items())]
        more = f"; and {len(shown) - 8} more" if len(shown) > 8 else ""
        raise ValueError(
            f"output_dir must be empty or hold a run of this configuration, got {str(folder)!r} with "
            f"{checkpoint.name} of another: {'; '.join(shown[:8])}{more}. {choices}"
        )


def _check_not_stopped(folder: Path, checkpoint: Path, step: int) -> None:
    """A run that an alarm has stopped would go on into what it was stopped for."""
    try:
        status = json.loads((folder / "_opd" / "status.json").read_text(encoding="utf-8"))
        stopped = status["state"] == "stopped" and status["step"] == step
    except (OSError, ValueError, KeyError, TypeError):
        return
    if not stopped:
        return
    earlier = next((path for path in _checkpoints(folder) if path != checkpoint and why_not_whole(path) is None), None)
    choice = "" if earlier is None else f"--resume_from_checkpoint {earlier} to go on from before it; or "
    why = status.get("error") or "see trl-opd report."
    raise ValueError(
        f"output_dir must be empty or hold a run to go on with, got {str(folder)!r}: an alarm has stopped its run at "
        f"step {step}. {why} Set {choice}--resume always to go on all the same; or --resume never to start anew."
    )


def _read_config(folder: Path) -> dict[str, Any] | None:
    """Of `trl-opd train`; or, of a run started from Python, what its record says of its arguments."""
    for path, key in ((folder / CONFIG_FILE, None), (folder / "_opd" / "run.json", "config")):
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            known = known if key is None else known[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(known, dict):
            return known
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# What the decision comes to


def move_aside(start: Start) -> None:
    """Move what a run that starts anew would mix with."""
    for source, target in start.moves.items():
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.move(source, target)


def save_from_checkpoint(args: Any, checkpoint: str) -> None:
    """Bring a finished run's model to the output folder: it was stopped between its last step and its end."""
    source = Path(checkpoint)
    best = _state(source).get("best_model_checkpoint") if args.load_best_model_at_end else None
    source = Path(best) if best and Path(best).is_dir() else source
    left = re.compile(r"optimizer.*|scheduler\.pt|scaler\.pt|rng_state.*|trainer_state\.json|.*_state\.pt")
    for path in source.iterdir():
        if path.is_file() and not left.fullmatch(path.name):
            shutil.copy2(path, Path(args.output_dir).expanduser() / path.name)
