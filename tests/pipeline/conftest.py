"""Fetch outputs and small builds for the pipeline's tests."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.journal import Journal, Marker
from cluster.store import Store

FETCHED = pa.schema(
    [
        ("uid", pa.string()),
        ("order", pa.uint64()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("num_rows", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("rule", pa.string()),
        ("score", pa.float64()),
        ("threshold", pa.float64()),
        ("detail", pa.string()),
        ("http_status", pa.int32()),
        ("final_url", pa.string()),
        ("num_redirects", pa.int32()),
        ("size_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("source_format", pa.string()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image_format", pa.string()),
        ("is_animated", pa.bool_()),
        ("grey_std", pa.float64()),
        ("mean_red", pa.float64()),
        ("mean_green", pa.float64()),
        ("mean_blue", pa.float64()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("attempts", pa.int32()),
        ("seconds", pa.float64()),
        ("licence", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A fetched row in short: `body` decides sha256 and image; None is a row that was dropped, with `reason`."""

    uid: int
    body: str | None = "a"
    reason: str = "http_404"
    num_rows: int = 1
    width: int = 64
    height: int = 48
    grey_std: float = 40.0
    licence: str | None = "CC0"


def jpeg(seed: str, width: int = 64, height: int = 48) -> bytes:
    """A small picture that differs for every seed."""
    draw = np.random.default_rng(list(seed.encode()))
    pixels = cv2.resize(draw.integers(0, 256, (4, 4, 3), np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return bytes(cv2.imencode(".jpg", pixels)[1])


Fetch = Callable[[Sequence[Sequence[dict[str, Any]]]], list[Marker]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


@pytest.fixture
def fetch(store: Store) -> Fetch:
    """Commit fetch units, each a list of `Pair` fields, as the fetch stage would; returns their markers in order."""

    def commit(units: Sequence[Sequence[dict[str, Any]]]) -> list[Marker]:
        return [
            _commit(Journal(store), f"00000-{index:05}", [Pair(**pair) for pair in pairs])
            for index, pairs in enumerate(units)
        ]

    return commit


def _commit(journal: Journal, unit: str, pairs: Sequence[Pair]) -> Marker:
    with journal.attempt("fetch", unit) as output:
        places = _write_images(output.path("images.tar"), pairs)
        rows = [_row(pair, places.get(pair.uid)) for pair in pairs]
        pq.write_table(pa.Table.from_pylist(rows, FETCHED), output.path("rows.parquet"))
        output.count("rows", sum(pair.num_rows for pair in pairs))
        output.count("reason:ok", sum(pair.num_rows for pair in pairs if pair.body is not None))
        return journal.commit("fetch", unit, output)


def _write_images(path: Path, pairs: Sequence[Pair]) -> dict[int, tuple[int, int]]:
    """uid -> (offset, size); stored in another order than the rows, as images arrive."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for pair in reversed(pairs):
            if pair.body is not None:
                data = jpeg(pair.body, pair.width, pair.height)
                member = tarfile.TarInfo(f"{pair.uid:032x}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return {int(member.name[:32], 16): (member.offset_data, member.size) for member in tar}


def _row(pair: Pair, place: tuple[int, int] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "uid": f"{pair.uid:032x}",
        "order": pair.uid,
        "url": f"http://host{pair.uid % 3}.test/{pair.uid}.jpg",
        "caption": f"caption of {pair.uid} \N{SNOWMAN}",
        "num_rows": pair.num_rows,
        "http_status": 404 if place is None else 200,
        "attempts": 1,
        "seconds": 0.01,
        "num_redirects": 0,
        "licence": pair.licence,
    }
    if place is None:
        return {**row, "status": "dropped", "reason": pair.reason}
    assert pair.body is not None
    return {
        **row,
        "status": "ok",
        "size_bytes": 1000,
        "sha256": hashlib.sha256(pair.body.encode()).hexdigest(),
        "source_format": "jpeg",
        "original_width": pair.width,
        "original_height": pair.height,
        "width": pair.width,
        "height": pair.height,
        "image_format": "jpg",
        "is_animated": False,
        "grey_std": pair.grey_std,
        "image_offset": place[0],
        "image_size": place[1],
    }
