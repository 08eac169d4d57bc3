"""One folder on any fsspec file system, with the few operations that a run needs and what each one promises.

Every write is atomic: readers see the whole object or none. `create` is the one exclusive operation: of any number
of writers of the same name exactly one gets True, by a hard link on a local disk and by a conditional put on object
stores that have it (fsspec's mode="create"). Stores with neither fall back to "look, then write", which is safe for
one writer at a time; see docs/formats.md.
"""

import contextlib
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored object: `path` relative to the store's root, and its size."""

    path: str
    size_bytes: int


class Store:
    """A root URL (`out`, `/data/out`, `s3://bucket/out`, `memory://out`, ...) and the objects below it.

    Paths given to methods are relative to the root and use `/`. Instances are cheap and can be pickled.
    """

    def __init__(self, url: str) -> None:
        self._fs: Any
        self._fs, root = fsspec.core.url_to_fs(os.path.expanduser(url) if "://" not in url else url)
        self._root = str(root).rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.url = self._root if self.is_local else url.rstrip("/")

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.url,)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def full(self, path: str) -> str:
        """The absolute path of an object as its file system knows it."""
        return posixpath.join(self._root, path) if path else self._root

    def url_of(self, path: str) -> str:
        """The URL of an object, to print or to give to another program."""
        return posixpath.join(self.url, path) if path else self.url

    def exists(self, path: str) -> bool:
        return bool(self._fs.exists(self.full(path)))

    def size_bytes(self, path: str) -> int:
        """Size of an object. Raises FileNotFoundError."""
        return int(self._fs.size(self.full(path)))

    def read_bytes(self, path: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        return cast(bytes, self._fs.cat_file(self.full(path)))

    def read_range(self, path: str, offset: int, size_bytes: int) -> bytes:
        """`size_bytes` bytes from `offset`, without reading the rest."""
        return cast(bytes, self._fs.cat_file(self.full(path), start=offset, end=offset + size_bytes))

    def open(self, path: str) -> BinaryIO:
        """A seekable binary reader."""
        return cast(BinaryIO, self._fs.open(self.full(path), "rb"))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write or replace an object atomically."""
        if not self.is_local:
            self._make_parent(path)
            self._fs.pipe_file(self.full(path), data)
            return
        with self._local_temporary(path) as temporary:
            _write_synced(temporary, data)
            os.replace(temporary, self.full(path))

    def create(self, path: str, data: bytes) -> bool:
        """Write an object only if there is none of that name; True for the one writer that made it."""
        if self.is_local:
            return self._create_local(path, data)
        self._make_parent(path)
        if self._fs.exists(self.full(path)):
            return False
        try:
            self._fs.pipe_file(self.full(path), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # s3fs reports a lost conditional put as EINVAL instead of FileExistsError.
            if error.errno == 22 and self._fs.exists(self.full(path)):
                return False
            raise
        return True

    def put_file(self, local: Path, path: str) -> None:
        """Move a finished local file into the store under `path`, atomically."""
        if not self.is_local:
            self._make_parent(path)
            self._fs.put_file(str(local), self.full(path))
            local.unlink()
            return
        target = Path(self.full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(local, "rb+") as file:
            os.fsync(file.fileno())
        try:
            os.replace(local, target)
        except OSError:  # another file system
            with self._local_temporary(path) as temporary:
                shutil.copyfile(local, temporary)
                os.replace(temporary, target)
            local.unlink()

    def get_file(self, path: str, local: Path) -> None:
        """Copy an object to a local file."""
        local.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(self.full(path), str(local))

    def find(self, prefix: str = "") -> list[Entry]:
        """Every object below a folder, sorted by path; an absent folder has none."""
        try:
            found: dict[str, dict[str, Any]] = self._fs.find(self.full(prefix), detail=True)
        except FileNotFoundError:
            return []
        start = len(self._root) + 1
        entries = (
            Entry(path=name[start:], size_bytes=int(info["size"] or 0))
            for name, info in found.items()
            if info.get("type", "file") == "file" and len(name) > start
        )
        return sorted(entries, key=lambda entry: entry.path)

    def remove(self, path: str) -> None:
        """Remove an object or a folder with all that is below it; absent is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self.full(path), recursive=True)

    def _make_parent(self, path: str) -> None:
        self._fs.makedirs(posixpath.dirname(self.full(path)), exist_ok=True)

    def _create_local(self, path: str, data: bytes) -> bool:
        with self._local_temporary(path) as temporary:
            _write_synced(temporary, data)
            try:
                os.link(temporary, self.full(path))
            except FileExistsError:
                return False
        return True

    @contextlib.contextmanager
    def _local_temporary(self, path: str) -> Iterator[Path]:
        """A name beside the target, so that rename and link stay inside one file system."""
        target = Path(self.full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
