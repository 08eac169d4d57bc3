"""Outputs of earlier stages as later ones read them: only what is still what its marker says."""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cluster.errors import RunError
from cluster.journal import Marker, file_sha256, marker_path
from cluster.store import Store, is_elsewhere


@dataclass(frozen=True, kw_only=True)
class WorkFile:
    """One output of a finished unit, and the marker that vouches for it."""

    stage: str
    unit: str
    path: str
    sha256: str

    @staticmethod
    def of(marker: Marker, name: str) -> "WorkFile":
        """The output called `name`. Raises KeyError."""
        path = marker.path_of(name)
        sha256 = next(output.sha256 for output in marker.outputs if output.name == name)
        return WorkFile(stage=marker.stage, unit=marker.unit, path=path, sha256=sha256)

    def read(self, store: Store) -> bytes:
        """The whole file. RunError when it is missing or not what its marker says."""
        try:
            data = store.read_bytes(self.path)
        except FileNotFoundError:
            raise self._unusable(store, "is missing") from None
        self._compare(store, hashlib.sha256(data).hexdigest())
        return data

    def read_into(self, store: Store, buffer: memoryview) -> None:
        """`read` into a buffer of bytes that is as large as the file."""
        try:
            store.read_into(self.path, buffer)
        except FileNotFoundError:
            raise self._unusable(store, "is missing") from None
        except EOFError:
            raise self._unusable(store, "is damaged: it is shorter than it was") from None
        self._compare(store, hashlib.sha256(buffer).hexdigest())

    def local(self, store: Store, folder: Path) -> Path:
        """A local file with these bytes, for those that may be large: on a local disk the file itself, else a copy.

        folder: where the copy goes. RunError as for `read`.
        """
        try:
            if store.is_local:
                path = Path(store.full(self.path))
                seen = os.stat(path)
                sha256 = _sha256_once(path, seen.st_size, seen.st_mtime_ns)
            else:
                path = folder / "copy"
                store.get_file(self.path, path)
                sha256 = file_sha256(path)
        except FileNotFoundError:
            raise self._unusable(store, "is missing") from None
        self._compare(store, sha256)
        return path

    def _compare(self, store: Store, sha256: str) -> None:
        if sha256 != self.sha256:
            raise self._unusable(store, "is damaged: its sha256 is not the one that its marker has")

    def _unusable(self, store: Store, problem: str) -> RunError:
        marker = store.url_of(marker_path(self.stage, self.unit))
        where = f"stage {self.stage}, unit {self.unit}: {store.url_of(self.path)} {problem}"
        if is_elsewhere(self.path):
            return RunError(
                f"{where}; it belongs to another dataset, from which this one was made: put it back and run the same "
                "command"
            )
        if not self.path.startswith("work/"):
            return RunError(f"{where}; `pairmill verify {store.url}` says what to do")
        return RunError(
            f"{where}; remove the unit's marker and run the same command, which makes it again and what was made from "
            f"it; if all of work/ is gone, build into a new output\n  {marker}"
        )


@lru_cache(maxsize=4096)
def _sha256_once(path: Path, size_bytes: int, modified_ns: int) -> str:
    """A file's sha256, once in a process: small shards would have it hashed for each of them."""
    return file_sha256(path)
