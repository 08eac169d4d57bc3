"""Row conditions such as `style!=fluent-emoji` or `group=animals|plants`, on the columns of a dataset's shards."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.errors import RequestError

_FORM = re.compile(r"\s*([^=!<>|]*[^=!<>|\s])\s*(!=|>=|<=|==|=|<|>)(.*)", re.DOTALL)
_ORDERINGS = {"<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One parsed condition: a row passes when its value is among `values` (=), is not (!=), or compares so."""

    text: str
    """With the configuration key that it was given under."""
    column: str
    operator: str
    values: tuple[str, ...]


def parse_conditions(texts: Sequence[str], columns: Mapping[str, str], where: str) -> list[Condition]:
    r"""Parse conditions on a dataset whose columns and Arrow types are `columns`.

    `=` and `!=` take several values separated by `|` (a `|` that belongs to a value is written `\|`); all conditions
    must hold; an absent value (null) passes only `!=`. Raises RequestError naming `where` (a configuration key) for a
    wrong form or an unknown column.
    """
    conditions = []
    for text in texts:
        match = _FORM.fullmatch(text)
        if match is None:
            raise RequestError(f"{where}={text}: not a condition; write COLUMN=VALUE, COLUMN!=A|B, COLUMN>=NUMBER")
        column, operator, rest = match[1], "=" if match[2] == "==" else match[2], match[3].strip()
        require_column(column, columns, f"{where}={text}")
        values = tuple(_split(rest)) if operator in ("=", "!=") else (rest,)
        conditions.append(Condition(text=f"{where}={text}", column=column, operator=operator, values=values))
    return conditions


def require_column(column: str, columns: Mapping[str, str], where: str) -> None:
    """Raise RequestError with the nearest column names unless the dataset has the column."""
    if column not in columns:
        close = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(columns))}"
        raise RequestError(f"{where}: the dataset has no column {column}; {hint}")


def matching_rows(table: pa.Table, conditions: Sequence[Condition]) -> NDArray[np.int64]:
    """The indices of the rows of a table that pass every condition. Raises RequestError for a value of a wrong type."""
    mask = np.ones(table.num_rows, dtype=bool)
    for condition in conditions:
        mask &= _mask(table.column(condition.column), condition)
    return np.flatnonzero(mask)


def _split(text: str) -> list[str]:
    r"""The values of `A|B`, with `\|` for a bar inside one."""
    return [value.replace("\\|", "|").strip() for value in re.split(r"(?<!\\)\|", text)]


def _mask(column: pa.ChunkedArray, condition: Condition) -> NDArray[np.bool_]:
    try:
        values = pa.array(condition.values, pa.string()).cast(column.type)
        if condition.operator in ("=", "!="):
            found: NDArray[np.bool_] = pc.is_in(column, value_set=values).to_numpy().astype(bool)
            return found if condition.operator == "=" else ~found
        compared = _ORDERINGS[condition.operator](column, values[0])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        written = " | ".join(condition.values)
        raise RequestError(
            f"{condition.text}: column {condition.column} holds {column.type}, not comparable with {written!r}"
        ) from None
    return np.asarray(pc.fill_null(compared, False).to_numpy()).astype(bool)
