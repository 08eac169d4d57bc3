"""Stages that compare the downloaded images of a fetch unit with those of the evaluation sets, all at once.

score-evaluation-<fingerprint>     scores.parquet: bits between perceptual hashes; not a number beyond REACH, or with
                                   a greater threshold beyond that, which then ends the name
score-likeness-<fingerprint>       scores.parquet: cosine of embeddings

The detail of a score is the evaluation image: `coco: 000139.jpg, mirrored`. The references are read by every task and
kept by its process: they are what is broadcast.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.executor import Unit
from cluster.journal import UnitOutput
from cluster.store import Store
from pipeline.contamination.hash_index import HashIndex
from pipeline.models.images import decode_rgb
from pipeline.models.measured import SCORES_FILE, write_scores
from pipeline.models.stages import Embedded, UnitImages, downloaded_rows
from pipeline.selection import open_images, read_checked
from pipeline.signals import perceptual_hashes
from pipeline.workfile import WorkFile

REACH = 7
"""Bits up to which the nearest evaluation image is found at least, so that another threshold needs no search."""
REFERENCES_AT_ONCE, QUERIES_AT_ONCE = 8_192, 2_048


@dataclass(frozen=True, kw_only=True)
class HashMatchStage:
    """The perceptually nearest evaluation image of every image, as it is and mirrored."""

    store: Store
    references: WorkFile
    reach: int
    inputs: tuple[UnitImages, ...]
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 2**30

    def __getstate__(self) -> dict[str, Any]:
        """Workers get a unit's files with the unit; the list of all of them stays with the driver."""
        return {**self.__dict__, "inputs": ()}

    def units(self) -> Sequence[Unit]:
        return [Unit(id=each.id, params={"rows": each.rows, "images": each.images}) for each in self.inputs]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        columns = ("status", "num_rows", "phash", "phash_mirror", "image_offset", "image_size")
        table = read_checked(self.store, unit.params["rows"], columns)
        rows = downloaded_rows(table)
        hashes, is_known = self._hashes(table.take(pa.array(rows, pa.int64())), unit.params["images"])
        index, names = _hash_index(self.store, self.references, self.reach)
        found = [index.nearest(hashes[:, side]) for side in (0, 1)]
        distances, numbers = np.stack([each[0] for each in found]), np.stack([each[1] for each in found])
        distances[:, ~is_known] = -1
        side = np.where(distances < 0, self.reach + 1, distances).argmin(axis=0)
        best, number = distances[side, np.arange(len(rows))], numbers[side, np.arange(len(rows))]
        details = [
            None if bits < 0 else names[at] + (", mirrored" if is_mirrored else "")
            for bits, at, is_mirrored in zip(best.tolist(), number.tolist(), side.tolist(), strict=True)
        ]
        write_scores(output.path(SCORES_FILE), rows, np.where(best < 0, np.nan, best), details)
        output.count("rows", int(np.sum(table["num_rows"].to_numpy()[rows])))
        output.count("images", len(rows))
        output.count("failed", int(np.sum(~is_known)))
        output.count("near", int(np.sum(best >= 0)))

    def _hashes(self, rows: pa.Table, images: WorkFile) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """([N, 2] hashes of each image and of its mirror image, which are known): read, or made where they lack."""
        pairs = list(zip(rows["phash"].to_pylist(), rows["phash_mirror"].to_pylist(), strict=True))
        missing = [place for place, pair in enumerate(pairs) if None in pair]
        if missing:  # imported images may come without
            offsets, sizes = rows["image_offset"].to_pylist(), rows["image_size"].to_pylist()
            with open_images(self.store, images) as tar:
                for place in missing:
                    tar.seek(offsets[place])
                    pixels = decode_rgb(tar.read(sizes[place]))
                    pairs[place] = (None, None) if pixels is None else perceptual_hashes(pixels[..., ::-1].copy())
        is_known = np.array([None not in pair for pair in pairs], bool)
        return np.array([(one or 0, other or 0) for one, other in pairs], np.uint64).reshape(-1, 2), is_known


@dataclass(frozen=True, kw_only=True)
class LikenessStage:
    """The evaluation image whose embedding is nearest to every image's."""

    store: Store
    references: WorkFile
    vectors: WorkFile
    inputs: tuple[Embedded, ...]
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 2 * 2**30

    def __getstate__(self) -> dict[str, Any]:
        """Workers get a unit's files with the unit; the list of all of them stays with the driver."""
        return {**self.__dict__, "inputs": ()}

    def units(self) -> Sequence[Unit]:
        return [Unit(id=each.id, params={"embedded": each}) for each in self.inputs]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        rows, vectors = unit.params["embedded"].read(self.store)
        references, names = _references(self.store, self.references, self.vectors)
        cosines, numbers = most_like(vectors.astype(np.float32), references)
        details = [None if at < 0 else names[at] for at in numbers.tolist()]
        write_scores(output.path(SCORES_FILE), rows, cosines, details)
        output.count("images", len(rows))
        output.count("failed", int(np.sum(numbers < 0)))


def most_like(
    queries_QD: NDArray[np.float32], references_MD: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """([Q] cosine with the reference most like each, [Q] its number); NaN and -1 for a query that is not a number.

    Rows of both are of length 1. A reference that is not a number is never found.
    """
    pieces = [queries_QD[first : first + QUERIES_AT_ONCE] for first in range(0, len(queries_QD), QUERIES_AT_ONCE)]
    found = [_most_like(piece, references_MD) for piece in pieces or [queries_QD]]
    return np.concatenate([cosines for cosines, _ in found]), np.concatenate([numbers for _, numbers in found])


def _most_like(
    queries_QD: NDArray[np.float32], references_MD: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    best = np.full(len(queries_QD), -np.inf, np.float32)
    numbers = np.full(len(queries_QD), -1, np.int64)
    for first in range(0, len(references_MD), REFERENCES_AT_ONCE):
        block = references_MD[first : first + REFERENCES_AT_ONCE].astype(np.float32)
        cosines = queries_QD @ np.nan_to_num(block).T
        cosines[:, np.isnan(block).any(axis=1)] = -np.inf
        place = cosines.argmax(axis=1)
        value = cosines[np.arange(len(cosines)), place]
        is_better = value > best  # false for NaN
        best[is_better], numbers[is_better] = value[is_better], first + place[is_better]
    return np.where(numbers < 0, np.nan, best).astype(np.float32), numbers


@lru_cache(maxsize=2)
def _hash_index(store: Store, references: WorkFile, reach: int) -> tuple[HashIndex, list[str]]:
    table = read_checked(store, references)
    table = table.filter(pc.is_valid(table["phash"]))
    return HashIndex(table["phash"].to_numpy(), reach), _names(table)


@lru_cache(maxsize=2)
def _references(store: Store, references: WorkFile, vectors: WorkFile) -> tuple[NDArray[Any], list[str]]:
    """Embeddings and names; on a local disk the processes of a machine share the one copy in memory."""
    names = _names(read_checked(store, references))
    if store.is_local:
        return np.load(vectors.local(store, Path()), mmap_mode="r"), names
    return np.load(pa.BufferReader(vectors.read(store))), names


def _names(table: pa.Table) -> list[str]:
    return [f"{each}: {name}" for each, name in zip(table["set"].to_pylist(), table["name"].to_pylist(), strict=True)]
