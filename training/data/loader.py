"""Batches of one rank, prefetched by threads, the same ones whatever the number of threads, ranks or restarts.

A sample whose image cannot be decoded is replaced by the next row that can: a pure function of the data, so the run
stays reproducible. It is counted and named at the end of the run; a long stretch of bad samples ends the run.

Legend: B samples of this rank, S side of the stored square.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import RunError
from training.data.dataset import Dataset, Sample
from training.data.image import BadImageError, Pixels, decode_square
from training.data.order import rank_slice
from training.data.sources import Samples

logger = logging.getLogger(__name__)

MAX_BAD_IN_A_ROW = 64


@dataclass(frozen=True, kw_only=True)
class HostBatch:
    """One rank's share of a step, in host memory."""

    step: int
    images: Tensor
    """uint8 [B, S, S, 3], RGB."""
    captions: list[str]
    uids: list[str]
    sample_ids: Tensor
    """int64 [B]."""
    labels: Tensor
    """int64 [B]: number of each sample's class, -1 where it has none."""
    epoch: Tensor
    """int64 [B]."""
    num_replaced: int
    """Samples of this batch whose own image could not be decoded."""


class ImageReader:
    """Decoded squares by row, kept in memory while they fit."""

    def __init__(self, dataset: Samples, side: int, cache_bytes: int) -> None:
        """side: of the squares, in pixels. cache_bytes: keep squares if those of the whole dataset fit into it."""
        self.dataset, self.side = dataset, side
        shape = (len(dataset), side, side, 3)
        keep = 0 < int(np.prod(shape)) <= cache_bytes
        # Memory is taken as rows are first written, not here.
        self._cache: Pixels | None = np.empty(shape, dtype=np.uint8) if keep else None
        self._standing_in: dict[int, int] = {}
        self.bad: dict[str, str] = {}
        """Images that could not be decoded: the reason by "shard key"."""
        self._cached = np.zeros(len(dataset) if keep else 0, dtype=bool)

    def read(self, row: int, into: Pixels) -> tuple[Sample, bool]:
        """Write a row's square into `into` [S, S, 3]; returns the sample that was used, and whether it stands in.

        Raises RunError if it and the next rows are all bad.
        """
        used = self._standing_in.get(row, row)
        for _ in range(MAX_BAD_IN_A_ROW):
            try:
                sample = self.dataset.sample(used)
                into[:] = self._square(sample)
            except BadImageError as error:
                tar, _ = self._where(sample)
                logger.info("bad image shard=%s key=%s row=%d: %s", tar, sample.key, used, error)
                self.bad[f"{tar} {sample.key}"] = str(error)
                used = self.dataset.next_row(used)
                continue
            if used != row:
                self._standing_in[row] = used
            return sample, used != row
        tar, dataset = self._where(sample)
        raise RunError(
            f"{dataset.store.url_of(tar)}: sample {sample.key} and {MAX_BAD_IN_A_ROW - 1} before it "
            f"cannot be decoded; run `pairmill verify {dataset.url}`"
        )

    def _where(self, sample: Sample) -> tuple[str, Dataset]:
        """The tar that a sample lies in, relative to its dataset, and the dataset."""
        dataset = self.dataset.dataset_of(sample)
        return dataset.manifest.shards[sample.shard].tar.path, dataset

    def _square(self, sample: Sample) -> Pixels:
        if self._cache is not None and self._cached[sample.row]:
            cached: Pixels = self._cache[sample.row]
            return cached
        data = self.dataset.image_bytes(sample)
        if len(data) < sample.image_size:
            raise BadImageError(f"{len(data)} of {sample.image_size} bytes are there")
        pixels = decode_square(data, sample.image_format, self.side)
        if self._cache is not None:
            self._cache[sample.row] = pixels
            self._cached[sample.row] = True
        return pixels


class Loader:
    """Iterates over a rank's batches of steps `start_step` .. `num_steps` - 1. Use as a context manager."""

    def __init__(
        self,
        reader: ImageReader,
        *,
        seed: int,
        batch_size: int,
        start_step: int,
        num_steps: int,
        rank: int = 0,
        num_ranks: int = 1,
        workers: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """batch_size: of all ranks together. workers: threads that read and decode. prefetch: batches held ready."""
        cv2.setNumThreads(0)  # the workers are the parallelism
        self.reader = reader
        self._seed, self._batch_size = seed, batch_size
        self._part = rank_slice(batch_size, rank, num_ranks)
        self._steps = range(start_step, num_steps)
        self._pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers > 1 else None
        self._ready: queue.Queue[HostBatch | BaseException | None] = queue.Queue(maxsize=max(1, prefetch))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        self.waited_s = 0.0

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._drain()
        self._thread.join()
        if self._pool:
            self._pool.shutdown()
        self.reader.dataset.close()

    def __iter__(self) -> Iterator[HostBatch]:
        """The batches in step order; `waited_s` grows by the time that the caller had to wait for them."""
        while True:
            started = time.perf_counter()
            item = self._ready.get()
            self.waited_s += time.perf_counter() - started
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _fill(self) -> None:
        end: BaseException | None = None
        try:
            for step in self._steps:
                if self._closing.is_set():
                    return
                self._put(self._batch(step))
        except BaseException as error:  # it has to reach the trainer's thread, whatever it is
            end = error
        self._put(end)

    def _put(self, item: HostBatch | BaseException | None) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _drain(self) -> None:
        while not self._ready.empty():
            self._ready.get_nowait()

    def examples(self, num: int) -> HostBatch:
        """At most `num` samples, evenly spread over the first global batch; the same ones on every rank."""
        rows, epochs = self.reader.dataset.batch_at(self._seed, 0, self._batch_size)
        chosen = np.linspace(0, len(rows), min(num, len(rows)), endpoint=False).astype(np.int64)
        return self._collect(0, rows[chosen], epochs[chosen])

    def _batch(self, step: int) -> HostBatch:
        rows, epochs = self.reader.dataset.batch_at(self._seed, step, self._batch_size)
        return self._collect(step, rows[self._part], epochs[self._part])

    def _collect(self, step: int, rows_B: NDArray[np.int64], epochs_B: NDArray[np.int64]) -> HostBatch:
        side = self.reader.side
        images_BSS3 = torch.empty((len(rows_B), side, side, 3), dtype=torch.uint8, pin_memory=self._pin_memory)
        read = self._read_all(rows_B, images_BSS3.numpy())
        samples = [sample for sample, _ in read]
        return HostBatch(
            step=step,
            images=images_BSS3,
            captions=[sample.caption for sample in samples],
            uids=[sample.uid for sample in samples],
            sample_ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
            labels=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
            epoch=torch.from_numpy(epochs_B.copy()),
            num_replaced=sum(replaced for _, replaced in read),
        )

    def _read_all(self, rows_B: NDArray[np.int64], images: NDArray[Any]) -> Sequence[tuple[Sample, bool]]:
        def read(place: int) -> tuple[Sample, bool]:
            return self.reader.read(int(rows_B[place]), images[place])

        places = range(len(rows_B))
        return list(self._pool.map(read, places)) if self._pool else [read(place) for place in places]
