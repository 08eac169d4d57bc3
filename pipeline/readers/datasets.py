"""Lists that are datasets with images: pairmill's own, and what img2dataset and other writers of webdataset tars write.

OUT/manifest.json                     a dataset of pairmill: its shards
OUT/00000.tar [00000.parquet]         webdataset; with img2dataset's table or without any
OUT/00000.parquet 00000_stats.json    img2dataset's output_format=parquet: the images are in the table,
OUT/00000/                            or with output_format=files in a folder
"""

import fnmatch
import posixpath
from collections.abc import Mapping
from typing import Any

from cluster.errors import RequestError
from pipeline.manifest import MANIFEST_FILE, read_manifest
from pipeline.readers.sources import Source

STATS = "_stats.json"


def find_dataset(fs: Any, path: str, where: str) -> list[Source]:
    """The shards of the dataset at a place, one source each; none if there is no dataset.

    where: what asked for it, to begin messages with. Raises RequestError for a dataset that is not finished or whole.
    """
    if path.endswith(".tar"):
        return _named_tars(fs, *posixpath.split(path), where)
    if not posixpath.splitext(path)[1] and fs.exists(f"{path.rstrip('/')}/{MANIFEST_FILE}"):
        return _pairmill(fs, path.rstrip("/"), where)
    if _is_pattern(path) or "http" in fs.protocol or not fs.isdir(path):
        return []
    if fs.exists(f"{path}/{MANIFEST_FILE}"):
        return _pairmill(fs, path.rstrip("/"), where)
    if fs.exists(f"{path}/run.json"):
        raise RequestError(
            f"{where}: holds a run of pairmill without a finished dataset (no {MANIFEST_FILE}); run the command that "
            "made it again, which ends it"
        )
    return [*_tars(fs, path, "*.tar"), *_img2dataset(fs, path)]


def _is_pattern(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _pairmill(fs: Any, folder: str, where: str) -> list[Source]:
    store, manifest = read_manifest(fs.unstrip_protocol(folder))
    sizes = {name: int(info["size"] or 0) for name, info in fs.find(f"{folder}/shards", detail=True).items()}
    sources = []
    for shard in manifest.shards:
        for file in (shard.parquet, shard.tar):
            found = sizes.get(f"{folder}/{file.path}")
            if found != file.size_bytes:
                problem = "is missing" if found is None else f"has {found:,} bytes, should have {file.size_bytes:,}"
                raise RequestError(f"{where}: {file.path} {problem}; `pairmill verify {store.url}` says what to do")
        sources.append(
            Source(
                url=fs.unstrip_protocol(f"{folder}/{shard.parquet.path}"),
                name=shard.parquet.path,
                format="pairmill",
                compression="",
                size_bytes=shard.parquet.size_bytes + shard.tar.size_bytes,
                stamp=f"{shard.parquet.sha256} {shard.tar.sha256}",
                images=fs.unstrip_protocol(f"{folder}/{shard.tar.path}"),
            )
        )
    return sources


def _named_tars(fs: Any, folder: str, pattern: str, where: str) -> list[Source]:
    """Those in a folder, or in all folders that match. RequestError when there is none."""
    folders = [each for each in sorted(fs.glob(folder)) if fs.isdir(each)] if _is_pattern(folder) else [folder]
    found = [source for each in folders for source in _tars(fs, each, pattern)]
    if not found:
        raise RequestError(f"{where}: no such tar")
    return found


def _tars(fs: Any, folder: str, pattern: str) -> list[Source]:
    """Tars whose names match, with the table of the same name where there is one."""
    names = _names(fs, folder)
    tars = sorted(name for name in names if name.endswith(".tar") and fnmatch.fnmatchcase(name, pattern))
    return [_with_table(fs, folder, names, tar, tar.removesuffix(".tar")) for tar in tars]


def _with_table(fs: Any, folder: str, infos: Mapping[str, Any], images: str, stem: str) -> Source:
    table = f"{stem}.parquet"
    parts = [name for name in (table, images) if name in infos]
    return Source(
        url=fs.unstrip_protocol(f"{folder}/{parts[0]}"),
        name=parts[0],
        format="webdataset",
        compression="",
        size_bytes=sum(int(infos[name]["size"] or 0) for name in parts),
        stamp=" ".join(str(fs.checksum(f"{folder}/{name}")) for name in parts),
        images=fs.unstrip_protocol(f"{folder}/{images}"),
    )


def _img2dataset(fs: Any, folder: str) -> list[Source]:
    """Tables of img2dataset that have no tar: those of its formats `parquet` and `files`."""
    names = _names(fs, folder)
    stems = sorted(name.removesuffix(STATS) for name in names if name.endswith(STATS))
    sources = []
    for stem in stems:
        table, is_folder = f"{stem}.parquet", names.get(stem, {}).get("type") == "directory"
        if table not in names or f"{stem}.tar" in names:
            continue
        sources.append(
            Source(
                url=fs.unstrip_protocol(f"{folder}/{table}"),
                name=table,
                format="files" if is_folder else "images",
                compression="",
                size_bytes=int(names[table]["size"] or 0),
                stamp=str(fs.checksum(f"{folder}/{table}")),
                images=fs.unstrip_protocol(f"{folder}/{stem}") if is_folder else "",
            )
        )
    return sources


def _names(fs: Any, folder: str) -> dict[str, Any]:
    """What lies directly in a folder: {name: what the file system tells of it}."""
    return {posixpath.basename(info["name"].rstrip("/")): info for info in fs.ls(folder, detail=True)}
