"""Earlier datasets that a build is made against: their pairs are not fetched again, and their samples stay unique.

Stage `plan-against`, a unit per group of records of an earlier dataset (unit id `00000-<hash of the dataset>`):
    rows.parquet   order, uid of every pair that was kept or dropped for good, in this build's order
    counts         known (pairs)
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import RequestError
from cluster.executor import Unit
from cluster.journal import Journal, Marker, UnitOutput
from cluster.store import Store
from pipeline.config import BuildConfig
from pipeline.identity import keys_of_text, order_of
from pipeline.manifest import Manifest, Shard, read_manifest
from pipeline.reasons import Reason, is_transient
from pipeline.selection import column_list, read_table

RECORDS_PER_UNIT = 500
"""About a million pairs."""
GROUP_ROWS = 65_536
_NEEDED = ("uid", "url", "caption", "sha256")
_UNDECIDED = (Reason.NOT_DOWNLOADED, Reason.SAMPLED_OUT)
"""Reasons that say nothing of a pair but that nobody has looked at it."""


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """A finished dataset. records: paths of its record files."""

    store: Store
    manifest: Manifest
    records: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Tells one state of one dataset from all others."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()[:8]


def open_earlier(config: BuildConfig) -> tuple[Earlier, ...]:
    """The datasets of the key `against`. RequestError when one is not finished, or lacks what is needed of it."""
    return tuple(_open(dataset, Store(config.output)) for dataset in config.against)


def _open(dataset: str, output: Store) -> Earlier:
    store, manifest = read_manifest(dataset)
    if store.url == output.url:
        raise RequestError(f"against={dataset}: is the output itself; choose another output")
    output.full(store.url_of("record"))
    if missing := [name for name in _NEEDED if name not in manifest.columns]:
        raise RequestError(f"against={dataset}: no column {', '.join(missing)} in its shards, which it takes")
    records = tuple(entry.path for entry in store.find("record") if entry.path.endswith(".parquet"))
    if not records:
        raise RequestError(
            f"against={dataset}: has no record/, which tells what became of each pair: it is a copy without it; copy "
            "that too"
        )
    return Earlier(store=store, manifest=manifest, records=records)


def known_shards(config: BuildConfig, first: int = 0) -> tuple[tuple[Shard, ...], int]:
    """(shards of the earlier datasets, their number of samples): with paths for other stores, numbered from `first`."""
    shards: list[Shard] = []
    for earlier in open_earlier(config):
        for shard in earlier.manifest.shards:
            tar = replace(shard.tar, path=earlier.store.url_of(shard.tar.path))
            parquet = replace(shard.parquet, path=earlier.store.url_of(shard.parquet.path))
            shards.append(replace(shard, index=first + len(shards), tar=tar, parquet=parquet))
    return tuple(shards), sum(shard.num_samples for shard in shards)


@dataclass(frozen=True, kw_only=True)
class AgainstStage:
    """Stage `plan-against`."""

    datasets: tuple[Earlier, ...]
    seed: int
    name: str = "plan-against"
    num_cpus: float = 1.0
    memory_bytes: int = 512 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "datasets": ()}

    def units(self) -> list[Unit]:
        groups = [
            (earlier, earlier.records[start : start + RECORDS_PER_UNIT])
            for earlier in self.datasets
            for start in range(0, len(earlier.records), RECORDS_PER_UNIT)
        ]
        return [
            Unit(id=f"{index:05}-{earlier.fingerprint}", params={"store": earlier.store, "records": records})
            for index, (earlier, records) in enumerate(groups)
        ]

    def refuse_changed(self, journal: Journal) -> None:
        """RequestError when an earlier run of the same build was made against other datasets."""
        if {*journal.markers(self.name)} - {unit.id for unit in self.units()}:
            raise RequestError(
                "against: these datasets are not what this run began with (another one, or changed since then, as a "
                "repair does); choose another output"
            )

    def run(self, unit: Unit, output: UnitOutput) -> None:
        store: Store = unit.params["store"]
        uids = pa.concat_arrays([_decided(store, path) for path in unit.params["records"]])
        order = pa.array(order_of(keys_of_text(uids), self.seed))
        table = pa.table({"order": order, "uid": uids}).sort_by("order")
        pq.write_table(table, output.path("rows.parquet"), row_group_size=GROUP_ROWS, compression="zstd")
        output.count("known", table.num_rows)


def _decided(store: Store, record: str) -> pa.Array:
    """uids of a record's pairs that were kept or dropped for good."""
    table = read_table(store, record, ["uid", "reason"])
    reasons = column_list(table, "reason")
    is_open = {reason: reason is not None and _is_open(reason) for reason in set(reasons)}
    uids = table.filter(pa.array([not is_open[reason] for reason in reasons], pa.bool_()))["uid"]
    return pc.cast(uids.combine_chunks(), pa.string())


def _is_open(reason: str) -> bool:
    if reason in _UNDECIDED:
        return True
    try:
        return is_transient(reason)
    except ValueError:  # of a rule of somebody's own
        return False


def runs_of(markers: Mapping[str, Marker]) -> tuple[str, ...]:
    """Paths of the stage's tables."""
    return tuple(marker.path_of("rows.parquet") for marker in markers.values())


def num_known(markers: Mapping[str, Marker]) -> int:
    """Pairs that the earlier datasets have decided."""
    return sum(marker.counts.get("known", 0) for marker in markers.values())
