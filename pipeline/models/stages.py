"""Stages that run a model over every downloaded image of a fetch unit, whatever the rules say of its row.

Their names end in the model's fingerprint and their outputs depend on no threshold: a build that asks for the same
model again, or for another threshold, finds them done.

score-<fingerprint>   scores.parquet (pipeline.models.measured)
embed-<fingerprint>   embeddings.npy   float16 [N, D], rows of length 1; NaN where the model failed
                      rows.npy         int32 [N] the rows' numbers in their unit, ascending
Counts of both: rows (input rows), images, failed (images that the model, or the decoder, could not do)
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.executor import Unit
from cluster.journal import Marker, UnitOutput
from cluster.store import Store
from pipeline.manifest import Shard
from pipeline.models.apply import Applied, Values, in_batches
from pipeline.models.config import ModelsConfig
from pipeline.models.images import Stored, batches
from pipeline.models.measured import SCORES_FILE, write_scores
from pipeline.models.spec import Ability, Model
from pipeline.rules.measured import Measured
from pipeline.selection import open_images, read_checked
from pipeline.workfile import WorkFile

EMBEDDINGS_FILE, ROWS_FILE = "embeddings.npy", "rows.npy"
_READ = ("caption", "width", "height", "image_offset", "image_size")
_READ_OF_FETCHED = ("status", "num_rows")
"""A shard's table does not have these: all its rows have an image."""


@dataclass(frozen=True, kw_only=True)
class UnitImages:
    """Where the rows and the images of one fetch unit, or shard, lie."""

    id: str
    rows: WorkFile
    images: WorkFile

    @staticmethod
    def of(fetched: Marker) -> "UnitImages":
        return UnitImages(
            id=fetched.unit, rows=WorkFile.of(fetched, "rows.parquet"), images=WorkFile.of(fetched, "images.tar")
        )

    @staticmethod
    def of_shard(shard: Shard) -> "UnitImages":
        """A shard's samples, which are all there."""
        unit = f"{shard.index:05}"
        rows, images = (
            WorkFile(stage="pack", unit=unit, path=file.path, sha256=file.sha256) for file in (shard.parquet, shard.tar)
        )
        return UnitImages(id=unit, rows=rows, images=images)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Where the embeddings of one fetch unit lie."""

    id: str
    rows: WorkFile
    vectors: WorkFile
    size_bytes: int
    """of the vectors"""

    @staticmethod
    def of(marker: Marker) -> "Embedded":
        return Embedded(
            id=marker.unit,
            rows=WorkFile.of(marker, ROWS_FILE),
            vectors=WorkFile.of(marker, EMBEDDINGS_FILE),
            size_bytes=next(output.size_bytes for output in marker.outputs if output.name == EMBEDDINGS_FILE),
        )

    def read(self, store: Store) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
        """([N] row numbers in the unit, [N, D] rows of length 1, NaN where the model failed)."""
        rows: NDArray[np.int32] = np.load(io.BytesIO(self.rows.read(store)))
        vectors: NDArray[np.float16] = np.load(io.BytesIO(self.vectors.read(store)))
        return rows.astype(np.int64), vectors


@dataclass(frozen=True, kw_only=True)
class ModelStage:
    """Base of both stages: `run` measures, `_write` says what becomes of it."""

    store: Store
    model: Model
    ability: Ability
    config: ModelsConfig
    inputs: tuple[UnitImages, ...]
    name: str

    @property
    def num_cpus(self) -> float:
        return self.config.num_cpus

    @property
    def memory_bytes(self) -> int:
        return self.config.memory_mib * 2**20

    def __getstate__(self) -> dict[str, Any]:
        """Workers get a unit's files with the unit; the list of all of them stays with the driver."""
        return {**self.__dict__, "inputs": ()}

    def units(self) -> Sequence[Unit]:
        return [Unit(id=each.id, params={"rows": each.rows, "images": each.images}) for each in self.inputs]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        table = read_checked(self.store, unit.params["rows"], _READ, _READ_OF_FETCHED)
        numbers = downloaded_rows(table)
        rows = table.take(pa.array(numbers, pa.int64()))
        applied = Applied(model=self.model, ability=self.ability, threads=self.config.threads)
        values = self._measure(applied, unit.params["images"], stored_images(rows))
        failed = ~np.isfinite(values).all(axis=1)
        self._write(output, numbers, values)
        output.count(
            "rows", int(np.sum(rows["num_rows"].to_numpy())) if "num_rows" in rows.schema.names else len(numbers)
        )
        output.count("images", len(numbers))
        output.count("failed", int(failed.sum()))

    def _measure(self, applied: Applied, images: WorkFile, stored: Sequence[Stored]) -> Values:
        values = np.full((len(stored), applied.width), np.nan, np.float32)
        with open_images(self.store, images) as tar:
            for batch in batches(tar, stored, self.config.batch_size):
                found = in_batches(applied, batch.images, batch.captions, applied.width)
                values[batch.first : batch.first + len(found)] = found
        if len(stored) and not np.isfinite(values).all(axis=1).any():
            applied.require_alive()
        return values

    def _write(self, output: UnitOutput, rows: NDArray[np.int64], values: Values) -> None:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ScoreStage(ModelStage):
    """A number for every downloaded image, or for it with its caption."""

    def _write(self, output: UnitOutput, rows: NDArray[np.int64], values: Values) -> None:
        write_scores(output.path(SCORES_FILE), rows, values[:, 0])


@dataclass(frozen=True, kw_only=True)
class EmbedStage(ModelStage):
    """A point for every downloaded image."""

    def _write(self, output: UnitOutput, rows: NDArray[np.int64], values: Values) -> None:
        np.save(output.path(EMBEDDINGS_FILE), values.astype(np.float16))
        np.save(output.path(ROWS_FILE), rows.astype(np.int32))


def downloaded_rows(table: pa.Table) -> NDArray[np.int64]:
    """Numbers of the rows that have an image."""
    if "status" not in table.schema.names:
        return np.arange(table.num_rows)
    return np.flatnonzero([status == "ok" for status in table["status"].to_pylist()])


def stored_images(rows: pa.Table) -> list[Stored]:
    """Where the images of these rows lie; `rows` are of rows.parquet or of a shard's table."""
    columns = [rows[name].to_pylist() for name in ("image_offset", "image_size", "width", "height", "caption")]
    return [
        Stored(offset=offset, size_bytes=size, num_pixels=(width or 0) * (height or 0), caption=caption or "")
        for offset, size, width, height, caption in zip(*columns, strict=True)
    ]


def measured_column(column: str, markers: Mapping[str, Marker]) -> Measured:
    """What a stage has measured, as the rules' column of this name."""
    return Measured(column=column, files=tuple(WorkFile.of(marker, SCORES_FILE) for marker in markers.values()))
