"""A picture of the whole dataset: samples laid out in a plane so that what is alike lies together."""

import math
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from cluster.journal import Journal
from cluster.store import Store
from pipeline.models.stages import Embedded
from pipeline.report.data import Sampled
from pipeline.report.pictures import Album
from pipeline.timings import read_timings

NUM_SAMPLES = 2_000
COLUMNS, ROWS = 22, 13
TILE_PX = 72
LAYOUT_SIDE = 8

Plane = NDArray[np.float64]


def map_html(store: Store, album: Album, sampled: Sampled) -> str:
    """A grid of pictures; "" if there are too few to show."""
    rows = [sampled.row(index) for index in sampled.find("kept")[:NUM_SAMPLES]]
    stage = _embed_stage(store)
    vectors = _embeddings(store, stage, sampled, rows) if stage else {}
    if vectors:
        about = "their embeddings, the model's of dedup.semantic_model: neighbours show the same kind of thing"
    else:
        vectors = _layouts(album, rows[: NUM_SAMPLES // 4])
        about = (
            f"their {LAYOUT_SIDE}x{LAYOUT_SIDE} thumbnails, since there are no embeddings: neighbours have like "
            "colours and layout, which says little about what they show"
        )
    if len(vectors) < 8:
        return ""
    places = list(vectors)
    cells = arrange(project(np.stack([vectors[place] for place in places])), COLUMNS, ROWS)
    tiles = []
    for place, (column, line) in zip(places, cells, strict=True):
        if column < 0:
            continue
        image = album.thumbnail(rows[place], TILE_PX, quality=70)
        if image:
            tiles.append(
                Markup(
                    '<img src="{}" alt="{}" title="{}" loading="lazy" style="grid-area:{}/{};width:100%;'
                    'aspect-ratio:1;object-fit:cover;display:block;border-radius:3px">'
                ).format(image, rows[place]["caption"], rows[place]["caption"], line + 1, column + 1)
            )
    grid = Markup('<div class="scroll"><div style="{}">{}</div></div>').format(
        f"display:grid;grid-template-columns:repeat({COLUMNS},1fr);grid-template-rows:repeat({ROWS},auto);gap:2px;"
        "min-width:52rem",
        Markup().join(tiles),
    )
    return (
        f"<p>{len(tiles):,} of {len(vectors):,} kept samples, laid out along the two main directions (PCA) of {about}. "
        "Only the order along each direction counts, so that dense and sparse regions have the same room.</p>"
        f"{grid}"
    )


def project(vectors_ND: NDArray[Any]) -> Plane:
    """[N, 2] the two principal components; the sign of each is that which makes its largest direction positive."""
    centred = vectors_ND.astype(np.float64) - vectors_ND.mean(axis=0, dtype=np.float64)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    two = directions[:2]
    two = two * np.sign(two[np.arange(len(two)), np.abs(two).argmax(axis=1)])[:, None]
    plane: Plane = centred @ two.T
    return plane if plane.shape[1] == 2 else np.column_stack([plane, np.zeros(len(plane))])


def arrange(plane_N2: Plane, columns: int, rows: int) -> NDArray[np.int64]:
    """[N, 2] the (column, row) of each point in a grid with one point a cell, (-1, -1) for those without one.

    Points are cut into columns of equal numbers by their first coordinate, and each column by its second one.
    """
    count = len(plane_N2)
    columns = min(columns, max(1, math.isqrt(count * columns // rows)))
    rows = min(rows, max(1, count // columns))
    cells = np.full((count, 2), -1, np.int64)
    for column, members in enumerate(np.array_split(np.argsort(plane_N2[:, 0], kind="stable"), columns)):
        ordered = members[np.argsort(-plane_N2[members, 1], kind="stable")]
        for row, part in enumerate(np.array_split(ordered, rows)):
            if len(part):
                cells[part[len(part) // 2]] = column, row
    return cells


def _embed_stage(store: Store) -> str | None:
    """The stage that made embeddings; the last one, if several models did."""
    names = [timing.stage for timing in read_timings(store) if timing.stage.startswith("embed-")]
    return names[-1] if names else None


def _embeddings(
    store: Store, stage: str, sampled: Sampled, rows: list[dict[str, Any]]
) -> dict[int, NDArray[np.float16]]:
    """Place among `rows` -> embedding, of those that have one."""
    markers, found = Journal(store).markers(stage), {}
    of_unit: dict[str, dict[int, NDArray[np.float16]]] = {}
    for place, row in enumerate(rows):
        marker = markers.get(row["unit"])
        if marker is None or row["generation"]:
            continue
        if row["unit"] not in of_unit:
            try:
                numbers, vectors = Embedded.of(marker).read(store)
            except FileNotFoundError:
                return {}
            of_unit[row["unit"]] = dict(zip(numbers.tolist(), vectors, strict=True))
        vector = of_unit[row["unit"]].get(sampled.place(row["index"])[1])
        if vector is not None and np.isfinite(vector).all():
            found[place] = vector
    return found


def _layouts(album: Album, rows: list[dict[str, Any]]) -> dict[int, NDArray[np.float16]]:
    """Place among `rows` -> the colours of a tiny thumbnail."""
    found = {}
    for place, row in enumerate(rows):
        pixels = album.pixels(row)
        if pixels is not None:
            small = cv2.resize(pixels, (LAYOUT_SIDE, LAYOUT_SIDE), interpolation=cv2.INTER_AREA)
            found[place] = (cv2.cvtColor(small, cv2.COLOR_BGR2LAB).astype(np.float16) / 255).ravel()
    return found
