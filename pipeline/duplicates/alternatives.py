"""Captions of dropped duplicates, kept with the sample that represents them: other ways to say what the image shows.

For each step that drops duplicates, in order, two stages over groups of fetch units (see `exchange`):

    captions-<n>-out   a group's dropped rows: their captions, and those that they have gathered so far -> to the groups
                       of the samples that represent them
    captions-<n>-in    a group's samples: what has come for each of them, a bucket per fetch unit

So captions follow a sample that is dropped by a later step to its own representative. A sample keeps the captions of
the `MAX_CAPTIONS` smallest uids; as every stage keeps no more, ten million copies of an image cost no memory. Samples
that are in a dataset already get none: its shards are not touched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from cluster.executor import Unit
from cluster.journal import UnitOutput
from cluster.store import Store
from pipeline.buckets import Records, read_bucket
from pipeline.curation.context import Context, Curated
from pipeline.duplicates.captions import NO_CAPTIONS, Alternatives, best_captions, read_captions, write_captions
from pipeline.duplicates.exchange import group_tasks, paths_of
from pipeline.reasons import Reason
from pipeline.selection import KNOWN, Drops, Groups, read_checked

STEPS = (Reason.DUPLICATE_BYTES, Reason.DUPLICATE_URL, Reason.DUPLICATE_PAIR, Reason.NEAR_DUPLICATE)
"""Reasons whose dropped captions say something of the sample that is kept."""


def gather(context: Context, curated: Curated) -> Alternatives:
    """Alternatives of all samples that are kept."""
    gathered: list[tuple[str, ...]] = []
    for number, drops in enumerate(step for step in curated.drops if step.reason in STEPS):
        sent = OutStage(
            store=context.store,
            tasks=group_tasks(curated, lambda unit: unit.rows),
            drops=drops,
            gathered=tuple(gathered),
            name=context.name(f"captions-{number}-out"),
        )
        received = InStage(
            store=context.store,
            sent=paths_of(context.run_stage(sent), "captions.bin"),
            groups=curated.groups,
            name=context.name(f"captions-{number}-in"),
        )
        gathered.append(paths_of(context.run_stage(received), "captions.bin"))
    return Alternatives(paths=tuple(gathered), groups=curated.groups)


@dataclass(frozen=True, kw_only=True)
class OutStage:
    """A unit is a group of fetch units. gathered: of every earlier step the files of all groups."""

    store: Store
    tasks: tuple[Unit, ...]
    drops: Drops
    gathered: tuple[tuple[str, ...], ...]
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 1024 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tasks": ()}

    def units(self) -> Sequence[Unit]:
        return self.tasks

    def run(self, unit: Unit, output: UnitOutput) -> None:
        task, groups = unit.params, self.drops.groups
        drops = self.drops.of_group(self.store, task["group"])
        drops = drops.take(np.flatnonzero(drops["of_unit"] < KNOWN))
        own = self._own(drops, task)
        earlier = Alternatives(paths=self.gathered, groups=groups).of_group(self.store, task["group"])
        found = best_captions(pd.concat([_moved(own, drops), _moved(earlier, drops)]))
        target = np.searchsorted(np.asarray(groups.starts[1:]), found["unit"], side="right")
        write_captions(output.path("captions.bin"), found, target, len(groups))
        output.count("captions", len(found))

    def _own(self, drops: Records, task: Mapping[str, Any]) -> pd.DataFrame:
        """(unit, row, uid, caption) of the dropped rows themselves."""

        def read(unit: int) -> pa.Table:
            first, end = np.searchsorted(drops["unit"], [unit, unit + 1])
            rows = drops["row"][first:end].astype(np.int64)
            file = task["files"][unit - task["first_unit"]]
            table = read_checked(self.store, file, ["uid", "caption"]).take(pa.array(rows))
            place = {"unit": pa.array(np.full(len(rows), unit), pa.int64()), "row": pa.array(rows)}
            return pa.table(place | {name: table[name] for name in ("uid", "caption")})

        tables = self.store.overlapped(read, np.unique(drops["unit"]).tolist())
        found: pd.DataFrame = pa.concat_tables([NO_CAPTIONS, *tables]).to_pandas()
        return found


def _moved(captions: pd.DataFrame, drops: Records) -> pd.DataFrame:
    """Captions of dropped samples as those of the samples that represent them; of others they are left out."""
    names = ("unit", "row", "of_unit", "of_row")
    to = pd.DataFrame({name: drops[name].astype(np.int64) for name in names})
    both = captions.merge(to, on=["unit", "row"])
    return both[["of_unit", "of_row", "uid", "caption"]].rename(columns={"of_unit": "unit", "of_row": "row"})


@dataclass(frozen=True, kw_only=True)
class InStage:
    """A unit is a group of fetch units."""

    store: Store
    sent: tuple[str, ...]
    groups: Groups
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 1024 * 2**20

    def units(self) -> Sequence[Unit]:
        return [Unit(id=f"{group:05}", params={"group": group}) for group in range(len(self.groups))]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        group = unit.params["group"]
        first, end = self.groups.range(group)
        streams = self.store.overlapped(
            lambda path: read_bucket(self.store, path, group, len(self.groups), np.dtype(np.uint8)),
            self.sent,
        )
        found = best_captions(read_captions(streams))
        write_captions(output.path("captions.bin"), found, found["unit"] - first, end - first)
        output.count("captions", len(found))
