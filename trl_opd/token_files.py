# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Files of the completions log with the columns of the token view."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from trl.trainer.utils import strip_images_from_messages

if TYPE_CHECKING:
    from .token_view import TokenRow

VALUES = (
    "token_gap",
    "token_student_logprob",
    "token_teacher_logprob",
    "token_reverse_kl",
    "token_teacher_rank",
    "token_weight",
)
Texts = Callable[[Sequence[int]], list[str]]


def choose(rows: Sequence["TokenRow"], number: int) -> list["TokenRow"]:
    """
    Rows to show, spread evenly over the mean gap: the first is the one that the teacher likes least, the last the one
    that it likes best. Those of which no gap is known come last.
    """
    ordered = sorted(rows, key=lambda row: (math.isnan(row.mean_gap), row.mean_gap, row.place))
    known = [row for row in ordered if not math.isnan(row.mean_gap)]
    ordered = known if len(known) >= number else ordered
    if len(ordered) <= number:
        return ordered
    last = len(ordered) - 1
    return [ordered[round(i * last / max(number - 1, 1))] for i in range(number)]


def make_table(step: int, rows: Sequence["TokenRow"], texts: Texts) -> pa.Table:
    """Rows as GRPOTrainer's completions log has them, with the columns of the token view."""
    columns = {name: [_without_images(row.logged[name]) for row in rows] for name in rows[0].logged}
    return extend(pa.table({"step": [step] * len(rows), **columns}), rows, texts)


def _without_images(value: Any) -> Any:
    return strip_images_from_messages(value) if isinstance(value, list) else value


def read_and_extend(path: Path, rows: Sequence["TokenRow | None"], texts: Texts) -> pa.Table:
    """GRPOTrainer's file with the columns of the token view, `None` in those whose tokens were not seen."""
    return extend(pq.read_table(path), rows, texts)


def extend(table: pa.Table, rows: Sequence["TokenRow | None"], texts: Texts) -> pa.Table:
    """
    Add the columns of the token view.

    Args:
        table (`pa.Table`): One row a completion.
        rows (`Sequence[TokenRow | None]`): What is known of each.
        texts (`Callable`): Texts of the tokens of a completion.
    """
    if len(rows) != len(table):
        raise ValueError(f"{len(table)} completions were logged, and the tokens of {len(rows)} are to stand beside.")
    columns: dict[str, tuple[pa.DataType, list[Any]]] = {
        "token_ids": (pa.int64(), [row and row.token_ids for row in rows]),
        "tokens": (pa.string(), [row and texts(row.token_ids) for row in rows]),
        **{name: (pa.float32(), [row and row.values[name] for row in rows]) for name in VALUES},
        "token_mask": (pa.bool_(), [row and row.mask for row in rows]),
    }
    for name, (kind, values) in columns.items():
        table = table.append_column(name, pa.array(values, type=pa.list_(kind)))
    return table


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file so that a reader sees the old one or the new one."""
    other = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, other, compression="zstd")
        os.replace(other, path)
    except BaseException:
        other.unlink(missing_ok=True)
        raise
