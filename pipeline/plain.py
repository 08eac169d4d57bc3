"""Arrow values as JSON has them."""

import math
from typing import Any

import pyarrow as pa


def plain_values(column: pa.ChunkedArray) -> list[Any]:
    """A column as Python values. A date or time beyond those of Python is the text of
    its number, in the column's unit since 1970.
    """
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):
        values = [_value(scalar) for scalar in column]
    return values


def json_form(value: Any) -> Any:
    """A Python value in the forms that JSON has, at any depth.

    NaN and infinity become null, bytes hex, dates and times ISO 8601, decimals and all else their text.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [json_form(item) for item in value]
    if isinstance(value, dict):
        return {str(name): json_form(item) for name, item in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        if isinstance(scalar, pa.StructScalar):
            return {name: _value(item) for name, item in scalar.items()}
        if pa.types.is_map(scalar.type):
            return [tuple(_value(item) for item in pair.values()) for pair in scalar.values]
        return [_value(item) for item in scalar.values] if pa.types.is_nested(scalar.type) else str(scalar.value)
