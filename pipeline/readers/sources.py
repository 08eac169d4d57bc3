"""Which files a list consists of, what they are, and how to open them."""

import bz2
import contextlib
import difflib
import gzip
import hashlib
import io
import lzma
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from cluster.errors import RequestError
from cluster.redact import redact_url
from cluster.scratch import scratch_folder
from cluster.store import open_file_system

FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
IMPORTS = ("pairmill", "webdataset", "images", "files")
"""Formats of datasets: pairmill's own, tars (with tables as img2dataset writes them), and img2dataset's others."""
COPY_BYTES = 4 * 2**20
BUFFER_BYTES = 2**18


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of a list. `url` opens it from any machine; `name` tells it apart and holds no absolute path.

    stamp: stays while the file is not written to (a time or the store's tag); another one may mean the same content.
    images: URL of the tar or folder that holds the images of an imported dataset, which `format` names; such a list is
    read by `readers.imported`. group: index of its schema among those of all lists.
    """

    url: str
    name: str
    format: str
    compression: str
    size_bytes: int
    stamp: str
    images: str = ""
    group: int = 0

    @property
    def is_import(self) -> bool:
        """Whether rows come with their images."""
        return self.format in IMPORTS


def list_sources(patterns: Sequence[str], format: str = "auto", key: str = "input") -> tuple[Source, ...]:
    """The files that names, globs and folders stand for: in the order given, folders and globs sorted, each once.

    Folders are searched for files of the formats above (all files when a format is given); names that begin with
    "." or "_" are left out. A folder that is a dataset, and names of tars, stand for the dataset's shards unless a
    format is given. Raises RequestError, naming the configuration key, when a pattern stands for nothing or a format is
    not known.
    """
    found: dict[str, Source] = {}
    for pattern in patterns:
        for source in _expand(pattern, format, key):
            found.setdefault(source.url, source)
    return tuple(found.values())


def open_source(source: Source, path: Path | None = None) -> io.BufferedReader:
    """The file's bytes, decompressed; from a local copy if there is one."""
    raw: Any = open(path, "rb") if path else fsspec.open(source.url, "rb").open()  # noqa: SIM115
    if source.compression == "gzip":
        raw = gzip.GzipFile(fileobj=raw)
    elif source.compression == "zstd":
        # python-zstandard's reader takes a frame that breaks off for the end of the file; Arrow's raises.
        raw = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
    elif source.compression == "bzip2":
        raw = bz2.open(raw)  # noqa: SIM115
    elif source.compression == "xz":
        raw = lzma.open(raw)  # noqa: SIM115
    return io.BufferedReader(raw, BUFFER_BYTES)


@contextlib.contextmanager
def local_copy(source: Source) -> Iterator[tuple[Path, str]]:
    """A local path of the file's bytes as stored, and their hex sha256; a copy that was made is removed."""
    fs, path = fsspec.core.url_to_fs(source.url)
    if isinstance(fs, LocalFileSystem):
        with open(path, "rb") as file:
            yield Path(path), hashlib.file_digest(file, "sha256").hexdigest()
        return
    digest = hashlib.sha256()
    with scratch_folder() as folder:
        copy = folder / "list"
        with fs.open(path, "rb") as remote, open(copy, "wb") as local:
            while piece := remote.read(COPY_BYTES):
                digest.update(piece)
                local.write(piece)
        yield copy, digest.hexdigest()


def _expand(pattern: str, format: str, key: str) -> list[Source]:
    from pipeline.readers.datasets import find_dataset  # which makes sources

    try:
        fs, path = open_file_system(os.path.expanduser(pattern))
    except (ValueError, ImportError) as error:
        raise RequestError(f"{key}={pattern}: cannot open this location: {error}") from None
    try:
        if format == "auto" and (dataset := find_dataset(fs, str(path), f"{key}={pattern}")):
            return dataset
        files, root, chosen = _search(fs, str(path), format)
        sources = [_describe(fs, file, root, format, chosen) for file in files]
    except RequestError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise RequestError(f"{key}={pattern}: cannot be listed: {_one_line(error)}") from None
    if not sources:
        raise RequestError(f"{key}={pattern}: {_nothing(fs, str(path), chosen)}")
    return sources


def _search(fs: Any, path: str, format: str) -> tuple[list[str], str, bool]:
    """(files, the folder that their names are relative to, whether they were chosen by the user one by one)."""
    if _is_web(fs):
        return ([path] if fs.exists(path) else []), posixpath.dirname(path), True
    if any(mark in path for mark in "*?[") and not fs.exists(path):
        fixed = path[: min(path.index(mark) for mark in "*?[" if mark in path)]
        matches = [file for file in sorted(fs.glob(path)) if not _is_hidden(posixpath.basename(file))]
        files = [file for match in matches for file in (_visible(fs, match) if fs.isdir(match) else [match])]
        return files, posixpath.dirname(fixed), True
    if fs.isdir(path):
        return [file for file in _visible(fs, path) if format != "auto" or _guess(file)[0]], path, False
    return ([path] if fs.exists(path) else []), posixpath.dirname(path), True


def _is_web(fs: Any) -> bool:
    return "http" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _visible(fs: Any, folder: str) -> list[str]:
    return [file for file in sorted(fs.find(folder)) if not _is_hidden(file[len(folder.rstrip("/")) :])]


def _describe(fs: Any, file: str, root: str, format: str, chosen: bool) -> Source:
    shown = redact_url(file)
    guessed, compression = _guess(shown.partition("?")[0] if _is_web(fs) else shown)
    if format == "auto" and not guessed:
        raise RequestError(
            f"input={shown}: cannot tell the format from the name (known: {', '.join(FORMATS)}, each also with "
            f"{', '.join(COMPRESSIONS)}); set read.format"
        )
    return Source(
        url=fs.unstrip_protocol(file),
        name=posixpath.relpath(shown, root) if root else shown.lstrip("/"),
        format=guessed if format == "auto" else format,
        compression=compression,
        size_bytes=int(fs.size(file) or 0),
        stamp=str(fs.checksum(file)),
    )


def _guess(file: str) -> tuple[str, str]:
    """(format, compression) by the name's endings, each "" if unknown."""
    stem, ending = posixpath.splitext(posixpath.basename(file).lower())
    compression = COMPRESSIONS.get(ending, "")
    if compression:
        ending = posixpath.splitext(stem)[1]
    return FORMATS.get(ending, ""), compression


def _is_hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/") if part)


def _nothing(fs: Any, path: str, chosen: bool) -> str:
    if _is_web(fs):
        return "no such file there, or the server does not answer"
    if not chosen:
        return f"no list in this folder (looked for {', '.join(FORMATS)})"
    with contextlib.suppress(OSError, NotImplementedError):
        siblings = [posixpath.basename(str(name).rstrip("/")) for name in fs.ls(posixpath.dirname(path), detail=False)]
        if close := difflib.get_close_matches(posixpath.basename(path), siblings, n=1):
            return f"no such file; did you mean {close[0]}?"
    return "no such file, folder or match"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
