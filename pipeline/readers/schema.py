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
from pipeline.manifest import IMG2DATASET_COLUMNS, SAMPLE_COLUMNS
from pipeline.readers import text
from pipeline.readers.sources import Source, open_source
from pipeline.readers.tables import require_import_columns

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
        *("http_version", "server_address", "phash", "phash_mirror", "sharpness", "md5", "sha512", "captions"),
        *("imported_from", "import_file", "import_offset", "import_size", "import_sha256"),
        *("import_width", "import_height"),
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


SOURCE, LABEL, HASH_OF_STORED = "source", "label", "hash_of_stored"
"""Columns that a build adds: the name of a pair's source, its category, and whether its sha256 is of an imported
image as it was stored, because nobody knows that of the bytes as they were downloaded."""

# Columns of imported tables that mean something here: they do not travel as they are.
_TOLD = frozenset(SAMPLE_COLUMNS) | {*IMG2DATASET_COLUMNS, *("md5", "sha512", "jpg", "png", "webp", HASH_OF_STORED)}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Lists that are read alike: of one source, and either plain or imported.

    name: of the source, "" if sources have no names. label: the column with categories.
    """

    columns: ColumnsConfig
    name: str = ""
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class ListSchema:
    """What a list's rows look like. extras: {name in the list: name in the outputs}, in output order.

    types: the Arrow type of each extra column by its name in the list. takes_all: the extras are all that there are.
    infer_rows: how many rows of each JSON file were looked at to find them. outputs: the further columns of all lists
    together. constants: columns that have one value in all rows of this list.
    """

    url: str
    caption: str
    extras: dict[str, str]
    types: dict[str, pa.DataType]
    takes_all: bool
    infer_rows: int
    outputs: tuple[pa.Field, ...]
    constants: dict[str, str]

    def fields(self) -> list[pa.Field]:
        """The further columns as they are in the outputs, of this list and of all others."""
        return list(self.outputs)


def list_schema(sources: Sequence[Source], columns: ColumnsConfig, read: ReadConfig) -> ListSchema:
    """`list_schemas` of lists that are all read alike."""
    return list_schemas(sources, [Group(columns=columns)], read)[0]


def list_schemas(sources: Sequence[Source], groups: Sequence[Group], read: ReadConfig) -> tuple[ListSchema, ...]:
    """The schema of every group (`Source.group`), with the columns of all files together. Reads only their heads.

    Raises RequestError, naming the file, when one cannot be read, has no URL or caption column, or has a column of a
    type that does not go with the other files'.
    """
    with ThreadPoolExecutor(16) as pool:
        heads = list(pool.map(lambda source: _probe(source, read.infer_rows), sources))
    if not any(head is not None and head.has_rows for head in heads):
        raise RequestError(f"input: no rows in {', '.join(source.name for source in sources[:3])}")
    filled = [(source, head.types) for source, head in zip(sources, heads, strict=True) if head is not None]
    own = _added(filled, groups)
    present: list[set[str]] = []
    for index, group in enumerate(groups):
        mine = [(source, head) for source, head in filled if source.group == index]
        for source, head in mine:
            _require_columns(source, head, group)
        present.append(_present(mine, group))
    _refuse_unknown_keeps(groups, present)
    extras = [_outputs(_wanted(names, group), group, own) for names, group in zip(present, groups, strict=True)]
    renamed = [
        (source, {output: head[name] for name, output in extras[source.group].items() if name in head})
        for source, head in filled
    ]
    names = list(dict.fromkeys(output for each in extras for output in each.values()))
    types = {name: _unify(name, renamed) for name in names}
    fields = [pa.field(name, types[name]) for name in names]
    fields += [pa.field(name, kind) for name, kind in own.items() if name not in names]
    return tuple(
        ListSchema(
            url=group.columns.url,
            caption=group.columns.caption,
            extras=each,
            types={name: types[output] for name, output in each.items()},
            takes_all=group.columns.keep is None,
            infer_rows=read.infer_rows,
            outputs=tuple(fields),
            constants={SOURCE: group.name} if group.name else {},
        )
        for group, each in zip(groups, extras, strict=True)
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
    if source.is_import and source.url == source.images:  # a tar without a table
        return _Head(types={}, has_rows=True)
    if source.format == "parquet" or source.is_import:
        with fsspec.open(source.url, "rb") as raw, pq.ParquetFile(raw) as file:
            if source.is_import:
                require_import_columns(source, file.schema_arrow)
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


def _require_columns(source: Source, head: dict[str, pa.DataType], group: Group) -> None:
    columns = group.columns
    for role, name in (("boxes", columns.boxes), ("hash", columns.hash), ("label", group.label)):
        if name is not None and name not in head and not (source.is_import and role == "hash"):
            near = _nearest(name, [*head])
            key = "label" if role == "label" else f"columns.{role}"
            raise RequestError(
                f"{source.name}: no column {name}; it has {', '.join(head) or 'none'}; "
                f"set {key}={near or 'NAME'}, or leave it out"
            )
    if source.format == "txt" or source.is_import:
        return
    for role, name in (("url", columns.url), ("caption", columns.caption)):
        if name not in head:
            if role == "caption" and group.label is not None:
                continue
            near = _nearest(name, [*head]) or _nearest({"caption": "text"}.get(role, role), [*head])
            hint = f"columns.{role}={near}" if near else f"columns.{role}=NAME"
            raise RequestError(f"{source.name}: no column {name}; it has {', '.join(head) or 'none'}; set {hint}")
        if pa.types.is_nested(head[name]):
            raise RequestError(
                f"{source.name}: column {name} holds {head[name]}, not text; set columns.{role} to a text column"
            )


def _present(filled: list[tuple[Source, dict[str, pa.DataType]]], group: Group) -> set[str]:
    """The extra columns' names."""
    told = _TOLD if filled and filled[0][0].is_import else {group.columns.url, group.columns.caption}
    return {name for _, head in filled for name in head} - told


def _wanted(present: set[str], group: Group) -> list[str]:
    """Those that travel, sorted, so that the order of the files does not matter."""
    kept = present if group.columns.keep is None else present & {*group.columns.keep}
    return sorted(kept | ({group.label} if group.label is not None else set()))


def _refuse_unknown_keeps(groups: Sequence[Group], present: Sequence[set[str]]) -> None:
    for group in groups:
        alike = [names for other, names in zip(groups, present, strict=True) if other.columns is group.columns]
        known = sorted({name for names in alike for name in names})
        for name in group.columns.keep or []:
            if name not in known:
                near = _nearest(name, known)
                raise RequestError(
                    f"columns.keep: no file has a further column {name}; "
                    + (f"did you mean {near}?" if near else f"there are: {', '.join(known) or 'none'}")
                )


def _added(filled: list[tuple[Source, dict[str, pa.DataType]]], groups: Sequence[Group]) -> dict[str, pa.DataType]:
    """The columns that the build adds, by name."""
    own = {}
    if any(group.label is not None for group in groups):
        own[LABEL] = pa.string()
    if any(group.name for group in groups):
        own[SOURCE] = pa.string()
    imports = [(source, head) for source, head in filled if source.is_import]
    if any(source.format != "pairmill" or HASH_OF_STORED in head for source, head in imports):
        own[HASH_OF_STORED] = pa.bool_()
    return own


def _outputs(wanted: Sequence[str], group: Group, own: Mapping[str, pa.DataType]) -> dict[str, str]:
    """{name in the list: name in the outputs}."""
    outputs: dict[str, str] = {}
    for name in wanted:
        if name == group.label:
            outputs[name] = LABEL
        else:
            outputs[name] = _output_name(name, {*wanted, *outputs.values()}, RESERVED | own.keys())
    return outputs


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


def _output_name(name: str, taken: set[str], reserved: frozenset[str]) -> str:
    output = name
    while output in reserved or (output != name and output in taken):
        output = f"source_{output}"
    return output


def _nearest(wrong: str, names: list[str]) -> str:
    by_lower = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(wrong.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else ""
