"""Steps exact, url and pair: of all samples with the same bytes, URL, or bytes and caption, one is kept.

Which one does not depend on groups, partitions or workers: the best by `dedup.prefer`, a known sample before any other.
A step sees what those before it have left: a sample may represent others and be dropped by a later step, and whoever
represents it then stands for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.executor import Unit
from cluster.journal import UnitOutput
from cluster.store import Store
from pipeline.buckets import read_buckets
from pipeline.config import preferences
from pipeline.curation.context import Context, Curated
from pipeline.duplicates.exchange import (
    ROWS_PER_PARTITION,
    facts_tasks,
    finish,
    make_drops,
    num_partitions,
    paths_of,
    write_drops,
)
from pipeline.duplicates.keys import (
    BYTES,
    BYTES_AND_CAPTION,
    KEY,
    KEY_WITHOUT_RANK,
    URL,
    Criterion,
    KeysStage,
    KnownKeysStage,
    find_duplicates,
)
from pipeline.reasons import Reason
from pipeline.selection import KNOWN, Drops, Groups


def drop_exact(context: Context, curated: Curated) -> Drops | None:
    """Step of curation: of equal bytes one sample stays."""
    if not context.config.dedup.exact:
        return None
    return drop_same(context, curated, BYTES, "exact", "dedup.exact", Reason.DUPLICATE_BYTES)


def drop_same_url(context: Context, curated: Curated) -> Drops | None:
    """Step of curation: of equal URLs one sample stays."""
    if not context.config.dedup.by_url:
        return None
    return drop_same(context, curated, URL, "url", "dedup.by_url", Reason.DUPLICATE_URL)


def drop_same_bytes_and_caption(context: Context, curated: Curated) -> Drops | None:
    """Step of curation: of equal bytes with equal captions one sample stays."""
    if not context.config.dedup.by_bytes_and_caption:
        return None
    return drop_same(context, curated, BYTES_AND_CAPTION, "pair", "dedup.by_bytes_and_caption", Reason.DUPLICATE_PAIR)


def drop_same(context: Context, curated: Curated, criterion: Criterion, name: str, rule: str, reason: Reason) -> Drops:
    """The three stages of one criterion."""
    partitions = num_partitions(context.num_known + sum(curated.num_kept))
    prefer = preferences(context.config)
    has_ranks = bool(prefer or context.known)
    stage = KeysStage(
        store=context.store,
        tasks=facts_tasks(curated),
        drops=curated.drops,
        criterion=criterion,
        prefer=prefer if has_ranks else None,
        partitions=partitions,
        name=context.name(f"{name}-keys"),
    )
    keys = context.run_stage(stage)
    known: tuple[str, ...] = ()
    if context.known:
        known_keys = KnownKeysStage(
            store=context.store,
            shards=context.known,
            facts_dtype=curated.facts_dtype,
            criterion=criterion,
            partitions=partitions,
            name=context.name(f"{name}-known"),
        )
        known = paths_of(context.run_stage(known_keys), "keys.bin")
    drops = DropsStage(
        store=context.store,
        keys=(*known, *paths_of(keys, "keys.bin")),
        dtype=KEY if has_ranks else KEY_WITHOUT_RANK,
        partitions=partitions,
        groups=curated.groups,
        name=context.name(f"{name}-drops"),
    )
    found = paths_of(context.run_stage(drops), "drops.bin")
    repeats = paths_of(keys, "repeats.bin")
    return finish(context, curated, found, name=name, rule=rule, reason=reason, repeats=repeats)


@dataclass(frozen=True, kw_only=True)
class DropsStage:
    """A unit is a range of the keys' space.

    drops.bin   `DROP`, a bucket per group
    counts      dropped
    """

    store: Store
    keys: tuple[str, ...]
    dtype: np.dtype[Any]
    partitions: int
    groups: Groups
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = ROWS_PER_PARTITION * KEY.itemsize * 8

    def units(self) -> Sequence[Unit]:
        return [Unit(id=f"{index:05}", params={"partition": index}) for index in range(self.partitions)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        keys = read_buckets(self.store, self.keys, unit.params["partition"], self.partitions, self.dtype)
        dropped, representatives = find_duplicates(keys)
        is_new = np.flatnonzero(dropped["unit"] != KNOWN)
        drops = make_drops(dropped.take(is_new), representatives.take(is_new))
        write_drops(output.path("drops.bin"), drops, self.groups)
        output.count("dropped", len(drops))
