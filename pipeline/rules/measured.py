"""Scores of models as columns of the rows, so that a rule about one is a rule like any other."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.workfile import WorkFile


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a stage has measured of every downloaded row: the column `column` of the rows that rules see.

    files: one of every fetch unit, in unit order; a parquet with the columns row (int32, the row's number in its unit),
    score (NaN or no row at all: could not be measured) and perhaps detail (string).
    """

    column: str
    files: tuple[WorkFile, ...]


def with_measured(rows: pa.Table, row_numbers: NDArray[np.int64], tables: Mapping[str, pa.Table]) -> pa.Table:
    """The rows with a float column for each table, and `<column>_detail` where it has details.

    row_numbers: [N] the rows' numbers in their unit, ascending.
    """
    for column, table in tables.items():
        places = np.searchsorted(row_numbers, table.column("row").to_numpy())
        is_ours = places < len(row_numbers)
        is_ours[is_ours] = row_numbers[places[is_ours]] == table.column("row").to_numpy()[is_ours]
        scores = np.full(len(row_numbers), np.nan)
        scores[places[is_ours]] = table.column("score").to_numpy()[is_ours]
        rows = rows.append_column(column, pa.array(scores))
        if "detail" in table.column_names:
            details = np.full(len(row_numbers), None, object)
            details[places[is_ours]] = table.column("detail").to_numpy()[is_ours]
            rows = rows.append_column(f"{column}_detail", pa.array(details, pa.string()))
    return rows
