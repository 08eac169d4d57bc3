"""Are a dataset's shards what its manifest says, and are the samples in them where their table says?"""

import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.store import Store
from pipeline.damage import Damage, file_problem
from pipeline.generations import stage_name
from pipeline.manifest import Manifest, Shard

_CHECKED = ["key", "image_format", "image_offset", "image_size", "width", "height"]


def check_counts(manifest: Manifest) -> Iterator[Damage]:
    """Numbers of the manifest that contradict each other."""
    total, in_shards = sum(manifest.counts.values()), sum(shard.num_samples for shard in manifest.shards)
    if total != manifest.num_input_rows:
        yield Damage(
            path="manifest.json",
            problem=f"the counts sum to {total:,}, the lists have {manifest.num_input_rows:,} rows",
        )
    if not manifest.num_samples == in_shards == manifest.counts.get("kept"):
        yield Damage(
            path="manifest.json",
            problem=f"{manifest.num_samples:,} samples, {in_shards:,} in shards, {manifest.counts.get('kept')} kept",
        )


def check_strays(store: Store, manifest: Manifest) -> Iterator[Damage]:
    """Files among the shards that the manifest does not know: a reader that lists the folder would take them."""
    known = {file.path for shard in manifest.shards for file in (shard.tar, shard.parquet)}
    for entry in store.find("shards"):
        if entry.path not in known and not PurePosixPath(entry.path).name.startswith("."):
            yield Damage(path=entry.path, problem="is not in manifest.json; remove it")


def check_shard(store: Store, manifest: Manifest, shard: Shard, decode: int | None) -> list[Damage]:
    """What is wrong with a shard's two files. decode: so many of its images are decoded; None: all."""
    unit = _unit_of(manifest, shard)
    damages = [
        Damage(path=file.path, problem=problem, unit=unit)
        for file in (shard.tar, shard.parquet)
        if (problem := file_problem(store, file))
    ]
    return damages or [
        Damage(path=path, problem=problem, unit=unit) for path, problem in _sample_problems(store, shard, decode)
    ]


def _unit_of(manifest: Manifest, shard: Shard) -> tuple[str, str]:
    """The unit that made a shard: the build's, or that of the repair that added it."""
    first_shards = [int(repair["first_shard"]) for repair in manifest.repairs]
    return stage_name(bisect_right(first_shards, shard.index), "pack"), f"{shard.index:05}"


def _sample_problems(store: Store, shard: Shard, decode: int | None) -> Iterator[tuple[str, str]]:
    """(file, problem) for samples that are not where the parquet says, or do not decode."""
    try:
        with store.open(shard.parquet.path) as file:
            table = pq.read_table(file, columns=_CHECKED)
    except (OSError, pa.ArrowException) as error:
        yield shard.parquet.path, f"not readable as parquet: {error}"
        return
    if table.num_rows != shard.num_samples:
        yield shard.parquet.path, f"has {table.num_rows:,} rows, should have {shard.num_samples:,}"
        return
    try:
        with store.open(shard.tar.path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = {member.name: (member.offset_data, member.size) for member in tar}
    except (OSError, tarfile.TarError) as error:
        yield shard.tar.path, f"not readable as tar: {error}"
        return
    rows = table.to_pylist()
    if len(members) != 3 * len(rows):
        yield shard.tar.path, f"has {len(members):,} members, should have {3 * len(rows):,}"
    for row in rows:
        name = f"{row['key']}.{row['image_format']}"
        if members.get(name) != (row["image_offset"], row["image_size"]):
            yield shard.parquet.path, f"{name}: the tar has it at {members.get(name)}, the parquet says otherwise"
            return
    with store.open(shard.tar.path) as file:
        for row in _spread(rows, decode):
            file.seek(row["image_offset"])
            pixels = cv2.imdecode(np.frombuffer(file.read(row["image_size"]), np.uint8), cv2.IMREAD_COLOR)
            if pixels is None or pixels.shape[:2] != (row["height"], row["width"]):
                yield shard.tar.path, f"{row['key']}: the image does not decode to {row['width']}x{row['height']}"


def _spread(rows: Sequence[dict[str, Any]], count: int | None) -> Iterable[dict[str, Any]]:
    if count is None or count >= len(rows):
        return rows
    return (rows[len(rows) * i // count] for i in range(count))
