"""Images of imported rows: read from where they lie, decoded once to be measured, and stored as they are if they fit.

An image that the settings would not change (format, size, orientation) keeps its bytes; another is processed as if it
had been downloaded. sha256 and size of the downloaded image are those that the imported dataset tells; where it does
not, sha256 is that of the stored bytes, and the column `hash_of_stored` says so.
"""

import hashlib
import select
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import RunError
from cluster.remote import call
from cluster.store import Store, is_elsewhere
from pipeline.claims import Claims
from pipeline.config import FetchConfig, ImageConfig
from pipeline.isolate import Decoders, lease_decoders
from pipeline.picture import Boxes, ImageError, Processed
from pipeline.readers import IMPORT
from pipeline.reasons import Reason

READ_THREADS = 16
AHEAD = 64
"""Images that are read or wait for a decoder."""
POLL_MS = 1_000
_IMPORTED = "imported"

Outcome = dict[str, Any]


def to_download(planned: pa.Table) -> pa.Table:
    """The rows with a reason not to be fetched for those that come with an image."""
    if IMPORT.names[0] not in planned.schema.names:
        return planned
    is_imported = pc.is_valid(planned["import_size"])
    reasons = pc.if_else(is_imported, pc.coalesce(planned["reason"], _IMPORTED), planned["reason"])
    return planned.set_column(planned.schema.get_field_index("reason"), "reason", reasons)


def import_images(
    planned: pa.Table, store: Store, fetch: FetchConfig, image: ImageConfig, claims: Claims
) -> Iterator[tuple[int, Outcome, Processed | None]]:
    """(row, its FETCHED values, its image) of every row that comes with an image and has no reason; in any order.

    Raises RunError when a file is not there any more.
    """
    if IMPORT.names[0] not in planned.schema.names:
        return
    wanted = pc.and_(pc.is_null(planned["reason"]), pc.is_valid(planned["import_size"]))
    rows = [{"index": index} | row for index, row in enumerate(planned.select(IMPORT.names).to_pylist())]
    rows = [row for row, is_wanted in zip(rows, wanted.to_pylist(), strict=True) if is_wanted]
    if not rows:
        return
    sizes = {row["index"]: row["import_size"] for row in rows}
    for row in [row for row in rows if row["import_size"] > fetch.max_bytes]:
        detail = f"{row['import_size']:,} bytes; fetch.max_bytes is {fetch.max_bytes:,}"
        yield row["index"], _refused(row, Reason.TOO_LARGE, detail), None
    rows = [row for row in rows if row["import_size"] <= fetch.max_bytes]
    limit_bytes, open_bytes = fetch.memory_mib * 2**20 // 8, 0  # of what is read, and again of what is being decoded
    as_it_is = image.model_copy(update={"encode": "keep"})
    with ThreadPoolExecutor(READ_THREADS) as pool, lease_decoders(fetch.decode_threads, as_it_is) as decoders:
        watch = select.poll()
        watch.register(decoders.descriptor, select.POLLIN)
        for row, body in _read_ahead(rows, store, pool, limit_bytes):
            if outcome := _hand_over(row, body, claims, decoders):
                yield row["index"], outcome, None
            else:
                open_bytes += sizes[row["index"]]
            while decoders.num_open >= AHEAD or open_bytes > limit_bytes:
                watch.poll(POLL_MS)
                for done in _taken(decoders, image):
                    open_bytes -= sizes[done[0]]
                    yield done
        while decoders.num_open:
            watch.poll(POLL_MS)
            yield from _taken(decoders, image)


def _read_ahead(
    rows: Sequence[dict[str, Any]], store: Store, pool: ThreadPoolExecutor, limit_bytes: int
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Every row with the bytes at its place; some are read while others are decoded."""
    reading: deque[tuple[dict[str, Any], Future[bytes]]] = deque()
    num_bytes = 0
    for row in rows:
        reading.append((row, pool.submit(_read, store, row["import_file"], row["import_offset"], row["import_size"])))
        num_bytes += row["import_size"]
        while reading and (len(reading) >= AHEAD or num_bytes > limit_bytes):
            first, body = reading.popleft()
            num_bytes -= first["import_size"]
            yield first, body.result()
    for row, body in reading:
        yield row, body.result()


def _read(store: Store, file: str, offset: int, size_bytes: int) -> bytes:
    try:
        if not is_elsewhere(file):
            return store.read_range(file, offset, size_bytes)
        fs, path = _file_system(file)
        return bytes(call(file, fs.cat_file, path, start=offset, end=offset + size_bytes))
    except FileNotFoundError:
        raise RunError(
            f"{file}: holds images that are imported, and is not there any more; put it back and run the same command"
        ) from None


@lru_cache(maxsize=4_096)
def _file_system(url: str) -> tuple[Any, str]:
    fs, path = fsspec.core.url_to_fs(url)
    return fs, str(path)


def _hand_over(row: dict[str, Any], body: bytes, claims: Claims, decoders: Decoders) -> Outcome | None:
    """Give an image to the decoders. Returns the row's outcome if it is none."""
    sha256 = row["import_sha256"] or hashlib.sha256(body).hexdigest()
    if len(body) < row["import_size"]:
        return _refused(row, Reason.IMPORT_MISSING, f"{row['import_file']} ends inside it") | {"sha256": sha256}
    try:
        boxes: Boxes = claims.boxes_of(row["index"])
    except ImageError as refusal:
        return _refused(row, refusal.reason, refusal.detail) | {"sha256": sha256}
    decoders.give((row, _came(row) | {"sha256": sha256}), body, boxes)
    return None


def _came(row: dict[str, Any]) -> Outcome:
    """What is said of every imported row, whatever becomes of its image."""
    return {"status": "dropped", "attempts": 0, "received_bytes": 0, "imported_from": row["import_file"]}


def _refused(row: dict[str, Any], reason: Reason, detail: str) -> Outcome:
    return _came(row) | {"reason": reason.value, "detail": detail}


def _taken(decoders: Decoders, image: ImageConfig) -> Iterator[tuple[int, Outcome, Processed | None]]:
    """What the decoders have made of images."""
    for (row, outcome), result in decoders.take():
        if isinstance(result, ImageError):
            yield row["index"], outcome | {"reason": result.reason.value, "detail": result.detail}, None
            continue
        outcome |= {name: value for name, value in vars(result).items() if name != "data"}
        outcome |= {"status": "ok", "image_format": image.format, "image_size": len(result.data)}
        if row["import_width"] is not None and row["import_height"] is not None:
            outcome |= {"original_width": row["import_width"], "original_height": row["import_height"]}
        yield row["index"], outcome, result
