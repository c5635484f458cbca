# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What identifies cached scores, and how one sample's scores become a row.

A row's key is a hash of the teacher's prompt ids, the completion ids and the identity of the scores (teacher,
vocabulary, temperature, support), so that an answer is never given to another question.

Shapes: T completion tokens, K support.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

FORMAT = 1
KEY_BYTES = 16
LOGPROB_DTYPES = ("float32", "float16")
COMPRESSIONS = ("none", "zstd")
CACHED_SUPPORTS = ("teacher_top_k", "sampled")
_PADDING_16 = 65535  # stands for -1 in 16-bit ids


def digest(data: bytes) -> str:
    """Checksum of a file, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=KEY_BYTES).hexdigest()


def _pack(ids: Sequence[int] | np.ndarray) -> bytes:
    packed = np.asarray(ids, dtype="<i4")
    return len(packed).to_bytes(8, "little") + packed.tobytes()


def prompt_hash(prompt_ids: Sequence[int] | np.ndarray) -> bytes:
    """Names a prompt of the student."""
    return hashlib.blake2b(_pack(prompt_ids), digest_size=KEY_BYTES).digest()


@dataclass(frozen=True)
class CacheMeta:
    """
    What all rows of a cache have in common.

    Args:
        teacher (`str`): How the teacher is called.
        weights (`str`, *optional*): Fingerprint of its weights; where it is known the name does not matter.
        vocab_size (`int`, *optional*): Ids that it knows.
        vocabulary (`str`, *optional*): Fingerprint of its tokenizer.
        temperature (`float`): Of the log-probs.
        support (`str`): `"teacher_top_k"` or `"sampled"`.
        support_size (`int`): K that was asked for; 0 with `"sampled"`.
        logprob_dtype (`str`): Of the top-k log-probs: `"float32"` or `"float16"`.
        compression (`str`): `"none"` (read straight from the memory map) or `"zstd"`.
        format (`int`): Version of the files.
    """

    teacher: str
    weights: str | None = None
    vocab_size: int | None = None
    vocabulary: str | None = None
    temperature: float = 1.0
    support: str = "teacher_top_k"
    support_size: int = 64
    logprob_dtype: str = "float32"
    compression: str = "none"
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name, valid in (
            ("support", CACHED_SUPPORTS),
            ("logprob_dtype", LOGPROB_DTYPES),
            ("compression", COMPRESSIONS),
        ):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"{name} must be one of {list(valid)} in a cache of scores, got {value!r}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}. It divides the logits.")
        if self.support == "teacher_top_k" and self.support_size < 1:
            raise ValueError(
                f"support_size must be at least 1, got {self.support_size!r}. It is the number of log-probs a token."
            )
        if self.support == "sampled" and self.support_size != 0:
            object.__setattr__(self, "support_size", 0)

    @cached_property
    def identity(self) -> bytes:
        """Hash of all that the scores depend on."""
        who = {"weights": self.weights} if self.weights else {"teacher": self.teacher}
        names = ("vocab_size", "vocabulary", "temperature", "support", "support_size", "format")
        described = {**who, **{name: getattr(self, name) for name in names}}
        return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=KEY_BYTES).digest()

    def key(self, prompt_ids: Sequence[int] | np.ndarray, completion_ids: Sequence[int] | np.ndarray) -> bytes:
        """Names the scores of a completion after a prompt (the one that the teacher reads)."""
        data = self.identity + _pack(prompt_ids) + _pack(completion_ids)
        return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()

    @property
    def id_type(self) -> pa.DataType:
        """The smallest type that holds all ids and padding."""
        return pa.uint16() if self.vocab_size is not None and self.vocab_size <= _PADDING_16 else pa.int32()

    def difference(self, other: "CacheMeta") -> list[str]:
        """The fields in which a cache of `other` could not take rows of this one."""
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        return [name for name in names if name != "teacher" or not self.weights or self.weights != other.weights]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "CacheMeta":
        values: Mapping[str, Any] = json.loads(text)
        if values["format"] != FORMAT:
            raise ValueError(
                f"meta.json must be of format {FORMAT}, got {values['format']}. Another release of trl-opd wrote the "
                "cache. Use that release, or score again."
            )
        return cls(**values)


@dataclass
class Question:
    """
    A sample to score.

    Args:
        prompt_ids (`Sequence[int]`): The student's prompt.
        completion_ids (`Sequence[int]`): The tokens to score.
        teacher_prompt_ids (`Sequence[int]`, *optional*): The teacher's prompt where it differs.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    teacher_prompt_ids: Sequence[int] | None = None

    @property
    def asked_prompt(self) -> Sequence[int]:
        """What the teacher reads before the completion."""
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids

    def __len__(self) -> int:
        return len(self.asked_prompt) + len(self.completion_ids)


@dataclass
class Answer:
    """Scores of one sample: top-k ids and log-probs `(T, K)`, sampled-token log-probs `(T,)`."""

    topk_ids: np.ndarray | None = None
    topk_logprobs: np.ndarray | None = None
    sampled_logprobs: np.ndarray | None = None


def _ids(ids: Any, meta: CacheMeta) -> pa.Array:
    """Ids as Arrow; those below 0 are padding."""
    values = np.asarray(ids, dtype=np.int64).reshape(-1)
    if meta.id_type == pa.uint16():
        if values.size and int(values.max()) >= _PADDING_16:
            raise ValueError(
                f"ids must be below the vocabulary's size of {meta.vocab_size}, got {int(values.max())}. The sample "
                "was made with another tokenizer."
            )
        values = np.where(values < 0, _PADDING_16, values)
    return pa.array(values.astype(meta.id_type.to_pandas_dtype()), type=meta.id_type)


def _read_ids(values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.int64)
    return np.where(wide == _PADDING_16, -1, wide) if values.dtype == np.uint16 else wide


def _log_mass(ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """Logarithm of the probability in each row `(T, K)`, in float64."""
    real = np.where(ids < 0, -np.inf, logprobs.astype(np.float64))
    top = real.max(-1, keepdims=True, initial=-1e30)
    return (top + np.log(np.exp(real - top).sum(-1, keepdims=True)))[:, 0]


def schema_of(meta: CacheMeta) -> pa.Schema:
    """
    Columns of a row. Half-precision top-k log-probs come with the exact logarithm of their total probability: what
    rounding does to their sum would otherwise be all of a small tail.
    """
    ids, single = pa.list_(meta.id_type), pa.list_(pa.float32())
    columns = [("key", pa.binary(KEY_BYTES)), ("prompt_ids", ids), ("teacher_prompt_ids", ids)]
    columns += [("completion_ids", ids), ("sampled_logprobs", single)]
    if meta.support == "teacher_top_k":
        half = meta.logprob_dtype == "float16"
        columns += [("topk_ids", ids), ("topk_logprobs", pa.list_(pa.float16()) if half else single)]
        columns += [("topk_log_mass", single)] if half else []
    return pa.schema([pa.field(name, kind) for name, kind in columns])


def encode_row(meta: CacheMeta, schema: pa.Schema, key: bytes, question: Question, answer: Answer) -> pa.RecordBatch:
    """One sample as a record batch of one row."""
    columns: dict[str, pa.Array | None] = {
        "prompt_ids": _ids(question.prompt_ids, meta),
        "completion_ids": _ids(question.completion_ids, meta),
    }
    if question.teacher_prompt_ids is not None:
        columns["teacher_prompt_ids"] = _ids(question.teacher_prompt_ids, meta)
    if answer.sampled_logprobs is not None:
        columns["sampled_logprobs"] = pa.array(answer.sampled_logprobs.astype(np.float32))
    if meta.support == "teacher_top_k":
        assert answer.topk_ids is not None and answer.topk_logprobs is not None
        ids, logprobs = answer.topk_ids, answer.topk_logprobs
        columns["topk_ids"] = _ids(ids, meta)
        # float16 ends at -65504; no probability differs below
        stored = np.where(ids < 0, 0, np.maximum(logprobs, -60000.0)).astype(meta.logprob_dtype)
        columns["topk_logprobs"] = pa.array(stored.reshape(-1))
        columns["topk_log_mass"] = pa.array(_log_mass(ids, logprobs).astype(np.float32))
    arrays = [pa.array([key], type=pa.binary(KEY_BYTES))]
    arrays += [_one_list(columns.get(field.name), field.type) for field in list(schema)[1:]]
    return pa.record_batch(arrays, schema=schema)


def _one_list(values: pa.Array | None, kind: pa.DataType) -> pa.Array:
    if values is None:
        return pa.array([None], type=kind)
    return pa.ListArray.from_arrays(pa.array([0, len(values)], type=pa.int32()), values, type=kind)


@dataclass
class Row:
    """A sample of the cache, decoded."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    teacher_prompt_ids: np.ndarray | None
    answer: Answer

    @classmethod
    def decode(cls, batch: pa.RecordBatch) -> "Row":
        """The row of a record batch that [`encode_row`] made."""
        columns: dict[str, np.ndarray | None] = {}
        for name in batch.schema.names[1:]:
            column = batch.column(name)
            columns[name] = None if column.null_count else column.values.to_numpy(zero_copy_only=True)
        ids = {
            name: None if (x := columns[name]) is None else _read_ids(x) for name in columns if name.endswith("ids")
        }
        answer = Answer(sampled_logprobs=columns["sampled_logprobs"])
        prompt, completion = ids["prompt_ids"], ids["completion_ids"]
        assert prompt is not None and completion is not None
        if "topk_ids" in ids:
            topk, logprobs = ids["topk_ids"], columns["topk_logprobs"]
            assert topk is not None and logprobs is not None
            shape = (len(completion), len(topk) // max(1, len(completion)))
            answer.topk_ids, answer.topk_logprobs = topk.reshape(shape), logprobs.reshape(shape)
            mass = columns.get("topk_log_mass")
            if mass is not None:
                shift = mass - _log_mass(answer.topk_ids, answer.topk_logprobs)
                answer.topk_logprobs = np.minimum(answer.topk_logprobs + shift[:, None], 0.0).astype(np.float32)
        return cls(prompt, completion, ids["teacher_prompt_ids"], answer)
