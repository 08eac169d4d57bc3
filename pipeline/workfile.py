"""Outputs of earlier stages as later ones read them: only what is still what its marker says."""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cluster.errors import RunError
from cluster.journal import Marker, file_sha256
from cluster.store import Store
from pipeline.generations import split_stage

# What was made from a stage's output and does not fit a new one. Decisions are made again as they were.
_AFTER = {
    "fetch": ("decide/{unit}.json", "dedup", "pack", "verdict", "record"),
    "decide": (),
    "verdict": (),
}


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
        generation, stage = split_stage(self.stage)
        if stage == "record":
            return RunError(f"{store.url_of(self.path)} {problem}; `pairmill verify` says what to do")
        after = [name.format(unit=self.unit) for name in _AFTER[stage] if generation or name != "verdict"]
        markers = [f"{stage}/{self.unit}.json", *after]
        remove = " ".join(store.url_of(f"journal/{generation}{name}") for name in markers)
        again = "downloads it again" if stage == "fetch" else "makes it again"
        return RunError(
            f"stage {self.stage}, unit {self.unit}: {store.url_of(self.path)} {problem}; remove (rm -rf) what follows "
            f"and run the same command, which {again}; if all of work/ is gone, build into a new output\n  {remove}"
        )


@lru_cache(maxsize=4096)
def _sha256_once(path: Path, size_bytes: int, modified_ns: int) -> str:
    """A file's sha256, once in a process: small shards would have it hashed for each of them."""
    return file_sha256(path)
