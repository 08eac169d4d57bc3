"""Categories of samples: a column's distinct values are the classes, their place in sorted order is the label."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.errors import RequestError
from training.data.select import require_column

NO_LABEL = -1
_CLASS_TYPES = re.compile(r"(large_)?string(_view)?|u?int\d+|bool|dictionary<.*string.*>")
_WHOLE_NUMBER = re.compile(r"-?\d+")


def require_labels(column: str, columns: Mapping[str, str], where: str) -> None:
    """Raise RequestError, naming the configuration key `where`, unless the column is there and can name classes."""
    require_column(column, columns, where)
    if not _CLASS_TYPES.fullmatch(columns[column]):
        raise RequestError(f"{where}: column {column} holds {columns[column]}; classes are text or whole numbers")


def class_names(values: Iterable[object]) -> tuple[str, ...]:
    """The classes of a column's values, sorted, numbers by size; null and empty text are no class."""
    names = {str(value) for value in values if value is not None and value != ""}
    return tuple(sorted(names, key=_sort_key))


def label_ids(column: pa.Array, classes: Sequence[str]) -> NDArray[np.int64]:
    """The place of each value among the classes, NO_LABEL where it is none of them."""
    names = column.cast(pa.string()) if not pa.types.is_boolean(column.type) else _spelled(column)
    places = pc.index_in(names, value_set=pa.array(classes, pa.string()))
    return np.asarray(pc.fill_null(places, NO_LABEL).to_numpy(zero_copy_only=False), dtype=np.int64)


def _spelled(column: pa.Array) -> pa.Array:
    return pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())


def _sort_key(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if _WHOLE_NUMBER.fullmatch(name) else (1, 0, name)
