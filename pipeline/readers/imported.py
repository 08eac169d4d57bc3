"""Rows of imported datasets: pairs with the place of their image, which nobody has to download.

Beside the columns of any list (`readers.rows`) a row has those of `IMPORT`. Samples that have no image are rows too,
with a reason: `import_failed` (img2dataset's status is not success), `import_missing` (a tar that ends early, a file or
a value that is not there), `import_unlisted` (a member of a tar that its table does not know).
"""

import fnmatch
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.identity import uid_keys, uid_text
from pipeline.readers.rows import BATCH_ROWS, decoded_column, further_columns, utf8_column
from pipeline.readers.schema import HASH_OF_STORED, ListSchema
from pipeline.readers.sources import Source, local_copy
from pipeline.readers.tables import image_column
from pipeline.reasons import Reason
from pipeline.tar import TarWriter

IMPORT = pa.schema(
    [
        pa.field("import_file", pa.string()),  # URL of the file that holds the image; "": images.tar of this unit
        pa.field("import_offset", pa.int64()),
        pa.field("import_size", pa.int64()),
        pa.field("import_sha256", pa.string()),  # of the downloaded bytes; null: not known
        pa.field("import_width", pa.int32()),  # of the downloaded image; null: not known
        pa.field("import_height", pa.int32()),
    ]
)
IMAGE_MEMBER = re.compile(r"(.+?)\.(?:.+\.)?(jpe?g|png|webp|gif|bmp|tiff?|avif)", re.IGNORECASE)
"""Key and kind of a tar's member that is an image."""
MAX_TEXT_BYTES = 2**20
"""Larger .txt and .json members are no captions."""
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(kw_only=True)
class Place:
    """Where a sample's image lies, and what stands beside it in the tar."""

    offset: int = 0
    size: int = -1
    """-1: there is none."""
    file: str = ""
    texts: dict[str, str] = field(default_factory=dict)


def read_imported(
    table: Path, source: Source, schema: ListSchema, content: str, images: TarWriter | None
) -> Iterator[pa.RecordBatch]:
    """Every sample of a source. table: local copy of `source.url`; content: its sha256.

    images: where images go that lie in the table itself; their `import_file` is "".
    """
    places = _places(source)
    if source.url == source.images:
        yield from _batches(_of_tar(places, source, content), schema)
        return
    known: set[str] = set()
    with pq.ParquetFile(table) as file:
        column = image_column(source, file.schema_arrow) if source.format == "images" else ""
        for batch in file.iter_batches(BATCH_ROWS if not column else 256):
            rows = {
                name: utf8_column(decoded_column(batch.column(name))).to_pylist()
                for name in _own(batch.schema.names, column)
            }
            if column:
                places = _written(batch.column(column).to_pylist(), rows["key"], images)
            told = [_told(row, source, places, content) for row in _as_dicts(rows, batch.num_rows)]
            known.update(key for key in rows.get("key", ()) if key is not None)
            extras = {
                output: decoded_column(batch.column(name)) for name, output in schema.extras.items() if name in rows
            }
            yield _batch(told, extras, schema)
    if source.format in ("webdataset", "files"):
        unlisted = {key: place for key, place in places.items() if place.size >= 0 and key not in known}
        yield from _batches(_not_in_table(unlisted, source, content), schema)


def _own(names: Sequence[str], image_column: str) -> list[str]:
    return [name for name in names if name != image_column]


def _as_dicts(rows: Mapping[str, Sequence[Any]], count: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        yield {name: values[index] for name, values in rows.items()}


def _told(row: Mapping[str, Any], source: Source, places: Mapping[str, Place], content: str) -> dict[str, Any]:
    """One sample of a table as a row."""
    url, caption = row.get("url"), row.get("caption") or ""
    told = {"url": url, "caption": caption, "uid": None, "identity": _identity(url, content, row.get("key"))}
    if source.format == "pairmill":
        offset, size = row["image_offset"], row["image_size"]
        place = Place() if None in (offset, size) else Place(offset=offset, size=size, file=source.images)
        told["uid"] = row["uid"]
    else:
        place = places.get(row["key"] or "", Place())
    status = row.get("status", "success")
    if status not in (None, "success"):
        return told | _without(Reason.IMPORT_FAILED, f"{status}: {row.get('error_message')}")
    if place.size < 0:
        return told | _without(Reason.IMPORT_MISSING, f"{row.get('key')} is not in {source.images or source.name}")
    sha256 = row.get("sha256")
    if row.get(HASH_OF_STORED) or not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        sha256 = None
    return told | _with(place, sha256, row.get("original_width"), row.get("original_height"))


def _identity(url: str | None, content: str, key: str | None) -> str:
    """What the uid is made of beside the caption: images without an address are told apart by their place."""
    return (url or "").strip() or f"import:{content}/{key}"


def _of_tar(places: Mapping[str, Place], source: Source, content: str) -> Iterator[dict[str, Any]]:
    """The samples of a tar without a table: captions from .txt, URLs from .json."""
    for key, place in places.items():
        try:
            row = json.loads(place.texts.get("json", "{}"))
        except (ValueError, RecursionError):
            row = {}
        row = row if isinstance(row, dict) else {}
        url = row.get("url") if isinstance(row.get("url"), str) else None
        caption = place.texts.get("txt", row.get("caption"))
        told = {
            "url": url,
            "caption": caption if isinstance(caption, str) else "",
            "uid": None,
            "identity": _identity(url, content, key),
        }
        if place.size < 0:
            yield told | _without(Reason.IMPORT_MISSING, f"{key} has no image in {source.images}")
        else:
            yield told | _with(place, None, None, None)


def _not_in_table(places: Mapping[str, Place], source: Source, content: str) -> Iterator[dict[str, Any]]:
    for key in places:
        yield {"url": None, "caption": "", "uid": None, "identity": _identity(None, content, key)} | _without(
            Reason.IMPORT_UNLISTED, f"{key} of {source.images}"
        )


def _without(reason: Reason, detail: str) -> dict[str, Any]:
    return dict.fromkeys(IMPORT.names) | {"reason": reason.value, "detail": detail[:200], "is_stored": None}


def _with(place: Place, sha256: str | None, width: int | None, height: int | None) -> dict[str, Any]:
    return {
        "reason": None,
        "detail": None,
        "import_file": place.file,
        "import_offset": place.offset,
        "import_size": place.size,
        "import_sha256": sha256,
        "import_width": width,
        "import_height": height,
        "is_stored": sha256 is None,
    }


def _batches(rows: Iterator[dict[str, Any]], schema: ListSchema) -> Iterator[pa.RecordBatch]:
    """Rows that have no further columns, in batches."""
    held: list[dict[str, Any]] = []
    for row in rows:
        held.append(row)
        if len(held) == BATCH_ROWS:
            yield _batch(held, {}, schema)
            held = []
    if held:
        yield _batch(held, {}, schema)


def _batch(rows: Sequence[Mapping[str, Any]], extras: Mapping[str, pa.Array], schema: ListSchema) -> pa.RecordBatch:
    captions = _texts(rows, "caption")
    identities = _texts(rows, "identity")
    computed = uid_text(uid_keys(identities, captions)).to_pylist()
    uids = [row["uid"] or uid for row, uid in zip(rows, computed, strict=True)]
    columns = {
        "url": _texts(rows, "url"),
        "caption": captions,
        "reason": pa.array([row["reason"] for row in rows], pa.string()),
        "detail": _texts(rows, "detail"),
        "uid": pa.array(uids, pa.string()),
        **{each.name: pa.array([row[each.name] for row in rows], each.type) for each in IMPORT},
    }
    fields = schema.fields()
    types = {each.name: each.type for each in fields}
    more = {name: utf8_column(column).cast(types[name]) for name, column in extras.items()}
    if HASH_OF_STORED in types:
        more[HASH_OF_STORED] = pa.array([row["is_stored"] for row in rows], pa.bool_())
    further = dict(zip(types, further_columns(more, len(rows), schema), strict=True))
    return pa.RecordBatch.from_pydict(columns | further)


def _texts(rows: Sequence[Mapping[str, Any]], name: str) -> pa.StringArray:
    """A column of text. What is no UTF-8 (in a member's name, or escaped in JSON) is spelt out and stays distinct."""
    values: list[str | None] = [row[name] for row in rows]
    spelt = [None if value is None else value.encode("utf-8", "backslashreplace").decode() for value in values]
    return pa.array(spelt, pa.string())


def _places(source: Source) -> dict[str, Place]:
    """Where the images of a source lie, by key; nothing where the table tells."""
    if source.format == "webdataset":
        return _index_tar(source)
    if source.format == "files":
        return _index_folder(source.images)
    return {}


def _index_tar(source: Source) -> dict[str, Place]:
    """The members of a tar that are whole, by key; one that breaks off gives those before the break."""
    places: dict[str, Place] = {}
    has_table = source.url != source.images
    with ExitStack() as stack:
        path, _ = stack.enter_context(local_copy(replace(source, url=source.images)))
        file = stack.enter_context(open(path, "rb"))
        length = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isfile() and member.offset_data + member.size <= length:
                        _add_member(places, member, tar, source, with_texts=not has_table)
        except tarfile.TarError:
            pass  # an empty file, or one cut inside a header: what its table knows beyond is reported as missing
    return places


def _add_member(
    places: dict[str, Place], member: tarfile.TarInfo, tar: tarfile.TarFile, source: Source, *, with_texts: bool
) -> None:
    name = member.name.removeprefix("./")
    if found := IMAGE_MEMBER.fullmatch(name):
        place = places.setdefault(found[1], Place())
        if place.size < 0:
            place.offset, place.size, place.file = member.offset_data, member.size, source.images
    elif with_texts and member.size <= MAX_TEXT_BYTES:
        key, _, kind = name.rpartition(".")
        file = tar.extractfile(member)
        if kind in ("txt", "json") and file is not None:
            places.setdefault(key, Place()).texts[kind] = file.read().decode("utf-8", "replace")


def _index_folder(url: str) -> dict[str, Place]:
    fs, folder = fsspec.core.url_to_fs(url)
    places = {}
    for info in fs.ls(folder, detail=True):
        name = info["name"].rpartition("/")[2]
        if (found := IMAGE_MEMBER.fullmatch(name)) and not fnmatch.fnmatch(name, ".*"):
            places[found[1]] = Place(size=int(info["size"] or 0), file=fs.unstrip_protocol(info["name"]))
    return places


def _written(bodies: Sequence[bytes | None], keys: Sequence[str | None], images: TarWriter | None) -> dict[str, Place]:
    """Images of a table's rows, copied into a tar in which each can be read by its own."""
    assert images is not None
    places: dict[str, Place] = {}
    for key, body in zip(keys, bodies, strict=True):
        if body and key is not None:
            places[key] = Place(offset=images.add(f"{len(places)}.bin", body), size=len(body))
    return places
