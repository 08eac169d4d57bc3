"""What a run reads: one dataset, or several at fixed shares of a batch (captions from one, categories from another).

With several, a global batch is the concatenation of each source's own part, in the order of the sources. A source is
read in its own order and counts its own epochs, so the batch of a step stays a pure function of (seed, step).

Legend: B samples of a global batch, K sources.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from cluster.config import REQUIRED, Config, StringList, key
from cluster.errors import RequestError
from training.data.dataset import Dataset, Sample
from training.data.labels import class_names
from training.data.order import Ints


class SourceConfig(Config):
    """A dataset and what is taken from it."""

    dataset: str = key(REQUIRED, "folder or URL of a finished dataset (the output of pairmill build)")
    select: StringList = key(
        [], "conditions that all samples must meet, on the shards' columns: style!=a|b, group=animals, width>=64"
    )
    caption_column: str = key("caption", "column that the captions are taken from; empty: samples without captions")
    label_column: str = key("", "column whose distinct values are the classes; empty: samples without categories")
    weight: float | None = key(
        None, "share of each batch relative to the other sources' weights; null: the number of its samples", gt=0
    )


class Samples(Protocol):
    """Numbered samples, from one dataset or several."""

    @property
    def url(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def sample(self, row: int) -> Sample: ...
    def image_bytes(self, sample: Sample) -> bytes: ...
    def batch_at(self, seed: int, step: int, batch_size: int) -> tuple[Ints, Ints]: ...
    def dataset_of(self, sample: Sample) -> Dataset: ...
    def next_row(self, row: int) -> int: ...
    def captions(self) -> list[str]: ...
    def close(self) -> None: ...


class Mixture:
    """Samples of several datasets, numbered through: the rows of the first, then those of the second, ..."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        """weights: each dataset's share of a batch, relative to the others'."""
        self.datasets, self._weights = tuple(datasets), tuple(weights)
        self._first_row = np.cumsum([0, *(len(dataset) for dataset in datasets)])

    @property
    def url(self) -> str:
        """The places of the datasets."""
        return " + ".join(dataset.url for dataset in self.datasets)

    @property
    def fingerprint(self) -> str:
        """sha256 over the datasets' fingerprints."""
        return hashlib.sha256(" ".join(dataset.fingerprint for dataset in self.datasets).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def sample(self, row: int) -> Sample:
        """The sample of a row. Raises IndexError outside 0 .. len - 1."""
        source = self._source(row)
        return replace(self.datasets[source].sample(row - int(self._first_row[source])), row=row)

    def image_bytes(self, sample: Sample) -> bytes:
        """The encoded image of a sample."""
        return self.dataset_of(sample).image_bytes(sample)

    def batch_at(self, seed: int, step: int, batch_size: int) -> tuple[Ints, Ints]:
        """(rows [B], epochs [B]) of the global batch of a step; epochs are those of each sample's own source."""
        sizes = shares(self._weights, batch_size)
        # The seed moves with the source: sources of one size must not be read in one and the same order.
        parts = [
            dataset.batch_at(seed + number, step, size)
            for number, (dataset, size) in enumerate(zip(self.datasets, sizes, strict=True))
        ]
        rows = [rows + first for (rows, _), first in zip(parts, self._first_row, strict=False)]
        return np.concatenate(rows), np.concatenate([epochs for _, epochs in parts])

    def dataset_of(self, sample: Sample) -> Dataset:
        """The dataset that a sample lies in."""
        return self.datasets[self._source(sample.row)]

    def next_row(self, row: int) -> int:
        """The row that stands in for a bad one: the next of the same dataset."""
        source = self._source(row)
        first = int(self._first_row[source])
        return first + self.datasets[source].next_row(row - first)

    def captions(self) -> list[str]:
        """All captions of the datasets that have some."""
        return [caption for dataset in self.datasets for caption in dataset.captions()]

    def close(self) -> None:
        """Close what is open; the datasets can still be used."""
        for dataset in self.datasets:
            dataset.close()

    def _source(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return int(np.searchsorted(self._first_row, row, side="right")) - 1


def shares(weights: Sequence[float], batch_size: int) -> list[int]:
    """How many of a batch's samples each source gives: by the largest remainder, ties to the first."""
    exact = np.asarray(weights, dtype=np.float64) * batch_size / np.sum(weights)
    sizes = np.floor(exact + 1e-9).astype(np.int64)
    missing = batch_size - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:missing]] += 1
    return [int(size) for size in sizes]


def open_sources(sources: Sequence[SourceConfig], classes: Sequence[str] = ()) -> Dataset | Mixture:
    """Open what a run reads; classes: the names that labels are numbers of, see `classes_of`.

    Raises RequestError if a dataset is not there or lacks a column that is used.
    """
    datasets = [
        Dataset(
            source.dataset,
            select=source.select,
            caption_column=source.caption_column,
            label_column=source.label_column,
            classes=classes,
        )
        for source in sources
    ]
    if len(datasets) == 1:
        return datasets[0]
    weights = [
        len(dataset) if source.weight is None else source.weight
        for source, dataset in zip(sources, datasets, strict=True)
    ]
    return Mixture(datasets, weights)


def classes_of(sources: Sequence[SourceConfig]) -> tuple[str, ...]:
    """The classes that all sources' label columns name together; one pass over those columns."""
    values: list[Any] = []
    for source in sources:
        if source.label_column:
            values += set(Dataset(source.dataset, select=source.select, caption_column="").column(source.label_column))
    return class_names(values)


def check_sources(sources: Sequence[SourceConfig], samples: Dataset | Mixture, batch_size: int) -> None:
    """Raise RequestError, naming the keys, unless every source has something to give to a batch."""
    if not isinstance(samples, Mixture):
        return
    given = [source.weight is None for source in sources]
    if any(given) and not all(given):
        raise RequestError("data.weight: give one to data.dataset and to every one of data.extra, or to none")
    weights = [source.weight or len(dataset) for source, dataset in zip(sources, samples.datasets, strict=True)]
    for number, (dataset, size) in enumerate(zip(samples.datasets, shares(weights, batch_size), strict=True)):
        where = "data.dataset" if number == 0 else f"data.extra[{number - 1}].dataset"
        if not len(dataset):
            raise RequestError(f"{where}: no sample of {dataset.url} meets its select")
        if size == 0:
            raise RequestError(
                f"{where}: weight {weights[number]:g} of {sum(weights):g} gives it none of the {batch_size} samples of "
                "a batch; make its weight or train.batch_size larger"
            )


def check_labels(sources: Sequence[SourceConfig], classes: Sequence[str]) -> None:
    """Raise RequestError, naming the column, when a label column is given and tells no two classes apart."""
    columns = sorted({source.label_column for source in sources if source.label_column})
    if columns and len(classes) < 2:
        found = f"only the class {classes[0]}" if classes else "no class"
        raise RequestError(f"data.label_column={'|'.join(columns)}: the selected samples hold {found}")
