"""Planned rows with the verdicts of the rules that need no image."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.rules.base import Rule
from pipeline.rules.decisions import Judged, judge

_VERDICT = ("reason", "rule", "score", "threshold", "detail")


def screen(table: pa.Table, rules: Sequence[Rule], spared: NDArray[np.bool_] | None = None) -> tuple[pa.Table, Judged]:
    """(the rows of a fetch unit, those that a rule drops with reason, rule, score, threshold and detail; the verdicts).

    Rows that have a reason already keep it and are not judged. spared: [N] rows that no rule about captions drops.
    """
    open_rows = np.flatnonzero(table.column("reason").is_null().to_numpy())
    rows = table.take(pa.array(open_rows, pa.int64()))
    judged = judge(rows, open_rows, rules, None if spared is None else spared[open_rows])
    is_dropped = judged.blamed >= 0
    if not is_dropped.any():
        return table, judged
    first = judged.decisions.take(pa.array(judged.blamed[is_dropped] * len(open_rows) + np.flatnonzero(is_dropped)))
    places = np.full(table.num_rows, -1)
    places[open_rows[is_dropped]] = np.arange(first.num_rows)
    for name in _VERDICT:
        values = first.column(name).combine_chunks().cast(table.schema.field(name).type)
        old = table.column(name).combine_chunks()
        chosen = pa.concat_arrays([old, values])
        take = np.where(places < 0, np.arange(table.num_rows), table.num_rows + places)
        table = table.set_column(table.schema.get_field_index(name), name, chosen.take(pa.array(take, pa.int64())))
    return table, judged
