# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The prompts of a run: a local file, a folder, or a dataset of the hub, by name.

    dataset_name: data.jsonl                        # also .json, .parquet, .csv, each also with .gz
    dataset_name: [part1.jsonl, part2.jsonl]        # or "part*.jsonl"
    dataset_name: {train: a.jsonl, test: b.jsonl}   # the splits by name
    dataset_name: data/                             # a folder with such files, or one of save_to_disk
    dataset_name: trl-lib/DeepMath-103K             # the hub's
    datasets: [{path: ..., split: ...}]             # a mixture, as `trl` has it
"""

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset, DatasetDict, ReadInstruction, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from trl import DatasetMixtureConfig, get_dataset

from .config_file import near_file, near_name

FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_EVALUATION = ("test", "validation", "eval", "valid", "dev")
_LIKE_PROMPT = ("question", "problem", "instruction", "query", "input", "prompts", "text", "messages", "conversations")
# Of a dataset without a split for evaluation: this share of its rows, but not more than so many
_HELD_OUT, _MOST_HELD_OUT = 0.05, 200


@dataclass
class Splits:
    """
    What is trained on and evaluated on.

    Args:
        train, evaluation: The datasets; `evaluation` is `None` without one.
        train_name (`str`): Name of the split that is trained on.
        notes (`list[str]`): What was decided for the user.
    """

    train: Any
    evaluation: Any = None
    train_name: str = "train"
    notes: list[str] = field(default_factory=list)


def load_splits(script_args: Any, mixture: DatasetMixtureConfig, *, seed: int = 42) -> Any:
    """
    The splits of `datasets:` (a mixture) or `dataset_name:`.

    Args:
        script_args ([`train.OnPolicyDistillScriptArguments`]): Names the dataset.
        mixture ([`~trl.DatasetMixtureConfig`]): TRL's mixture, and `test_split_size`.
        seed (`int`): Of the split into training and test rows, so that every process and every resumed run has the
            same.

    Returns:
        [`~datasets.DatasetDict`] (or an `IterableDatasetDict`, streamed)

    Raises:
        ValueError: If it cannot be found or read.
    """
    size = mixture.test_split_size
    if mixture.datasets:
        splits = _guard(
            lambda: get_dataset(replace(mixture, test_split_size=None)), [d.path for d in mixture.datasets]
        )
    elif not script_args.dataset_name:
        raise ValueError(
            "dataset_name or datasets must be given, got neither. There are no prompts to complete. Set dataset_name "
            "to a file (data.jsonl), a folder, or a dataset of the hub."
        )
    else:
        splits = _load_named(script_args, seed)
    if size is not None and len(splits) == 1:
        splits = _split(next(iter(splits.values())), size, seed)
    column = getattr(script_args, "prompt_column", None)
    return splits if column is None else {name: _rename(part, column) for name, part in splits.items()}


def choose_splits(splits: Mapping[str, Any], script_args: Any, *, evaluate: bool, seed: int = 42) -> Splits:
    """
    The split that is trained on, and the one for evaluation.

    Args:
        splits (`Mapping[str, Dataset]`): Of [`load_splits`].
        script_args ([`train.OnPolicyDistillScriptArguments`]):
            Names them: also with a slice, as in `train[:1000]` or `train[:10%]`.
        evaluate (`bool`): Whether there is an evaluation. Where the dataset has no split for it, rows are held out.
        seed (`int`): Of the choice of those.

    Raises:
        ValueError: If a split does not exist, or has no prompts.
    """
    name, notes = script_args.dataset_train_split, []
    if name == "train" and name not in splits and len(splits) == 1:
        name = next(iter(splits))
        notes.append(f"The dataset's only split, {name!r}, is trained on.")
    train = _take(splits, name, "dataset_train_split")
    chosen = Splits(train, train_name=name, notes=notes)
    _check_prompts(train, name)
    if evaluate:
        _choose_evaluation(chosen, splits, script_args, seed)
    return chosen


def _choose_evaluation(chosen: Splits, splits: Mapping[str, Any], script_args: Any, seed: int) -> None:
    wanted = script_args.dataset_test_split
    others = [n for n in _EVALUATION if n in splits and n != chosen.train_name.partition("[")[0]]
    if wanted != "test" or wanted in others:
        chosen.evaluation = _take(splits, wanted, "dataset_test_split")
    elif others:
        chosen.evaluation = splits[others[0]]
        chosen.notes.append(f"The split {others[0]!r} is used for evaluation.")
    elif not isinstance(chosen.train, Dataset) or len(chosen.train) < 2:
        raise ValueError(
            f"dataset_test_split must be one of {sorted(splits)}, got {wanted!r}. The evaluation has no prompts, and "
            "rows of this dataset cannot be held out. Set dataset_test_split, or eval_strategy: 'no'."
        )
    else:
        size = max(1, min(_MOST_HELD_OUT, round(_HELD_OUT * len(chosen.train))))
        parts = chosen.train.train_test_split(test_size=size, seed=seed)
        chosen.train, chosen.evaluation = parts["train"], parts["test"]
        chosen.notes.append(f"{size} rows are held out for evaluation (test_split_size sets how many).")
    _check_prompts(chosen.evaluation, wanted)


def _load_named(script_args: Any, seed: int) -> Any:
    name = script_args.dataset_name
    if isinstance(name, str) and name.lstrip().startswith("{"):
        try:
            name = json.loads(name)
        except json.JSONDecodeError as error:
            raise ValueError(f"dataset_name must be a name or a JSON object, got {name!r}: {error}.") from error
    streaming = bool(script_args.dataset_streaming)
    if isinstance(name, Mapping):
        files = {split: _files_of(value) for split, value in name.items()}
        return _from_files(files, streaming)
    if isinstance(name, Sequence) and not isinstance(name, str):
        return _from_files(_files_of(name), streaming)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return _from_folder(path, streaming)
    if os.path.isfile(path) or any(c in path for c in "*?[") or ("," in path and _type_of(path) is not None):
        return _from_files(_files_of(path), streaming)
    if _looks_local(name):
        raise ValueError(
            f"dataset_name must be a file, a folder or a dataset of the hub, got {name!r}, which does not "
            f"exist (in {os.getcwd()}).{near_file(path)}"
        )
    return _guard(lambda: load_dataset(name, name=script_args.dataset_config, streaming=streaming), [name])


def _looks_local(name: str) -> bool:
    return name.startswith((os.sep, ".", "~")) or name.count("/") > 1 or _type_of(name) is not None


def _type_of(path: str) -> str | None:
    stem, suffix = os.path.splitext(path)
    if suffix in _COMPRESSED:
        suffix = os.path.splitext(stem)[1]
    return FILES.get(suffix.lower())


def _files_of(given: Any) -> list[str]:
    """Existing files of a path, a pattern, several with commas, or a list of these."""
    names = given if isinstance(given, (list, tuple)) else [given]
    names = [part.strip() for name in names for part in ([name] if os.path.exists(name) else name.split(","))]
    files: list[str] = []
    for name in names:
        path = os.path.expanduser(name)
        found = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            raise ValueError(
                f"dataset_name must name files that exist, got {name!r}, which does not (in {os.getcwd()})."
                f"{near_file(path)}"
            )
        files += found
    return files


def _from_files(files: list[str] | dict[str, list[str]], streaming: bool) -> Any:
    listed = files if isinstance(files, list) else [path for part in files.values() for path in part]
    types = {_type_of(path) for path in listed}
    if None in types or len(types) > 1:
        odd = next((path for path in listed if _type_of(path) is None), listed[-1])
        raise ValueError(
            f"dataset_name must name files of one type, {', '.join(FILES)}, got {odd!r}"
            f"{f' among {len(listed)}' if len(listed) > 1 else ''}. It cannot be read. Convert it, for example to "
            'JSON lines: {"prompt": "..."} in each.'
        )
    kind = str(types.pop())
    more = {"sep": "\t"} if listed[0].endswith(".tsv") else {}
    return _guard(lambda: load_dataset(kind, data_files=files, streaming=streaming, **more), listed)


def _from_folder(path: str, streaming: bool) -> Any:
    names = os.listdir(path)
    if "dataset_dict.json" in names or "state.json" in names:
        dataset = _guard(lambda: load_from_disk(path), [path])
        return dataset if isinstance(dataset, DatasetDict) else DatasetDict({"train": dataset})
    inside = [os.path.join(root, f) for root, _, files in os.walk(path) for f in files]
    if not any(_type_of(file) for file in inside):
        raise ValueError(
            f"dataset_name must be a folder with data files ({', '.join(FILES)}) or one of save_to_disk, got "
            f"{path!r}, which holds {', '.join(sorted(names)[:5]) or 'nothing'}."
        )
    return _guard(lambda: load_dataset(path, streaming=streaming), [path])


def _guard(load: Any, names: list[str]) -> Any:
    """What `load()` returns; its failures in words that name the file and the line."""
    try:
        return load()
    except DatasetNotFoundError as error:
        near = _near(names)
        raise ValueError(
            f"dataset_name must be a file, a folder or a dataset of the hub, got {names[0]!r}. No such file is in "
            f"{os.getcwd()}, and the hub has no such dataset, or not for you.{near}"
        ) from error
    except DatasetGenerationError as error:
        raise ValueError(f"{_bad_line(names) or f'{names[0]} cannot be read: {error.__cause__ or error}'}") from error
    except (OSError, ValueError) as error:
        near = _near(names)
        raise ValueError(f"dataset {names[0]!r} cannot be loaded: {error}{near}") from error


def _near(names: list[str]) -> str:
    """The nearest file to one that may have been meant; `owner/name` is the hub's."""
    return near_file(names[0]) if len(names) == 1 and ("/" not in names[0] or _looks_local(names[0])) else ""


def _bad_line(files: list[str]) -> str | None:
    """The first line of JSON lines that is none."""
    for path in files:
        if not path.endswith(".jsonl") or not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except json.JSONDecodeError as error:
                    return (
                        f"{path} must hold a JSON object in each line, got in line {number}: {line.strip()[:60]!r} "
                        f"({error.msg} at character {error.pos + 1})."
                    )
                if not isinstance(row, dict):
                    return f"{path} must hold a JSON object in each line, got in line {number}: {line.strip()[:60]!r}."
    return None


def _take(splits: Mapping[str, Any], name: str, what: str) -> Any:
    plain = name.partition("[")[0]
    if plain not in splits:
        raise ValueError(
            f"{what} must be one of {sorted(splits)}, the splits of this dataset, got {name!r}."
            f"{near_name(plain, splits)}"
        )
    part = splits[plain]
    if plain == name:
        return part
    if not re.fullmatch(r"[^\[]+\[-?\d*%?:-?\d*%?\]", name) or not isinstance(part, Dataset):
        raise ValueError(f"{what} must be a split, or one with a slice such as 'train[:1000]', got {name!r}.")
    (bounds,) = ReadInstruction.from_spec(name).to_absolute({plain: len(part)})
    return part.select(range(bounds.from_, bounds.to))


def _split(dataset: Any, size: float, seed: int) -> DatasetDict:
    if not isinstance(dataset, Dataset):
        raise ValueError("test_split_size must be unset for a streamed dataset. It has no rows to choose from.")
    return dataset.train_test_split(test_size=size if size < 1 else int(size), seed=seed)


def _rename(dataset: Any, column: str) -> Any:
    columns = dataset.column_names
    if columns is None or column == "prompt":
        return dataset
    if column not in columns:
        raise ValueError(f"prompt_column must be one of {columns}, got {column!r}.{near_name(column, columns)}")
    return (dataset.remove_columns("prompt") if "prompt" in columns else dataset).rename_column(column, "prompt")


def _check_prompts(dataset: Any, name: str) -> None:
    columns = dataset.column_names
    if columns is not None and "prompt" not in columns:
        likely = next((c for like in _LIKE_PROMPT for c in columns if c.lower() == like), None)
        likely = likely or next((c for c in columns if "prompt" in c.lower() or "question" in c.lower()), None)
        do = f"Set prompt_column: {likely}." if likely else "Set prompt_column to the column that holds them."
        if likely in ("messages", "conversations"):
            do += " It must end before the answer that the student is to write."
        raise ValueError(
            f"The split {name!r} must have a column 'prompt', got {columns}. The student completes prompts, as text "
            f"or as a list of messages. {do}"
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The split {name!r} must have rows, got none. There are no prompts to complete.")
