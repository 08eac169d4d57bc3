"""Rules applied to rows: every rule judges every row, and the first that drops a row is blamed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.journal import UnitOutput
from pipeline.rules.base import Rule, limit_of
from pipeline.rules.captions import CAPTION_PAIRS

_NAME = pa.dictionary(pa.int32(), pa.string())
DECISIONS = pa.schema(
    [
        ("row", pa.int32()),
        ("uid", _NAME),
        ("rule", _NAME),
        ("score", pa.float64()),
        ("keeps", _NAME),
        ("threshold", pa.float64()),
        ("keep", pa.bool_()),
        ("reason", _NAME),
        ("detail", _NAME),
    ]
)
"""A verdict of one rule on one row.

row: its number in its fetch unit. score: null for a rule without a number, NaN if it could not be measured.
keeps: at_least, at_most, above or below the threshold is kept. reason: null where the row is kept.
"""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """All verdicts of R rules on N rows.

    blamed: [N] the first rule that drops each row, -1 where none does. fails: [R, N] who drops what.
    """

    rules: tuple[Rule, ...]
    decisions: pa.Table
    blamed: NDArray[np.int64]
    fails: NDArray[np.bool_]

    def count(self, output: UnitOutput) -> None:
        """Into the unit's marker: for every rule that drops something, how many pairs.

        drops:<rule> of all, first:<rule> of those that no rule before it drops, alone:<rule> of those that no other
        rule of this stage drops, both:<rule>+<rule> of those that these two drop.
        """
        num_failed = self.fails.sum(axis=0)
        names = [rule.name for rule in self.rules]
        for index, (name, fails) in enumerate(zip(names, self.fails, strict=True)):
            _count(output, f"drops:{name}", fails)
            _count(output, f"first:{name}", self.blamed == index)
            _count(output, f"alone:{name}", fails & (num_failed == 1))
        for one, other in combinations(range(len(names)), 2):
            _count(output, f"both:{names[one]}+{names[other]}", self.fails[one] & self.fails[other])


def _count(output: UnitOutput, name: str, rows: NDArray[np.bool_]) -> None:
    if number := int(rows.sum()):
        output.count(name, number)


def judge(
    rows: pa.Table,
    row_numbers: NDArray[np.int64],
    rules: Sequence[Rule],
    spared: NDArray[np.bool_] | None = None,
) -> Judged:
    """Apply every rule to every row. `rows` has the columns that the rules read, and uid.

    row_numbers: [N] the rows' numbers in their unit. spared: [N] rows that no rule about captions
    drops. The decisions are in (rule, row) order.
    """
    count = len(row_numbers)
    verdicts = [rule.judge(rows) for rule in rules]
    fails = np.array([~verdict.keep for verdict in verdicts], bool).reshape(len(rules), count)
    if spared is not None:
        about_captions = [index for index, rule in enumerate(rules) if {"caption", CAPTION_PAIRS} & {*rule.columns}]
        fails[about_captions] &= ~spared
    blamed = np.where(fails.any(axis=0), fails.argmax(axis=0), -1) if len(rules) else np.full(count, -1)
    limits = [limit_of(rule) for rule in rules]
    of_rule = np.repeat(np.arange(len(rules)), count)
    scores = [pa.nulls(count, pa.float64()) if v.scores is None else pa.array(v.scores) for v in verdicts]
    details = [pa.nulls(count, pa.string()) if v.details is None else _texts(v.details) for v in verdicts]
    columns = [
        pa.array(np.tile(row_numbers, len(rules)), pa.int32()),
        _named(np.tile(np.arange(count), len(rules)), rows.column("uid").to_pylist()),
        _named(of_rule, [rule.name for rule in rules]),
        pa.concat_arrays([pa.array([], pa.float64()), *scores]),
        _named(of_rule, [keeps for keeps, _ in limits]),
        pa.array([limit for _, limit in limits], pa.float64()).take(pa.array(of_rule, pa.int64())),
        pa.array(~fails.ravel()),
        _named(of_rule, [str(rule.reason) for rule in rules], is_null=~fails.ravel()),
        pa.concat_arrays([pa.array([], pa.string()), *details]).dictionary_encode(),
    ]
    decisions = pa.table(columns, schema=DECISIONS)
    return Judged(rules=tuple(rules), decisions=decisions, blamed=blamed.astype(np.int64), fails=fails)


def _texts(values: Sequence[str | None]) -> pa.StringArray:
    return pa.array(values, pa.string())


def _named(
    indices: NDArray[np.int64], names: Sequence[str | None], is_null: NDArray[np.bool_] | None = None
) -> pa.DictionaryArray:
    """Names by their number, without a copy of each. Those that are None are null."""
    if None in names:
        is_null = np.array([name is None for name in names])[indices]
    texts = pa.array([name or "" for name in names], pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32(), mask=is_null), texts)
