"""Rows of any list file as record batches of one schema."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import RunError
from pipeline.readers import text
from pipeline.readers.schema import UNREADABLE, ListSchema, is_double, is_int64, plain_type
from pipeline.readers.sources import Source, open_source
from pipeline.reasons import Reason

BATCH_ROWS = 16_384
Rows = tuple[dict[str, pa.Array], int, list[str]]
"""Columns by their names in the list, the number of rows, and the beginnings of what could not be read."""


def read_rows(path: Path, source: Source, schema: ListSchema, batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """Every row of a file: url, caption, reason, detail (strings), then the extra columns under their output names.

    url: as in the list, null if there is none. caption: "" if there is none. reason: null, or `unreadable_row` with
    url null and the row's beginning as caption.
    path: local copy of the source. Raises RunError when the file breaks off (its rows cannot be counted then), and
    when a key or a value does not go with the columns found in the lists' heads: nothing is dropped in silence.
    """
    try:
        for columns, num_rows, unreadable in _read(path, source, schema, batch_rows):
            yield _batch(columns, num_rows, unreadable, schema)
    except text.UnforeseenError as error:
        raise RunError(_what_to_do(error, source, schema)) from None
    except UNREADABLE as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"{source.name}: breaks off or is damaged ({said}); replace the file and run the same command again"
        ) from error


def _what_to_do(error: text.UnforeseenError, source: Source, schema: ListSchema) -> str:
    others = ", ".join(name for name in schema.extras if name != error.name)
    leave_out = f"leave it out with columns.keep=[{others}]"
    if source.format not in ("json", "jsonl"):
        return (
            f"{source.name}: column {error.name}: {error}; give the column one type in all files, or {leave_out}, "
            "and build into another output"
        )
    return (
        f"{source.name}: row {error.row}: key {error.name}: {error}; keys and types are taken from the first "
        f"read.infer_rows={schema.infer_rows} rows of each file: set read.infer_rows to at least {error.row}, or "
        f"{leave_out}, and build into another output"
    )


def _read(path: Path, source: Source, schema: ListSchema, batch_rows: int) -> Iterator[Rows]:
    if source.size_bytes == 0:
        return
    if source.format == "parquet":
        yield from _read_parquet(path, schema, batch_rows)
        return
    with open_source(source, path) as file:
        for piece in _text_pieces(file, source.format, schema, batch_rows):
            arrays = {
                name: _typed(name, values, _type_of(name, schema), piece.numbers)
                for name, values in piece.columns.items()
            }
            yield arrays, piece.num_rows, piece.unreadable


def _text_pieces(file: Any, format: str, schema: ListSchema, batch_rows: int) -> Iterator[text.Piece]:
    names = [schema.url, schema.caption, *schema.extras]
    if format == "txt":
        return text.read_lines(file, schema.url, batch_rows)
    if format in ("csv", "tsv"):
        return text.read_csv(file, "\t" if format == "tsv" else ",", names, batch_rows)
    return text.read_json(file, names, batch_rows, takes_all=schema.takes_all)


def _read_parquet(path: Path, schema: ListSchema, batch_rows: int) -> Iterator[Rows]:
    with pq.ParquetFile(path) as file:
        names = [name for name in (schema.url, schema.caption, *schema.extras) if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_rows, columns=names):
            columns = {name: decoded_column(batch.column(name)) for name in names}
            bad = np.zeros(batch.num_rows, bool)
            for name in {schema.url, schema.caption} & columns.keys():
                columns[name], broken = _as_text(columns[name])
                bad |= broken
            columns = {name: _cast(name, column, _type_of(name, schema)) for name, column in columns.items()}
            texts = columns.get(schema.caption, pa.nulls(batch.num_rows, pa.string()))
            captions = texts.filter(pa.array(bad)).fill_null("").to_pylist() if bad.any() else []
            good = {name: column.filter(pa.array(~bad)) if bad.any() else column for name, column in columns.items()}
            yield good, batch.num_rows - len(captions), captions


def _batch(columns: dict[str, pa.Array], num_rows: int, unreadable: list[str], schema: ListSchema) -> pa.RecordBatch:
    """Rows, then the unreadable ones."""
    none = len(unreadable)
    captions = columns.get(schema.caption, pa.nulls(num_rows, pa.string())).fill_null("")
    reasons = [pa.nulls(num_rows, pa.string()), pa.array([Reason.UNREADABLE_ROW.value] * none, pa.string())]
    arrays = [
        _extended(columns.get(schema.url), num_rows, none, pa.string()),
        pa.concat_arrays([captions, pa.array(unreadable, pa.string())]),
        pa.concat_arrays(reasons),
        pa.nulls(num_rows + none, pa.string()),
    ]
    extras = {output: columns[name] for name, output in schema.extras.items() if name in columns}
    arrays += further_columns(extras, num_rows + none, schema)
    return pa.RecordBatch.from_arrays(arrays, names=["url", "caption", "reason", "detail", *_names(schema)])


def further_columns(extras: Mapping[str, pa.Array], num_rows: int, schema: ListSchema) -> list[pa.Array]:
    """The further columns of all lists, in order: what this one has, its constants, and else nulls.

    extras: by their names in the outputs; where one is shorter, nulls follow.
    """
    arrays = []
    for field in schema.fields():
        if field.name in schema.constants:
            arrays.append(pa.array([schema.constants[field.name]] * num_rows, pa.string()))
        else:
            column = extras.get(field.name)
            length = 0 if column is None else len(column)
            arrays.append(_extended(column, length, num_rows - length, field.type))
    return arrays


def _names(schema: ListSchema) -> list[str]:
    return [field.name for field in schema.fields()]


def _extended(column: pa.Array | None, num_rows: int, num_nulls: int, kind: pa.DataType) -> pa.Array:
    """A column with nulls after it; all nulls if the file has no such column."""
    if column is None:
        return pa.nulls(num_rows + num_nulls, kind)
    return pa.concat_arrays([column, pa.nulls(num_nulls, kind)]) if num_nulls else column


def _type_of(name: str, schema: ListSchema) -> pa.DataType:
    return pa.string() if name in (schema.url, schema.caption) else schema.types[name]


def decoded_column(column: pa.Array) -> pa.Array:
    """A parquet column without dictionaries, in the type in which it is written."""
    while pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(plain_type(column.type)) if column.type != plain_type(column.type) else column


def utf8_column(column: pa.Array) -> pa.Array:
    """A column; where it is text, bytes that are not UTF-8 are replaced."""
    return _as_text(column)[0] if pa.types.is_string(column.type) else column


def _as_text(column: pa.Array) -> tuple[pa.Array, Any]:
    """A column as strings, and which values are not UTF-8 (there, bad bytes are replaced)."""
    good = np.zeros(len(column), bool)
    try:
        strings = column.cast(pa.string())
        strings.validate(full=True)
        return strings, good
    except pa.ArrowException:
        raw = column.cast(pa.binary()).to_pylist()
    values = [None if value is None else value.decode("utf-8", "replace") for value in raw]
    bad = [value is not None and not _is_utf8(value) for value in raw]
    return pa.array(values, pa.string()), np.array(bad, bool)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _cast(name: str, column: pa.Array, kind: pa.DataType) -> pa.Array:
    """A parquet column in its unified type; text that is not UTF-8 is repaired."""
    if pa.types.is_string(kind):
        return _as_text(column)[0]
    try:
        return column if column.type == kind else pc.cast(column, kind)
    except pa.ArrowInvalid as error:
        raise text.UnforeseenError(0, name, " ".join(str(error).split())) from None


def _typed(name: str, values: list[Any], kind: pa.DataType, numbers: list[int]) -> pa.Array:
    """Python values in a column's type. UnforeseenError for the first that does not fit."""
    if pa.types.is_string(kind):
        return pa.array([_to_text(value) for value in values], kind)
    if fits := _FITS.get(kind):
        for index, value in enumerate(values):
            if value is not None and not fits(value):
                raise _misfit(name, value, kind, numbers[index])
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError, TypeError):
        index = next(index for index, value in enumerate(values) if not _converts(value, kind))
        raise _misfit(name, values[index], kind, numbers[index]) from None


def _misfit(name: str, value: Any, kind: pa.DataType, row: int) -> text.UnforeseenError:
    return text.UnforeseenError(row, name, f"{_to_text(value)!s:.60} does not fit {kind}")


def _converts(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowException, OverflowError, TypeError):
        return False
    return True


def _to_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace").decode()


_FITS: dict[pa.DataType, Callable[[Any], bool]] = {
    pa.int64(): is_int64,
    pa.float64(): is_double,
    pa.bool_(): lambda value: isinstance(value, bool),
}
"""Stricter than Arrow, which takes true for 1."""
