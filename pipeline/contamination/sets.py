"""Evaluation sets as a configuration names them: what they are, and which parts are read one by one.

    curate.evaluation_sets=[imagenet/val, {name: coco, path: "s3://sets/coco/*.tar"}]

A set is a folder of images, tars in webdataset form, a dataset that pairmill built, or parquet files with the column
`phash` (uint64, as `pipeline.signals` makes it), `embedding` (a list of numbers), or both.
"""

import hashlib
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import RequestError
from pipeline.manifest import MANIFEST_FILE, Manifest
from pipeline.rules.config import CurateConfig

KEY = "curate.evaluation_sets"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
IMAGES_PER_PART = 1_000
HASH, EMBEDDING = "phash", "embedding"
NAME_COLUMNS = ("name", "key", "uid", "url", "path")
"""Of a parquet file: the first that is there names its images; else their number does."""

PartKind = Literal["images", "tar", "shard", "hashes"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one task reads of a set. urls: image files; the one tar or parquet file; a shard's tar and parquet."""

    set_name: str
    kind: PartKind
    urls: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationSets:
    """Everything that a build is compared with. fingerprint: another one if any file has another name, size or date."""

    parts: tuple[Part, ...] = ()
    fingerprint: str = ""

    @staticmethod
    def of_config(curate: CurateConfig) -> "EvaluationSets":
        """Those of a build. RequestError as for `of`."""
        return EvaluationSets.of(
            curate.evaluation_sets,
            by_hash=curate.evaluation_distance is not None,
            by_embedding=curate.evaluation_similarity is not None,
        )

    @staticmethod
    def of(asked: Sequence[Any], *, by_hash: bool, by_embedding: bool) -> "EvaluationSets":
        """The sets that a configuration names. RequestError when one is missing, empty or of no use."""
        parts: list[Part] = []
        stamps: list[Any] = []
        names: set[str] = set()
        for each in asked:
            name, path = _named(each)
            if name in names:
                raise RequestError(f"{KEY}: two sets are called {name}; give names, as {{name: ..., path: {path}}}")
            names.add(name)
            found, stamp = _open(name, path, by_hash=by_hash, by_embedding=by_embedding)
            parts += found
            stamps.append([name, stamp])
        digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
        return EvaluationSets(parts=tuple(parts), fingerprint=digest[:12])


def _named(asked: Any) -> tuple[str, str]:
    """(name, path) of a set."""
    if isinstance(asked, dict):
        if unknown := sorted(set(asked) - {"name", "path"}):
            raise RequestError(f"{KEY}: unknown {', '.join(unknown)}; a set has a path, and perhaps a name")
        path, name = asked.get("path"), asked.get("name")
    else:
        path, name = asked, None
    if not isinstance(path, str) or not path.strip():
        raise RequestError(f"{KEY}: {asked}: names no path")
    return str(name or _short(path)), path


def _short(path: str) -> str:
    """A path's last component that is no pattern."""
    parts = [part for part in path.rstrip("/").split("/") if part and "*" not in part]
    return parts[-1] if parts else path


def _open(name: str, path: str, *, by_hash: bool, by_embedding: bool) -> tuple[list[Part], list[list[Any]]]:
    """(parts, what tells the files from other ones)."""
    try:
        fs, root = fsspec.core.url_to_fs(path)
        files = _files(fs, root)
    except (OSError, ValueError, ImportError) as error:
        raise RequestError(f"{KEY}: {path}: cannot be read: {error}") from None
    if not files:
        raise RequestError(f"{KEY}: {path}: no such file or folder, or it is empty")
    stamp = [[posixpath.relpath(file, posixpath.dirname(root)), *_stamp(info)] for file, info in sorted(files.items())]
    urls = {file: fs.unstrip_protocol(file) for file in sorted(files)}
    return list(_parts(fs, name, path, root, urls, by_hash=by_hash, by_embedding=by_embedding)), stamp


def _files(fs: Any, root: str) -> dict[str, dict[str, Any]]:
    """Every file below a folder, or that a name or pattern stands for."""
    if "*" in root:
        found: dict[str, dict[str, Any]] = fs.glob(root, detail=True)
        return {file: info for file, info in found.items() if info.get("type") == "file"}
    if not fs.exists(root):
        return {}
    if fs.isfile(root):
        return {root: fs.info(root)}
    below: dict[str, dict[str, Any]] = fs.find(root, detail=True)
    return below


def _stamp(info: dict[str, Any]) -> list[Any]:
    changed = info.get("ETag") or info.get("mtime") or info.get("LastModified") or ""
    return [info.get("size"), str(changed)]


def _parts(
    fs: Any, name: str, path: str, root: str, urls: dict[str, str], *, by_hash: bool, by_embedding: bool
) -> Iterator[Part]:
    manifest = posixpath.join(root, MANIFEST_FILE)
    if manifest in urls:
        shards = Manifest.from_json(fs.cat_file(manifest)).shards
        if not any(shard.num_samples for shard in shards):
            raise RequestError(f"{KEY}: {path}: is a dataset without samples")
        for shard in shards:
            files = (posixpath.join(root, file.path) for file in (shard.tar, shard.parquet))
            yield Part(set_name=name, kind="shard", urls=tuple(fs.unstrip_protocol(file) for file in files))
        return
    images = [url for file, url in urls.items() if file.lower().endswith(IMAGE_SUFFIXES)]
    for first in range(0, len(images), IMAGES_PER_PART):
        yield Part(set_name=name, kind="images", urls=tuple(images[first : first + IMAGES_PER_PART]))
    tars = [url for file, url in urls.items() if file.endswith(".tar")]
    for url in () if images else tars:
        yield Part(set_name=name, kind="tar", urls=(url,))
    tables = [file for file in urls if file.endswith(".parquet")]
    if images or tars:
        return
    if not tables:
        raise RequestError(f"{KEY}: {path}: holds neither images, nor tars, nor parquet files with hashes")
    for file in tables:
        _check_table(fs, file, by_hash=by_hash, by_embedding=by_embedding)
        yield Part(set_name=name, kind="hashes", urls=(urls[file],))


def _check_table(fs: Any, file: str, *, by_hash: bool, by_embedding: bool) -> None:
    """RequestError when a parquet file is not what sets are compared by."""
    try:
        with fs.open(file, "rb") as opened:
            table = pq.ParquetFile(opened)
            schema, num_rows = table.schema_arrow, table.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        raise RequestError(f"{KEY}: {file}: not a readable parquet file: {error}") from None
    if not num_rows:
        raise RequestError(f"{KEY}: {file}: is empty")
    wanted = {HASH: by_hash, EMBEDDING: by_embedding}
    if missing := [name for name, is_wanted in wanted.items() if is_wanted and name not in schema.names]:
        raise RequestError(
            f"{KEY}: {file}: has no column {' and no column '.join(missing)}; "
            "set curate.evaluation_distance or curate.evaluation_similarity null to go without"
        )
    if by_hash and schema.field(HASH).type != pa.uint64():
        raise RequestError(
            f"{KEY}: {file}: {HASH} is {schema.field(HASH).type}; it has to be uint64, the 64 bits of pipeline.signals"
        )
    kind = schema.field(EMBEDDING).type if by_embedding else None
    if kind is not None and not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise RequestError(f"{KEY}: {file}: {EMBEDDING} is {kind}; it has to be a list of numbers")
