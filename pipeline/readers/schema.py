"""The columns of a list: found in every file's head, unified, and checked against the configuration."""

import difflib
import lzma
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import RequestError
from pipeline.config import ColumnsConfig, ReadConfig
from pipeline.readers import text
from pipeline.readers.sources import Source, open_source

RESERVED = frozenset(
    (
        *(
            "key",
            "uid",
            "order",
            "url",
            "caption",
            "num_rows",
            "status",
            "reason",
            "rule",
            "score",
            "threshold",
        ),
        *("detail", "http_status", "final_url", "num_redirects", "size_bytes", "sha256", "source_format"),
        *("original_width", "original_height", "width", "height", "image_format", "is_animated", "grey_std"),
        *(
            "mean_red",
            "mean_green",
            "mean_blue",
            "image_offset",
            "image_size",
            "caption_offset",
            "caption_size",
        ),
        *("attempts", "seconds", "duplicate_of", "unit", "shard", "error_message", "exif", "generation"),
        *("received_bytes", "dns_seconds", "connect_seconds", "tls_seconds", "first_byte_seconds"),
        *("http_version", "server_address", "phash", "phash_mirror", "sharpness", "md5", "sha512"),
    )
)
"""Names that a list's further columns may not have in the outputs; such columns are called `source_<name>` there."""

UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    lzma.LZMAError,
    pa.ArrowException,
)


@dataclass(frozen=True, kw_only=True)
class ListSchema:
    """What a list's rows look like. extras: {name in the list: name in the outputs}, in output order.

    types: the Arrow type of each extra column by its name in the list. takes_all: the extras are all that there are.
    infer_rows: how many rows of each JSON file were looked at to find them.
    """

    url: str
    caption: str
    extras: dict[str, str]
    types: dict[str, pa.DataType]
    takes_all: bool
    infer_rows: int

    def fields(self) -> list[pa.Field]:
        """The extra columns as they are in the outputs."""
        return [pa.field(output, self.types[name]) for name, output in self.extras.items()]


def list_schema(sources: Sequence[Source], columns: ColumnsConfig, read: ReadConfig) -> ListSchema:
    """The columns of all files together. Reads only their heads.

    Raises RequestError, naming the file, when one cannot be read, has no URL or caption column, or has a column of a
    type that does not go with the other files'.
    """
    with ThreadPoolExecutor(16) as pool:
        heads = list(pool.map(lambda source: _probe(source, read.infer_rows), sources))
    filled = [(source, head.types) for source, head in zip(sources, heads, strict=True) if head is not None]
    if not any(head is not None and head.has_rows for head in heads):
        raise RequestError(f"input: no rows in {', '.join(source.name for source in sources[:3])}")
    for source, head in filled:
        _require_columns(source, head, columns)
    wanted = _wanted(filled, columns)
    types = {name: _unify(name, filled) for name in wanted}
    outputs: dict[str, str] = {}
    for name in wanted:
        outputs[name] = _output_name(name, {*wanted, *outputs.values()})
    return ListSchema(
        url=columns.url,
        caption=columns.caption,
        extras=outputs,
        types=types,
        takes_all=columns.keep is None,
        infer_rows=read.infer_rows,
    )


def plain_type(kind: pa.DataType) -> pa.DataType:
    """A column's type as it is written: decoded dictionaries, one kind of string."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    return kind


class Guess:
    """The type of a JSON column from the values seen: bool, int64, double, or text (which holds anything, as JSON)."""

    def __init__(self) -> None:
        self._kinds: set[type] = set()
        self._are_int64 = self._are_doubles = True

    def see(self, value: Any) -> None:
        if value is not None:
            self._kinds.add(type(value))
            self._are_int64 = self._are_int64 and is_int64(value)
            self._are_doubles = self._are_doubles and is_double(value)

    def type(self) -> pa.DataType:
        if not self._kinds:
            return pa.null()
        if self._kinds == {bool}:
            return pa.bool_()
        if self._are_int64:
            return pa.int64()
        return pa.float64() if self._are_doubles else pa.string()


def is_int64(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def is_double(value: Any) -> bool:
    """Whether a number is a double as it is: integers only where none is rounded."""
    return type(value) is float or (type(value) is int and abs(value) <= 2**53)


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What the beginning of a file tells: the types of its columns, and whether rows follow."""

    types: dict[str, pa.DataType]
    has_rows: bool


def _probe(source: Source, infer_rows: int) -> _Head | None:
    """Columns and types from a file's head; None for a file of no bytes."""
    if source.size_bytes == 0:
        return None
    try:
        return _head(source, infer_rows)
    except UNREADABLE as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(
            f"{source.name}: cannot be read as {source.compression or 'plain'} {source.format}: {said}"
        ) from None


def _head(source: Source, infer_rows: int) -> _Head | None:
    if source.format == "parquet":
        with fsspec.open(source.url, "rb") as raw, pq.ParquetFile(raw) as file:
            fields = [(field.name, plain_type(field.type)) for field in file.schema_arrow]
            return _Head(types=_distinct(source, fields), has_rows=file.metadata.num_rows > 0)
    with open_source(source) as file:
        if source.format == "txt":
            return _Head(types={}, has_rows=bool(file.read(1)))
        if source.format in ("csv", "tsv"):
            header, has_rows = text.csv_header(file, "\t" if source.format == "tsv" else ",")
            types = _distinct(source, [(name, pa.string()) for name in header])
            return _Head(types=types, has_rows=has_rows) if header else None
        return _json_head(source, islice(text.json_rows(file), infer_rows))


def _json_head(source: Source, rows: Iterable[Mapping[str, Any] | str]) -> _Head | None:
    guesses: dict[str, Guess] = {}
    num_rows = num_objects = 0
    for row in rows:
        num_rows += 1
        if not isinstance(row, str):
            num_objects += 1
            for name, value in row.items():
                guesses.setdefault(name, Guess()).see(value)
    if num_rows and not num_objects:
        raise RequestError(f"{source.name}: neither a JSON array of objects nor one JSON object a line")
    types = {name: guess.type() for name, guess in guesses.items()}
    return _Head(types=types, has_rows=True) if num_rows else None


def _distinct(source: Source, fields: list[tuple[str, pa.DataType]]) -> dict[str, pa.DataType]:
    names = [name for name, _ in fields]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"{source.name}: column {twice[0]} appears twice; rename one of them")
    return dict(fields)


def _require_columns(source: Source, head: dict[str, pa.DataType], columns: ColumnsConfig) -> None:
    for role, name in (("boxes", columns.boxes), ("hash", columns.hash)):
        if name is not None and name not in head:
            near = _nearest(name, [*head])
            raise RequestError(
                f"{source.name}: no column {name}; it has {', '.join(head) or 'none'}; "
                f"set columns.{role}={near or 'NAME'}, or leave it out"
            )
    if source.format == "txt":
        return
    for role, name in (("url", columns.url), ("caption", columns.caption)):
        if name not in head:
            near = _nearest(name, [*head]) or _nearest({"caption": "text"}.get(role, role), [*head])
            hint = f"columns.{role}={near}" if near else f"columns.{role}=NAME"
            raise RequestError(f"{source.name}: no column {name}; it has {', '.join(head) or 'none'}; set {hint}")
        if pa.types.is_nested(head[name]):
            raise RequestError(
                f"{source.name}: column {name} holds {head[name]}, not text; set columns.{role} to a text column"
            )


def _wanted(filled: list[tuple[Source, dict[str, pa.DataType]]], columns: ColumnsConfig) -> list[str]:
    """The extra columns' names, sorted, so that the order of the files does not matter."""
    present = {name for _, head in filled for name in head} - {columns.url, columns.caption}
    if columns.keep is None:
        return sorted(present)
    for name in columns.keep:
        if name not in present:
            near = _nearest(name, sorted(present))
            raise RequestError(
                f"columns.keep: no file has a further column {name}; "
                + (f"did you mean {near}?" if near else f"there are: {', '.join(sorted(present)) or 'none'}")
            )
    return sorted({*columns.keep})


def _unify(name: str, filled: list[tuple[Source, dict[str, pa.DataType]]]) -> pa.DataType:
    unified, owner = pa.null(), filled[0][0]
    for source, head in filled:
        kind = head.get(name, pa.null())
        try:
            pair = [pa.schema([(name, unified)]), pa.schema([(name, kind)])]
            unified = pa.unify_schemas(pair, promote_options="permissive").field(name).type
        except pa.ArrowException:
            raise RequestError(
                f"{source.name}: column {name} holds {kind}, but {unified} in {owner.name}; "
                "make them the same, or leave the column out with columns.keep"
            ) from None
        owner = source if kind == unified else owner
    return pa.string() if pa.types.is_null(unified) else plain_type(unified)


def _output_name(name: str, taken: set[str]) -> str:
    output = name
    while output in RESERVED or (output != name and output in taken):
        output = f"source_{output}"
    return output


def _nearest(wrong: str, names: list[str]) -> str:
    by_lower = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(wrong.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else ""
