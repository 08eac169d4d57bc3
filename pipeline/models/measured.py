"""The file in which a stage writes what it has measured of a fetch unit's rows: see `pipeline.rules.measured`.

row        int32     number of a row whose status is ok, ascending
score      float32   not a number if it could not be measured
detail     string    what the score is about, for people; null if there is nothing to say
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

SCORES_FILE = "scores.parquet"
SCORES = pa.schema([("row", pa.int32()), ("score", pa.float32()), ("detail", pa.string())])


def write_scores(
    path: Path, rows: NDArray[Any], scores: NDArray[Any], details: Sequence[str | None] | None = None
) -> None:
    """One unit's file."""
    texts = [None] * len(rows) if details is None else details
    columns = [pa.array(rows, pa.int32()), pa.array(scores, pa.float32()), pa.array(texts, pa.string())]
    pq.write_table(pa.table(columns, schema=SCORES), path, compression="zstd")
