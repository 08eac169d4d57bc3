"""The pictures of a report: downloaded images, small, inside the page."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cluster.journal import Journal, Marker
from cluster.report import image_url
from cluster.store import Store
from pipeline.generations import stage_name
from pipeline.selection import read_table

THUMBNAIL_PX = 176
MAX_CAPTION_CHARS = 160

_Places = dict[str, tuple[str, int, int]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A pair to show: `image` is a data: URL, or empty when there is no image. tag: "kept", "dropped" or ""."""

    image: str
    caption: str
    note: str
    url: str
    tag: str = ""


class Album:
    """Finds the downloaded images of rows: in work/fetch, which may be removed; then there are none."""

    def __init__(self, store: Store) -> None:
        self._store, self._journal = store, Journal(store)
        self._places: dict[str, _Places] = {}

    @cached_property
    def _fetched(self) -> dict[str, Marker]:
        return self._journal.markers("fetch")

    def picture(self, row: dict[str, Any], note: str, tag: str = "") -> Picture:
        """A row of `Sampled` to show."""
        caption = row["caption"]
        if len(caption) > MAX_CAPTION_CHARS:
            caption = caption[: MAX_CAPTION_CHARS - 1] + "…"
        return Picture(image=self.thumbnail(row), caption=caption, note=note, url=row["url"] or "", tag=tag)

    def thumbnail(self, row: dict[str, Any], side: int = THUMBNAIL_PX, quality: int = 82) -> str:
        """A small JPEG as a data: URL; "" if there is no image."""
        pixels = self.pixels(row)
        if pixels is None:
            return ""
        done, encoded = cv2.imencode(".jpg", _shrunk(pixels, side), [cv2.IMWRITE_JPEG_QUALITY, quality])
        return image_url(encoded.tobytes()) if done else ""

    def pixels(self, row: dict[str, Any]) -> NDArray[np.uint8] | None:
        """The stored image, [height, width, 3]; None if there is none."""
        place = self._place(row)
        if place is None:
            return None
        try:
            data = self._store.read_range(*place)
        except FileNotFoundError:
            return None
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
        return None if pixels is None else np.asarray(pixels, np.uint8)

    def _place(self, row: dict[str, Any]) -> tuple[str, int, int] | None:
        """(tar, offset, size) of a row's image: among those of its fetch unit, or of the repair that has tried it."""
        if number := row["generation"]:
            repair = stage_name(number, "fetch")
            if repair not in self._places:
                markers = self._journal.markers(repair).values()
                self._places[repair] = {uid: place for marker in markers for uid, place in self._read(marker).items()}
            return self._places[repair].get(row["uid"])
        if row["unit"] not in self._places:
            marker = self._fetched.get(row["unit"])
            self._places[row["unit"]] = self._read(marker) if marker else {}
        return self._places[row["unit"]].get(row["uid"])

    def _read(self, fetched: Marker) -> _Places:
        try:
            table = read_table(self._store, fetched.path_of("rows.parquet"), ["uid", "image_offset", "image_size"])
            tar = fetched.path_of("images.tar")
        except (FileNotFoundError, KeyError):
            return {}
        rows = zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True)
        return {uid: (tar, offset, size) for uid, offset, size in rows if size}


def _shrunk(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    scale = side / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
