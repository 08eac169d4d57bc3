"""What a dataset's report is made of: exact counts from markers, and details of a sample of rows.

The plan put the rows in random order, so the first fetch units are a random sample of all of them: histograms, hosts
and pictures are taken from those, and the report's cost does not grow with the dataset.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from cluster.errors import RequestError
from cluster.journal import Journal, Marker
from cluster.report import image_url
from cluster.store import Store
from pipeline.generations import all_markers, record_markers
from pipeline.manifest import Manifest
from pipeline.reasons import Reason, sentence
from pipeline.record import REPEATED_PAIR
from pipeline.selection import read_table

MAX_ROWS = 200_000
THUMBNAIL_PX = 176
PHASES = {
    "plan-order": "before the download",
    "fetch": "download",
    "decide": "rules on images",
    "dedup": "duplicates",
}
DUPLICATES = (Reason.DUPLICATE_BYTES, Reason.DUPLICATE_URL, Reason.DUPLICATE_PAIR, Reason.NEAR_DUPLICATE)
_COLUMNS = (
    "uid",
    "url",
    "caption",
    "num_rows",
    "status",
    "reason",
    "rule",
    "score",
    "threshold",
    "detail",
    "duplicate_of",
    "key",
    "http_status",
    "attempts",
    "size_bytes",
    "original_width",
    "original_height",
    "width",
    "height",
    "sharpness",
    "is_animated",
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the way from all input rows to the kept ones."""

    reason: str
    phase: str
    meaning: str
    num_rows: int
    num_left: int


@dataclass(kw_only=True)
class Sampled:
    """The rows of some whole fetch units: their record, and where their pictures are."""

    rows: pa.Table
    pictures: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """uid -> (tar, offset, size) of every downloaded image of the sample"""
    is_all: bool = True

    def row(self, index: int) -> dict[str, Any]:
        """One row as Python values."""
        values: dict[str, Any] = self.rows.slice(index, 1).to_pylist()[0]
        return values

    def row_of(self, uid: str) -> dict[str, Any] | None:
        """The row of a uid, if it is in the sample."""
        index = self.rows.column("uid").index(uid).as_py()
        return None if index < 0 else self.row(index)

    def column(self, name: str) -> list[Any]:
        values: list[Any] = self.rows.column(name).to_pylist()
        return values


def steps_of(store: Store, manifest: Manifest) -> list[Step]:
    """The drops in the order in which they happen, largest first inside a phase."""
    phase_of = _phases(Journal(store))
    order = [*PHASES.values(), ""]
    dropped = [
        (order.index(phase_of.get(reason, "duplicates")), -number, reason)
        for reason, number in manifest.counts.items()
        if reason != "kept"
    ]
    left, steps = manifest.num_input_rows, []
    for _, negative, reason in sorted(dropped):
        left += negative
        steps.append(
            Step(
                reason=reason,
                phase=phase_of.get(reason, "duplicates"),
                meaning=meaning(reason),
                num_rows=-negative,
                num_left=left,
            )
        )
    return steps


def meaning(reason: str) -> str:
    """A sentence for a reason of the manifest's counts."""
    if reason == REPEATED_PAIR:
        return "the same URL and caption stand in the lists once more"
    return sentence(reason)


def sample_rows(store: Store, max_rows: int = MAX_ROWS) -> Sampled:
    """The records of the first fetch units, at least one, up to about `max_rows` rows."""
    journal = Journal(store)
    recorded, fetched = record_markers(journal), all_markers(journal, "fetch")
    if not recorded:
        raise RequestError(f"{store.url}: a report is made from journal/ and record/, and journal/record/ is not there")
    tables: list[pa.Table] = []
    for marker in recorded.values():
        if tables and sum(table.num_rows for table in tables) >= max_rows:
            break
        tables.append(read_table(store, marker.path_of("record.parquet"), _COLUMNS))
    rows, units = pa.concat_tables(tables), list(recorded)[: len(tables)]
    pictures: dict[str, tuple[str, int, int]] = {}
    for marker in fetched:
        is_repair = marker.stage != "fetch"
        if marker.unit in units or (is_repair and len(pictures) < rows.num_rows):
            pictures |= dict(_pictures(store, marker))
    return Sampled(rows=rows, pictures=pictures, is_all=len(tables) == len(recorded))


def thumbnail(store: Store, sampled: Sampled, uid: str) -> str:
    """A small JPEG of a sampled pair's image as a data: URL; "" if there is none to show."""
    place = sampled.pictures.get(uid)
    if place is None:
        return ""
    try:
        data = store.read_range(*place)
    except FileNotFoundError:  # the downloaded images of a finished build may be removed
        return ""
    if not data:
        return ""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        return ""
    scale = THUMBNAIL_PX / max(pixels.shape[:2])
    if scale < 1:
        size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    done, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 82])
    return image_url(encoded.tobytes()) if done else ""


def _pictures(store: Store, fetched: Marker) -> Iterator[tuple[str, tuple[str, int, int]]]:
    tar = fetched.path_of("images.tar")
    try:
        table = read_table(store, fetched.path_of("rows.parquet"), ["uid", "image_offset", "image_size"])
    except FileNotFoundError:
        return
    for row in table.to_pylist():
        if row["image_size"]:
            yield row["uid"], (tar, row["image_offset"], row["image_size"])


def _phases(journal: Journal) -> dict[str, str]:
    """Which phase each reason belongs to: the first stage whose markers count it."""
    phases: dict[str, str] = dict.fromkeys((*map(str, DUPLICATES), REPEATED_PAIR), PHASES["dedup"])
    for stage in ("decide", "fetch", "plan-order"):
        for marker in all_markers(journal, stage):
            for name in marker.counts:
                if name.startswith("reason:"):
                    phases[name.removeprefix("reason:")] = PHASES[stage]
    return phases
