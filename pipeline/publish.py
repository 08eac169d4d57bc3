"""The last step of a build: `manifest.json`, made once, from markers alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq

from cluster.config import flatten
from cluster.errors import RunError
from cluster.journal import Marker
from cluster.store import Store
from pipeline.config import BuildConfig
from pipeline.manifest import FORMAT_VERSION, MANIFEST_FILE, FileInfo, Manifest, Shard
from pipeline.record import total_counts

_PLACES = ("input", "against", "base")


def make_manifest(
    store: Store,
    config: BuildConfig,
    sources: Sequence[Marker],
    packed: Sequence[Marker],
    recorded: Mapping[str, Marker],
) -> Manifest:
    """What the dataset is. RunError unless the counts account for every input row and the shards for the kept ones."""
    source_entries = tuple(json.loads(store.read_bytes(marker.path_of("source.json"))) for marker in sources)
    num_input_rows = sum(int(entry["num_rows"]) for entry in source_entries)
    counts = total_counts(recorded)
    num_samples = sum(marker.counts["rows"] for marker in packed)
    if sum(counts.values()) != num_input_rows:
        raise _unsound(store, f"{counts} do not account for {num_input_rows:,} input rows")
    if counts["kept"] != num_samples:
        raise _unsound(store, f"{counts['kept']:,} kept pairs, {num_samples:,} samples in shards")
    return Manifest(
        version=FORMAT_VERSION,
        num_input_rows=num_input_rows,
        num_samples=num_samples,
        counts=counts,
        shards=tuple(_shard(index, marker) for index, marker in enumerate(packed)),
        columns=_columns(store, packed[0].path_of("samples.parquet")),
        config=settings_of(config),
        sources=source_entries,
    )


def settings_of(config: BuildConfig) -> dict[str, Any]:
    """The settings that affect results, but for where things are read: {dotted key: value}."""
    settings = {name: value for name, value in flatten(config, only_result=True).items() if name not in _PLACES}
    settings["sources"] = {
        name: {key: value for key, value in source.items() if key not in _PLACES}
        for name, source in settings["sources"].items()
    }
    return settings


def extend_manifest(
    store: Store, manifest: Manifest, packed: Sequence[Marker], recorded: Mapping[str, Marker], history: dict[str, Any]
) -> Manifest:
    """The manifest after a repair: further shards, and the counts of all records as they are now. RunError as above."""
    shards = (*manifest.shards, *(_shard(index, marker) for index, marker in enumerate(packed, len(manifest.shards))))
    counts, num_samples = total_counts(recorded), sum(shard.num_samples for shard in shards)
    if sum(counts.values()) != manifest.num_input_rows:
        raise _unsound(store, f"{counts} do not account for {manifest.num_input_rows:,} input rows")
    if counts["kept"] != num_samples:
        raise _unsound(store, f"{counts['kept']:,} kept pairs, {num_samples:,} samples in shards")
    return replace(
        manifest, shards=shards, counts=counts, num_samples=num_samples, repairs=(*manifest.repairs, history)
    )


def publish(store: Store, manifest: Manifest) -> None:
    """Make the dataset visible. A manifest that is there already must say the same."""
    data = manifest.to_json()
    if not store.create(MANIFEST_FILE, data) and store.read_bytes(MANIFEST_FILE) != data:
        raise RunError(
            f"{store.url_of(MANIFEST_FILE)}: another build has published something else here; build into another output"
        )


def refuse_empty(counts: Mapping[str, int], input: Sequence[str]) -> None:
    """RunError when nothing is left, saying why by reason."""
    if counts["kept"]:
        return
    dropped = sorted(((number, name) for name, number in counts.items() if number), reverse=True)
    reasons = ", ".join(f"{name} {number:,}" for number, name in dropped) or "the lists have no rows"
    raise RunError(
        f"no pair was kept, so there is no dataset to publish: {reasons}; check the settings or the lists "
        f"({', '.join(input)}), then build into a new output"
    )


_KEPT = ("plan-", "fetch", "rule-", "embed-", "score-", "match-", "repair-")
"""How stages before the decisions are called, and those of repairs."""


def _unsound(store: Store, problem: str) -> RunError:
    """Stages contradict each other: some markers were removed, but not those that had been made from them."""
    stages = {entry.path.split("/")[1] for entry in store.find("journal") if entry.path.count("/") > 1}
    names = " ".join(store.url_of(f"journal/{stage}") for stage in sorted(stages) if not stage.startswith(_KEPT))
    return RunError(
        f"nothing is published: {problem}; the journal has units that were done again and others made from what they "
        f"were before: remove {names} and run the same command, which downloads nothing again"
    )


def _shard(index: int, marker: Marker) -> Shard:
    return Shard(
        index=index,
        num_samples=marker.counts["rows"],
        tar=_file(marker, "samples.tar"),
        parquet=_file(marker, "samples.parquet"),
    )


def _file(marker: Marker, name: str) -> FileInfo:
    found = next(output for output in marker.outputs if output.name == name)
    return FileInfo(path=found.path, size_bytes=found.size_bytes, sha256=found.sha256)


def _columns(store: Store, path: str) -> dict[str, Any]:
    with store.open(path) as file:
        schema = pq.read_schema(file)
    return {field.name: str(field.type) for field in schema}
