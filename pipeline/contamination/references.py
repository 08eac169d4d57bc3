"""Stages that look at evaluation sets, once for all fetch units.

evaluation-read-<fingerprint>   a unit per part of a set: references.parquet, embeddings.npy
evaluation-<fingerprint>        once: the same two files of all parts, which every matching task reads

    references.parquet   set, name, phash (uint64, null where hashes are not asked for)
    embeddings.npy       float16 [M, D] of length 1; [M, 0] where embeddings are not asked for
    counts               images, unreadable (files that are no image, or that the model could not do)
"""

import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import RunError
from cluster.executor import Unit
from cluster.journal import UnitOutput
from cluster.scratch import scratch_folder
from cluster.store import Store
from pipeline.config import ImageConfig
from pipeline.contamination.sets import EMBEDDING, HASH, IMAGE_SUFFIXES, KEY, NAME_COLUMNS, Part
from pipeline.decode import sniff
from pipeline.images import decode_resized
from pipeline.models.apply import Applied, Values, unit_length
from pipeline.models.config import ModelsConfig
from pipeline.models.spec import Model
from pipeline.picture import ImageError, Pixels
from pipeline.signals import perceptual_hashes
from pipeline.workfile import WorkFile

logger = logging.getLogger(__name__)
REFERENCES_FILE, EMBEDDINGS_FILE = "references.parquet", "embeddings.npy"
REFERENCES = pa.schema([("set", pa.string()), ("name", pa.string()), ("phash", pa.uint64())])


@dataclass(frozen=True, kw_only=True)
class ReadStage:
    """Hashes, and embeddings if there is a model, of the images of every part."""

    store: Store
    parts: tuple[Part, ...]
    image: ImageConfig
    model: Model | None
    config: ModelsConfig
    name: str

    @property
    def num_cpus(self) -> float:
        return self.config.num_cpus

    @property
    def memory_bytes(self) -> int:
        return self.config.memory_mib * 2**20

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "parts": ()}

    def units(self) -> Sequence[Unit]:
        return [Unit(id=f"{index:05}", params={"part": part}) for index, part in enumerate(self.parts)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        part: Part = unit.params["part"]
        names, hashes, embeddings, unreadable = self._table(part) if part.kind == "hashes" else self._images(part)
        sets = [part.set_name] * len(names)
        pq.write_table(pa.table([sets, names, hashes], schema=REFERENCES), output.path(REFERENCES_FILE))
        np.save(output.path(EMBEDDINGS_FILE), embeddings.astype(np.float16))
        output.count("images", len(names))
        output.count("unreadable", unreadable)

    def _images(self, part: Part) -> "_Read":
        known = _known_hashes(part)
        if known and None not in known.values() and not self.model:  # nothing has to be looked at
            return list(known), pa.array(known.values(), pa.uint64()), np.empty((len(known), 0), np.float32), 0
        names: list[str] = []
        hashes: list[int] = []
        found: list[Values] = []
        unreadable = 0
        applied = Applied(model=self.model, ability="embed", threads=self.config.threads) if self.model else None
        pictures = _pictures(part)
        while batch := list(islice(pictures, self.config.batch_size)):
            decoded = [(name, pixels) for name, body in batch if (pixels := self._decode(name, body)) is not None]
            unreadable += len(batch) - len(decoded)
            if not decoded:
                continue
            if applied:
                colours = [np.ascontiguousarray(pixels[..., ::-1]) for _, pixels in decoded]
                found.append(applied(colours, [""] * len(decoded)))
            names += [name for name, _ in decoded]
            hashes += [known.get(name) or perceptual_hashes(pixels)[0] for name, pixels in decoded]
        if applied and found and not any(np.isfinite(values).any() for values in found):
            applied.require_alive()
        width = applied.width if applied else 0
        none = np.empty((0 if applied else len(names), width), np.float32)
        embeddings: Values = np.concatenate([none, *found])
        return names, pa.array(hashes, pa.uint64()), embeddings, unreadable

    def _decode(self, name: str, body: bytes) -> Pixels | None:
        """Pixels as the build would store them, blue green red."""
        try:
            return decode_resized(body, sniff(body), self.image)[1]
        except (Exception, MemoryError) as error:
            said = error.detail if isinstance(error, ImageError) else f"{type(error).__name__}: {error}"
            logger.warning("evaluation image %s cannot be read: %s", name, said)
            return None

    def _table(self, part: Part) -> "_Read":
        url = part.urls[0]
        with fsspec.open(url, "rb").open() as file:
            table = pq.read_table(file)
        named = next((column for column in NAME_COLUMNS if column in table.column_names), None)
        names = [str(value) for value in table[named].to_pylist()] if named else [str(n) for n in range(len(table))]
        hashes = table[HASH].combine_chunks() if HASH in table.column_names else pa.nulls(len(table), pa.uint64())
        embeddings = np.empty((len(table), 0), np.float32)
        if self.model:
            width = int(self.model.load(self.config.threads).dimension)
            rows = table[EMBEDDING].to_pylist()
            for row in rows:
                if row is not None and len(row) != width:
                    raise RunError(f"{KEY}: {url}: an embedding of {len(row)} numbers; {self.model.text} makes {width}")
            filled = [[np.nan] * width if row is None else row for row in rows]
            embeddings = unit_length(np.asarray(filled, np.float32).reshape(-1, width))
        return names, hashes, embeddings, 0


_Read = tuple[list[str], pa.Array, Values, int]
"""names, hashes, embeddings, number of files that could not be read"""


@dataclass(frozen=True, kw_only=True)
class GatherStage:
    """All references in one place. RunError for a set of which nothing could be read, or compared as it has to be."""

    store: Store
    set_names: tuple[str, ...]
    """of every part"""
    files: tuple[tuple[WorkFile, WorkFile], ...]
    """references and embeddings of every part"""
    by_hash: bool
    by_embedding: bool
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 2 * 2**30

    def units(self) -> Sequence[Unit]:
        return [Unit(id="all")]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        tables = [pq.read_table(pa.BufferReader(references.read(self.store))) for references, _ in self.files]
        table = pa.concat_tables(tables)
        read = set(table["set"].to_pylist())
        if missing := sorted(set(self.set_names) - read):
            raise RunError(f"{KEY}: none of the images of {', '.join(missing)} can be read")
        embeddings = np.concatenate([np.load(pa.BufferReader(vectors.read(self.store))) for _, vectors in self.files])
        if self.by_hash:
            self._require_some(table, table[HASH].is_valid().to_numpy(), "hash")
        if self.by_embedding:
            self._require_some(table, np.isfinite(embeddings).all(axis=1), "embedding")
        pq.write_table(table, output.path(REFERENCES_FILE))
        np.save(output.path(EMBEDDINGS_FILE), embeddings)
        output.count("images", table.num_rows)

    def _require_some(self, table: pa.Table, is_usable: NDArray[np.bool_], what: str) -> None:
        usable = set(table["set"].filter(pa.array(is_usable)).to_pylist())
        if useless := sorted(set(self.set_names) - usable):
            raise RunError(f"{KEY}: {', '.join(useless)}: no image has {'an' if what[0] == 'e' else 'a'} {what}")


def _known_hashes(part: Part) -> dict[str, int | None]:
    """{member of the tar: its hash} as a shard's own table has them; empty for other parts, and older datasets."""
    if part.kind != "shard":
        return {}
    with fsspec.open(part.urls[1], "rb").open() as file:
        table = pq.ParquetFile(file)
        if not {"key", "image_format", HASH} <= set(table.schema_arrow.names):
            return {}
        rows = table.read(["key", "image_format", HASH]).to_pylist()
    return {f"{row['key']}.{row['image_format']}": row[HASH] for row in rows}


def _pictures(part: Part) -> Iterator[tuple[str, bytes]]:
    """(name, encoded image) of a part's images."""
    if part.kind == "images":
        for url in part.urls:
            with fsspec.open(url, "rb").open() as file:
                yield url.rpartition("/")[2], file.read()
        return
    with scratch_folder() as folder:
        copy = folder / "set.tar"
        with fsspec.open(part.urls[0], "rb").open() as remote, open(copy, "wb") as local:
            while piece := remote.read(4 * 2**20):
                local.write(piece)
        with tarfile.open(copy) as tar:
            for member in tar:
                is_image = member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES)
                if is_image and (opened := tar.extractfile(member)):
                    yield member.name, opened.read()
