"""Whether a dataset is all of its list, once, and byte for byte what an undisturbed build gives."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq

from cluster.store import Store


@dataclass(frozen=True, kw_only=True)
class Audit:
    """num_lost: input rows that the record does not account for, and kept pairs whose sample is not in its shard.

    num_duplicated: pairs that are recorded, or samples that are stored, more than once. differing: published files
    that are missing, too many, or other bytes than in the reference.
    """

    num_lost: int
    num_duplicated: int
    num_samples: int
    differing: list[str] = field(default_factory=list)


def audit(environment: Mapping[str, str], output: str, reference: Path, url_list: Path) -> Audit:
    """Look at `output` with nothing between us and the store."""
    os.environ.update(environment)
    if "://" in output:
        fsspec.get_filesystem_class(output.split("://")[0]).clear_instance_cache()
    found, expected = Store(output), Store(str(reference))
    recorded = _recorded(found)
    stored = _stored(found)
    wanted = Counter(_pair(row) for row in pq.read_table(url_list, columns=["url", "caption"]).to_pylist())
    in_record: Counter[Any] = Counter()
    for row in recorded:
        in_record[_pair(row)] += row["num_rows"]
    kept = [row["uid"] for row in recorded if row["status"] == "kept"]
    lost = sum((wanted - in_record).values()) + sum((Counter(kept) - Counter(stored)).values())
    twice = sum((in_record - wanted).values()) + sum((Counter(stored) - Counter(set(kept))).values())
    return Audit(
        num_lost=lost,
        num_duplicated=twice,
        num_samples=len(stored),
        differing=_differing(found, expected),
    )


def _pair(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["url"] or "", row["caption"] or ""


def _recorded(store: Store) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for entry in store.find("record"):
        table = pq.read_table(io.BytesIO(store.read_bytes(entry.path)))
        rows += table.select(["uid", "url", "caption", "num_rows", "status"]).to_pylist()
    return rows


def _stored(store: Store) -> list[str]:
    """uid of every sample, by the shards' own tables; each is checked to be in its tar."""
    uids: list[str] = []
    for entry in store.find("shards"):
        if not entry.path.endswith(".tar"):
            continue
        rows = pq.read_table(io.BytesIO(store.read_bytes(entry.path.removesuffix(".tar") + ".parquet"))).to_pylist()
        with tarfile.open(fileobj=io.BytesIO(store.read_bytes(entry.path))) as tar:
            members = Counter(name.partition(".")[0] for name in tar.getnames() if not name.endswith((".json", ".txt")))
        for row in rows:
            uids += [row["uid"]] * members[row["key"]]
    return uids


def _differing(found: Store, expected: Store) -> list[str]:
    ours, theirs = _published(found), _published(expected)
    return sorted(path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path))


def _published(store: Store) -> dict[str, bytes]:
    paths = [entry.path for entry in store.find("shards")] + ["manifest.json"]
    return {path: store.read_bytes(path) for path in paths}
