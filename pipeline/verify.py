"""`pairmill verify OUT`: is every file of a dataset there, whole, and what the manifest says?"""

import hashlib
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import REQUIRED, Config, key
from cluster.errors import EXIT_DONE, EXIT_FAILED
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.store import Store
from pipeline.generations import num_repairs, record_markers, stage_name
from pipeline.manifest import FileInfo, Manifest, Shard, read_manifest

CHUNK_BYTES = 8 * 2**20
_CHECKED = ["key", "image_format", "image_offset", "image_size", "width", "height"]


class VerifyConfig(Config):
    """`pairmill verify OUT`."""

    dataset: str = key(REQUIRED, "folder or URL of a finished dataset", min_length=1)
    decode: int | None = key(16, "images of each shard to decode, evenly spread; null: all", unit="images", ge=0)
    threads: int = key(min(8, os.cpu_count() or 1), "files read at once", unit="threads", ge=1)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong: the file, in what way, and the journal markers whose units have to be done again."""

    path: str
    problem: str
    markers: tuple[str, ...] = ()


def verify_command(config: VerifyConfig) -> int:
    """Check a dataset, print what is damaged and what to do; the exit status."""
    store, manifest = read_manifest(config.dataset)
    damages = verify(store, manifest, decode=config.decode, threads=config.threads)
    if num_repairs(Journal(store)) > len(manifest.repairs):
        print(f"{store.url}: a repair was interrupted; `pairmill repair {store.url}` goes on with it")
    if not damages:
        size_gib = sum(shard.tar.size_bytes + shard.parquet.size_bytes for shard in manifest.shards) / 2**30
        print(
            f"{store.url}: whole: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards "
            f"({size_gib:,.3f} GiB), all sizes and sha256 as in manifest.json"
        )
        return EXIT_DONE
    for damage in damages:
        print(f"{store.url_of(damage.path)}: {damage.problem}")
    print(f"{store.url}: {len(damages)} damaged; {remedy(store, damages)}")
    return EXIT_FAILED


def verify(store: Store, manifest: Manifest, *, decode: int | None = 16, threads: int = 4) -> list[Damage]:
    """Everything that is wrong with a dataset, in order of its files."""
    journal = Journal(store)
    is_amid_repair = num_repairs(journal) > len(manifest.repairs)
    # A repair that was interrupted has packed shards and replaced records that manifest.json does not speak of yet.
    records = [] if is_amid_repair else list(record_markers(journal).values())
    found = [*_check_counts(manifest), *([] if is_amid_repair else _check_strays(store, manifest))]
    with Progress(title=f"verify {store.url}") as progress, ThreadPoolExecutor(threads) as pool:
        progress.start("verify", num_units=len(manifest.shards) + len(records))
        tasks = [
            pool.submit(_check_shard, store, shard, _pack_marker(manifest, shard), decode) for shard in manifest.shards
        ]
        tasks += [pool.submit(_check_record, store, marker, len(manifest.repairs)) for marker in records]
        for task in as_completed(tasks):
            damages, num_samples = task.result()
            found += damages
            progress.advance(Marker(stage="verify", unit="", attempt="", outputs=(), counts={"rows": num_samples}))
        progress.finish()
    return sorted(found, key=lambda damage: damage.path)


def remedy(store: Store, damages: Sequence[Damage]) -> str:
    """What to do about damages, for people."""
    markers = sorted({marker for damage in damages for marker in damage.markers})
    lines = []
    if markers and not store.find("work/fetch"):
        lines.append(
            "work/ was removed, so nothing can be made again from it: put back copies of the damaged files, or "
            "build into a new output"
        )
    elif markers:
        remove = " ".join(store.url_of(path) for path in ("manifest.json", *markers))
        lines.append(
            f"remove these objects, then run the same build command, which makes the damaged files again from the "
            f"downloaded images:\n  {remove}"
        )
    if strays := [store.url_of(damage.path) for damage in damages if not damage.markers]:
        lines.append("not part of the dataset, or not repairable one by one: " + ", ".join(strays))
    return "\n".join(lines)


def _check_counts(manifest: Manifest) -> Iterator[Damage]:
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


def _check_strays(store: Store, manifest: Manifest) -> Iterator[Damage]:
    """Files among the shards that the manifest does not know: a reader that lists the folder would take them."""
    known = {file.path for shard in manifest.shards for file in (shard.tar, shard.parquet)}
    for entry in store.find("shards"):
        if entry.path not in known and not PurePosixPath(entry.path).name.startswith("."):
            yield Damage(path=entry.path, problem="is not in manifest.json; remove it")


def _pack_marker(manifest: Manifest, shard: Shard) -> str:
    """The marker of the unit that made a shard: the build's, or that of the repair that added it."""
    first_shards = [int(repair["first_shard"]) for repair in manifest.repairs]
    return f"journal/{stage_name(bisect_right(first_shards, shard.index), 'pack')}/{shard.index:05}.json"


def _check_shard(store: Store, shard: Shard, marker: str, decode: int | None) -> tuple[list[Damage], int]:
    damages = [
        Damage(path=file.path, problem=problem, markers=(marker,))
        for file in (shard.tar, shard.parquet)
        if (problem := _file_problem(store, file))
    ]
    if not damages:
        damages = [
            Damage(path=path, problem=problem, markers=(marker,))
            for path, problem in _sample_problems(store, shard, decode)
        ]
    return damages, shard.num_samples


def _check_record(store: Store, marker: Marker, num_repairs: int) -> tuple[list[Damage], int]:
    """A damaged record is made again as the build had it, then changed again by every repair."""
    damages = []
    stages = [stage_name(number, "record") for number in range(num_repairs + 1)]
    markers = tuple(f"journal/{stage}/{marker.unit}.json" for stage in stages)
    for output in marker.outputs:
        file = FileInfo(path=output.path, size_bytes=output.size_bytes, sha256=output.sha256)
        if problem := _file_problem(store, file):
            damages.append(Damage(path=file.path, problem=problem, markers=markers))
    return damages, 0


def _file_problem(store: Store, file: FileInfo) -> str:
    """What is wrong with a file's existence, size or hash; empty if nothing."""
    digest, size_bytes = hashlib.sha256(), 0
    try:
        with store.open(file.path) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                size_bytes += len(chunk)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error}"
    if size_bytes != file.size_bytes:
        return f"has {size_bytes:,} bytes, should have {file.size_bytes:,}"
    if digest.hexdigest() != file.sha256:
        return f"sha256 differs: is {digest.hexdigest()[:16]}..., should be {file.sha256[:16]}..."
    return ""


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
