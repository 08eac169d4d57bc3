"""One folder on any fsspec file system, with the few operations that a run needs and what each one promises.

Every write is atomic: readers see the whole object or none. `create` is the one exclusive operation: of any number
of writers of the same name exactly one gets True, by a hard link on a local disk and by a conditional put on object
stores that have it (fsspec's mode="create"). Stores with neither fall back to "look, then write", which is safe for
one writer at a time; see docs/formats.md. Remote calls are repeated while the store is out of order (cluster.remote).
"""

import contextlib
import errno
import os
import posixpath
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cluster.disk import full_disk, is_full
from cluster.errors import RequestError, RunError
from cluster.remote import call

# Asked for a folder, their clients make buckets.
_WITHOUT_FOLDERS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
# The extra of this distribution that brings a protocol's library.
_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "azure"),
    "hf": "hf",
}
# Of these nobody has to look before he creates.
_WITH_CONDITIONAL_PUT = _WITHOUT_FOLDERS | {"memory"}


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
        if "@" in urlsplit(url).netloc and "://" in url:
            raise RequestError(
                f"{url.split('://')[0]}://...@...: credentials in a URL would be written into the run's files; "
                "set them in the environment, or in the store's own configuration"
            )
        self._fs: Any
        # Listings are never cached: other processes write here too.
        self._fs, root = open_file_system(
            os.path.expanduser(url) if "://" not in url else url, use_listings_cache=False
        )
        self._root = str(root).rstrip("/")
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._protocols = frozenset(protocols)
        self._has_folders = protocols.isdisjoint(_WITHOUT_FOLDERS)
        self._is_conditional = not protocols.isdisjoint(_WITH_CONDITIONAL_PUT)
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.url = self._root if self.is_local else url.rstrip("/")

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.url,)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def full(self, path: str) -> str:
        """The absolute path of an object as its file system knows it.

        path: below this root, or what `url_of` of another store of the same file system gives; RequestError for one of
        another file system.
        """
        if not is_elsewhere(path):
            return posixpath.join(self._root, path) if path else self._root
        protocol = path.partition("://")[0] if "://" in path else "file"
        if protocol not in self._protocols:
            raise RequestError(f"{path}: cannot be read together with {self.url}, which is on another file system")
        return str(self._fs._strip_protocol(path))

    def url_of(self, path: str) -> str:
        """The URL of an object, to print or to give to another program."""
        if is_elsewhere(path):
            return path
        return posixpath.join(self.url, path) if path else self.url

    def exists(self, path: str) -> bool:
        return bool(self._call(self._fs.exists, path))

    def size_bytes(self, path: str) -> int:
        """Size of an object. Raises FileNotFoundError."""
        return int(self._call(self._fs.size, path))

    def read_bytes(self, path: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        if self.is_local:
            return Path(self.full(path)).read_bytes()
        # Asked for one stream, s3fs does not ask for the size first: half of the requests, where objects are small.
        options = {"max_concurrency": 1} if hasattr(self._fs, "max_concurrency") else {}
        return cast(bytes, self._call(self._fs.cat_file, path, **options))

    def read_range(self, path: str, offset: int, size_bytes: int) -> bytes:
        """`size_bytes` bytes from `offset`, without reading the rest; fewer where the object ends before."""
        if self.is_local:
            with open(self.full(path), "rb") as file:
                file.seek(offset)
                return file.read(size_bytes)
        return cast(bytes, self._call(self._fs.cat_file, path, start=offset, end=offset + size_bytes))

    def read_into(self, path: str, buffer: memoryview, offset: int = 0) -> None:
        """Fill a buffer of bytes with what lies from `offset`: on a local disk no copy is made nor kept in memory.

        Raises FileNotFoundError, and EOFError where the object ends before.
        """
        filled = 0
        if self.is_local:
            with open(self.full(path), "rb", buffering=0) as file:
                while size_bytes := os.preadv(file.fileno(), [buffer[filled:]], offset + filled):
                    filled += size_bytes
                _advise(file, "POSIX_FADV_DONTNEED", offset, len(buffer))
        else:
            data = self.read_range(path, offset, len(buffer)) if len(buffer) else b""
            buffer[: len(data)], filled = data, len(data)
        if filled < len(buffer):
            raise EOFError(f"{self.url_of(path)}: ends before byte {offset + len(buffer):,}")

    def overlapped(self, read: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """`read` of every item. An object store answers each in tens of milliseconds: there the reads overlap."""
        if self.is_local or len(items) < 8:
            return [read(item) for item in items]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(read, items))

    def prefetch(self, paths: Sequence[str]) -> None:
        """Have the disk bring these files while the first of them are read; nothing is done on other stores."""
        if not self.is_local:
            return
        for path in paths:
            with contextlib.suppress(OSError), open(self.full(path), "rb", buffering=0) as file:
                _advise(file, "POSIX_FADV_WILLNEED")

    def open(self, path: str) -> BinaryIO:
        """A seekable binary reader."""
        return cast(BinaryIO, self._call(self._fs.open, path, "rb"))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write or replace an object atomically."""
        if not self.is_local:
            self._write(self._fs.pipe_file, path, data)
            return
        with self._local_temporary(path) as temporary:
            _write_synced(temporary, data)
            os.replace(temporary, self.full(path))

    def create(self, path: str, data: bytes) -> bool:
        """Write an object only if there is none of that name; True for the one writer that made it.

        On an object store a writer that finds its very bytes there has made them, as the answer to a put may be lost:
        writers have to bring different bytes.
        """
        if self.is_local:
            return self._create_local(path, data)
        if not self._is_conditional and self.exists(path):
            return False
        try:
            self._write(self._fs.pipe_file, path, data, mode="create")
        except FileExistsError:
            return self.read_bytes(path) == data
        except OSError as error:
            # s3fs reports a lost conditional put as EINVAL instead of FileExistsError.
            if error.errno == errno.EINVAL and self.exists(path):
                return self.read_bytes(path) == data
            raise
        return True

    def put_file(self, local: Path, path: str) -> None:
        """Move a finished local file into the store under `path`, atomically."""
        if not self.is_local:
            self._write(lambda full: self._fs.put_file(str(local), full), path)
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
        self._call(self._fs.get_file, path, str(local))

    def find(self, prefix: str = "") -> list[Entry]:
        """Every object below a folder, sorted by path; an absent folder has none."""
        try:
            found: dict[str, dict[str, Any]] = self._call(self._fs.find, prefix, detail=True)
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
            self._call(self._fs.rm, path, recursive=True)

    def _call(self, function: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> Any:
        """`function(absolute path, ...)`."""
        if self.is_local:
            return function(self.full(path), *args, **kwargs)
        return call(self.url_of(path), function, self.full(path), *args, **kwargs)

    def _write(self, function: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> None:
        """`_call` for a remote write. RunError where there is no place to write to."""
        try:
            if self._has_folders:
                self._call(lambda full: self._fs.makedirs(posixpath.dirname(full), exist_ok=True), path)
            self._call(function, path, *args, **kwargs)
        except FileNotFoundError as error:
            raise RunError(f"{self.url_of(path)}: cannot be written: {error}; make the bucket first") from error

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
        except OSError as error:
            if is_full(error):
                raise full_disk(target.parent) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)


def _advise(file: Any, advice: str, offset: int = 0, size_bytes: int = 0) -> None:
    """Tell the kernel what comes for a part of a file, where it listens; size 0: to its end."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), offset, size_bytes, getattr(os, advice))


def open_file_system(url: str, **options: Any) -> tuple[Any, str]:
    """(file system, path on it) of a URL. ImportError, naming what to install, where its library is missing."""
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(url.split("://")[0])
        raise ImportError(f"{error}: pip install 'pairmill[{extra}]'" if extra else str(error)) from error
    return fs, str(path)


def is_elsewhere(path: str) -> bool:
    """Whether a path is not relative to a root: an absolute one of a local disk, or a URL."""
    return path.startswith("/") or "://" in path


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
