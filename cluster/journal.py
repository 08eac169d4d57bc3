"""The journal: which units of a run are done, and what each one wrote. Readers believe only markers.

A unit may run any number of times, anywhere, at the same time. Each attempt writes under names of its own; then one
marker object per unit, created if absent, names the outputs with size and sha256. The attempt that creates the
marker has won; what the others wrote is swept when the stage ends. An output that must have a fixed public name
(`shards/00000.tar`) is moved there before the marker is made: its bytes are a pure function of markers written
earlier, so two attempts that race write the same object.

    journal/<stage>/<unit>.json            the marker
    journal/<stage>.json                   the units planned, and when the stage began
    work/<stage>/<unit>.<attempt>/<name>   outputs
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import RunError
from cluster.scratch import scratch_folder
from cluster.store import Store


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """One file that a unit wrote: `path` is relative to the run's folder."""

    name: str
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Marker:
    """The proof that a unit is done: its outputs, and small counts that later stages and people read.

    inputs: sha256 of the earlier outputs that the unit was made from, see `cluster.lineage`; None in the journals of
    versions that did not write it down.
    """

    stage: str
    unit: str
    attempt: str
    outputs: tuple[OutputFile, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    inputs: Mapping[str, str] | None = None

    def path_of(self, name: str) -> str:
        """Path of the output called `name`. Raises KeyError."""
        for output in self.outputs:
            if output.name == name:
                return output.path
        raise KeyError(f"unit {self.stage}/{self.unit} has no output {name!r}")

    def to_json(self) -> bytes:
        """The marker with a check sum over itself: a flipped bit must not make it vouch for something else."""
        plain = asdict(self)
        return json.dumps(plain | {"check": _check_sum(plain)}, indent=1, sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes) -> "Marker":
        """Raises ValueError, KeyError, TypeError or AttributeError for what is no marker, or not a whole one."""
        plain: dict[str, Any] = json.loads(data)
        check = plain.pop("check", None)
        if check not in (None, _check_sum(plain)):
            raise ValueError("its check sum differs")
        outputs = tuple(OutputFile(**output) for output in plain.pop("outputs"))
        return Marker(outputs=outputs, **plain)

    @staticmethod
    def read(store: Store, path: str) -> "Marker":
        """A stored marker. Raises FileNotFoundError, and RunError for one that a crash of the disk has damaged."""
        try:
            return Marker.from_json(store.read_bytes(path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{store.url_of(path)}: damaged ({error}); remove it and run the same command again"
            ) from None


class UnitOutput:
    """Where one attempt of a unit writes. Files are made under `path(name)`; `count` adds to the marker's counts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._published: dict[str, str | None] = {}
        self.counts: dict[str, int] = {}

    def path(self, name: str, publish_as: str | None = None) -> Path:
        """A local path to write the output `name` to.

        publish_as: the fixed public path in the run's folder, for outputs whose bytes are deterministic.
        """
        self._published[name] = publish_as
        return self._folder / name

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def files(self) -> Iterator[tuple[str, Path, str | None]]:
        """(name, local path, fixed public path) of each output, in the order they were asked for."""
        for name, publish_as in self._published.items():
            yield name, self._folder / name, publish_as


class Journal:
    """Markers and outputs of one run, in its folder on any store. Can be pickled and sent to workers.

    seen: the markers of finished stages that were read through this object, for who asks what a unit is made from.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.seen: dict[str, Mapping[str, Marker]] = {}

    def __reduce__(self) -> tuple[type["Journal"], tuple[Store]]:
        return Journal, (self.store,)

    def marker(self, stage: str, unit: str) -> Marker | None:
        """The unit's marker, or None while it is not done."""
        try:
            return Marker.read(self.store, marker_path(stage, unit))
        except FileNotFoundError:
            return None

    def markers(self, stage: str) -> dict[str, Marker]:
        """Every marker of a stage by unit id, in order of unit id."""
        paths = [entry.path for entry in self.store.find(f"journal/{stage}") if entry.path.endswith(".json")]
        found = self.store.overlapped(lambda path: Marker.read(self.store, path), paths)
        return {marker.unit: marker for marker in sorted(found, key=lambda marker: marker.unit)}

    def announce(self, stage: str, units: Sequence[str]) -> None:
        """Record which units a stage has and when it began, for people who ask for the run's status, and `verify`."""
        plan = {"num_units": len(units), "started": time.time(), "units": list(units)}
        self.store.write_bytes(f"journal/{stage}.json", json.dumps(plan).encode())

    @contextlib.contextmanager
    def attempt(self, stage: str, unit: str) -> Iterator[UnitOutput]:
        """A place for one attempt's files; removed on leaving, whatever happened. `commit` inside moves them out."""
        if self.store.is_local:  # same file system as the outputs: publishing is a rename
            folder = Path(self.store.full(f"work/{stage}/{unit}.{uuid.uuid4().hex[:12]}.tmp"))
            folder.mkdir(parents=True)
            try:
                yield UnitOutput(folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return
        with scratch_folder() as folder:
            yield UnitOutput(folder)

    def commit(
        self,
        stage: str,
        unit: str,
        output: UnitOutput,
        seconds: float = 0.0,
        inputs: Mapping[str, str] | None = None,
        *,
        replace: bool = False,
    ) -> Marker:
        """Publish an attempt's files and create the unit's marker; returns the marker that won, ours or another's.

        replace: ours wins, whatever is there.
        """
        attempt = uuid.uuid4().hex[:12]
        files = []
        for name, local, publish_as in output.files():
            path = publish_as or f"work/{stage}/{unit}.{attempt}/{name}"
            files.append(self._put(name, local, path))
        marker = Marker(
            stage=stage,
            unit=unit,
            attempt=attempt,
            outputs=tuple(files),
            counts=output.counts,
            seconds=seconds,
            inputs=inputs,
        )
        if replace:
            self.store.write_bytes(marker_path(stage, unit), marker.to_json())
            return marker
        if self.store.create(marker_path(stage, unit), marker.to_json()):
            return marker
        winner = self.marker(stage, unit)
        if winner is None:
            raise FileNotFoundError(f"{marker_path(stage, unit)} was created by another attempt, then removed")
        return winner

    def _put(self, name: str, local: Path, path: str) -> OutputFile:
        """Move a file into the store; its sha256 is computed while the disk or the network takes it."""
        with open(local, "rb") as file, ThreadPoolExecutor(1) as thread:
            size_bytes = os.fstat(file.fileno()).st_size
            digest = thread.submit(hashlib.file_digest, file, "sha256")
            self.store.put_file(local, path)
            return OutputFile(name=name, path=path, size_bytes=size_bytes, sha256=digest.result().hexdigest())

    def sweep(self, stage: str) -> int:
        """Remove what attempts without a marker left behind; returns the number of objects removed.

        Call it when every unit of the stage has a marker and no attempt of it can still be running.
        """
        markers = self.seen.get(stage) or self.markers(stage)
        kept = {output.path for marker in markers.values() for output in marker.outputs}
        orphans = [entry.path for entry in self.store.find(f"work/{stage}") if entry.path not in kept]
        for path in orphans:
            self.store.remove(path)
        if self.store.is_local:
            _remove_empty_folders(Path(self.store.full(f"work/{stage}")))
        return len(orphans)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def marker_path(stage: str, unit: str) -> str:
    """Where a unit's marker is, in the run's folder."""
    return f"journal/{stage}/{unit}.json"


def _check_sum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _remove_empty_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
