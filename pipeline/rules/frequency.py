"""How many pairs have the same caption, over all lists: exact, in bounded memory, whatever the number of workers.

Stages between plan-read and plan-order, only with `curate.max_caption_pairs`:
    caption-keys     a range of the order -> keys.bin: the captions of its pairs, each with how many have it; a bucket
                     per partition of the captions' hashes
    caption-counts   a partition -> counts.bin: the captions that several pairs have, with how many in all; a bucket per
                     range that has the caption
plan-order reads its range's bucket of every partition. A caption is known by 128 bits of its hash; one that ten million
pairs have is one record of each range.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.executor import Unit
from cluster.journal import Marker, UnitOutput
from cluster.store import Store
from pipeline.buckets import Records, read_bucket, read_buckets, write_buckets
from pipeline.identity import keys_of_text
from pipeline.rules import text
from pipeline.rules.base import Scores
from pipeline.rules.captions import CAPTION_PAIRS
from pipeline.runs import read_range

KEY = np.dtype([("caption", "S16"), ("pairs", "<u8")])
"""A caption's hash (its bytes in order), and a number of pairs."""
_COLUMNS = ("order", "uid", "caption", "reason")
_NONE = np.zeros(16, np.uint8).view("S16")
"""Of the empty caption, which is not counted."""


@dataclass(frozen=True, kw_only=True)
class Frequencies:
    """What plan-order reads: every partition's file, with a bucket of KEY per range."""

    files: tuple[str, ...]
    num_ranges: int

    def of_range(self, store: Store, index: int) -> Records:
        """The captions of one range that several pairs have, in the order of their hashes."""
        return read_buckets(store, self.files, index, self.num_ranges, KEY)


@dataclass(frozen=True, kw_only=True)
class KeysStage:
    """Stage `caption-keys`. runs: the planned rows of every source. ranges: plan-order's units."""

    store: Store
    runs: tuple[str, ...]
    ranges: tuple[Unit, ...]
    partitions: int
    memory_bytes: int
    name: str = "caption-keys"
    num_cpus: float = 1.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ranges": ()}

    def units(self) -> tuple[Unit, ...]:
        return self.ranges

    def run(self, unit: Unit, output: UnitOutput) -> None:
        first, last = unit.params["first"], unit.params["last"]
        parts = [part for run in self.runs for part in read_range(self.store, run, first, last, _COLUMNS)]
        table = pa.concat_tables(parts)
        table = table.filter(table.column("reason").is_null())
        _, firsts = np.unique(keys_of_text(table.column("uid").combine_chunks()), axis=0, return_index=True)
        hashes = hashes_of(table.take(pa.array(firsts)))
        keys = _summed(hashes[hashes != _NONE], None)
        write_buckets(output.path("keys.bin"), keys, _partition(keys, self.partitions), self.partitions)
        output.count("pairs", len(hashes))


@dataclass(frozen=True, kw_only=True)
class CountsStage:
    """Stage `caption-counts`. keys: the files of `caption-keys`, in the order of their ranges."""

    store: Store
    keys: tuple[str, ...]
    partitions: int
    memory_bytes: int
    name: str = "caption-counts"
    num_cpus: float = 1.0

    def units(self) -> tuple[Unit, ...]:
        return tuple(Unit(id=f"{index:05}", params={"partition": index}) for index in range(self.partitions))

    def run(self, unit: Unit, output: UnitOutput) -> None:
        partition = unit.params["partition"]
        parts = [read_bucket(self.store, path, partition, self.partitions, KEY) for path in self.keys]
        keys = np.concatenate([np.empty(0, KEY), *parts])
        totals = _summed(keys["caption"], keys["pairs"])
        keys["pairs"] = totals["pairs"][np.searchsorted(totals["caption"], keys["caption"])]
        ranges = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        is_shared = keys["pairs"] > 1
        write_buckets(output.path("counts.bin"), keys[is_shared], ranges[is_shared], len(self.keys))
        output.count("captions", int((totals["pairs"] > 1).sum()))


def count_captions(
    store: Store,
    runs: tuple[str, ...],
    ranges: Sequence[Unit],
    memory_bytes: int,
    run_stage: Callable[[Any], Mapping[str, Marker]],
) -> Frequencies:
    """Run both stages. A partition has at most about as many captions as a range has rows."""
    partitions = len(ranges)
    keys = run_stage(
        KeysStage(store=store, runs=runs, ranges=tuple(ranges), partitions=partitions, memory_bytes=memory_bytes)
    )
    files = tuple(marker.path_of("keys.bin") for marker in keys.values())
    counts = run_stage(CountsStage(store=store, keys=files, partitions=partitions, memory_bytes=memory_bytes))
    return Frequencies(files=tuple(marker.path_of("counts.bin") for marker in counts.values()), num_ranges=len(ranges))


def hashes_of(rows: pa.Table) -> NDArray[np.bytes_]:
    """[N] 128 bits of the hash of each caption, case and blanks evened out."""
    digest = partial(blake2b, digest_size=KEY["caption"].itemsize)
    plain = text.plain(text.captions(rows)).to_pylist()
    joined = b"".join(digest(caption.encode()).digest() if caption else bytes(16) for caption in plain)
    return np.frombuffer(joined, KEY["caption"])


def pairs_of(hashes: NDArray[np.bytes_], known: Records) -> Scores:
    """[N] how many pairs have each caption: as `known` says, 1 where it does not know, 0 for the empty one."""
    pairs = np.where(hashes == _NONE, 0.0, 1.0)
    if len(known):
        places = np.minimum(np.searchsorted(known["caption"], hashes), len(known) - 1)
        is_known = known["caption"][places] == hashes
        pairs[is_known] = known["pairs"][places[is_known]]
    return pairs


def with_pairs(rows: pa.Table, known: Records) -> pa.Table:
    """The rows with the column that `captions.CaptionFrequency` reads."""
    return rows.append_column(CAPTION_PAIRS, pa.array(pairs_of(hashes_of(rows), known)))


def _summed(captions: NDArray[np.bytes_], pairs: NDArray[np.uint64] | None) -> Records:
    """Every caption once, in order, with the sum of its pairs; None: each counts once."""
    order = np.argsort(captions, kind="stable")
    ordered = captions[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
    keys = np.empty(len(first), KEY)
    keys["caption"] = ordered[first]
    each = np.ones(len(ordered), np.uint64) if pairs is None else pairs[order]
    keys["pairs"] = np.add.reduceat(each, first) if len(first) else 0
    return keys


def _partition(keys: Records, count: int) -> NDArray[np.int64]:
    """The partition of each key: the hash space cut into equal ranges, in order."""
    head = np.ascontiguousarray(keys["caption"]).view(np.uint8).reshape(-1, 16)[:, :4].copy().view(">u4")[:, 0]
    return (head.astype(np.uint64) * np.uint64(count) >> np.uint64(32)).astype(np.int64)
