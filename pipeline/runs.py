"""Sorted runs of planned rows, as `plan-read` leaves them, read by ranges of the order."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.store import Store


def read_range(
    store: Store, path: str, first: int, last: int, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """A source's rows whose order lies in [first, last], at least one table; `columns` have order among them."""
    with store.open(path) as raw, pq.ParquetFile(raw) as file:
        schema = file.schema_arrow
        place = schema.get_field_index("order")
        yield schema.empty_table().select(columns or schema.names)
        for group in range(file.num_row_groups):
            seen = file.metadata.row_group(group).column(place).statistics
            if seen.min <= last and seen.max >= first:
                table = file.read_row_group(group, columns=columns).select(columns or schema.names)
                order = table["order"].to_numpy()
                yield table.filter(pa.array((order >= np.uint64(first)) & (order <= np.uint64(last))))
