"""Checkpoints of a run: written under a step's folder, believed only when the step's marker exists and agrees.

    checkpoints/step-00000100/...      DeepSpeed's state by rank, random state by rank, weights.pt, config, tokenizer
    checkpoints/step-00000100.json     the marker: size and sha256 of every file; written last

A checkpoint that was cut short has no marker; one that was damaged later does not agree with it and is passed over.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.journal import file_sha256
from cluster.store import Store
from pipeline.manifest import FileInfo
from training.engine import Engine

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE = "weights.pt", "config.json", "tokenizer.json"
CLASSES_FILE = "classes.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a marker says. `files` are relative to the run's folder."""

    step: int
    num_ranks: int
    zero_stage: int
    samples_seen: int
    files: tuple[FileInfo, ...]

    @property
    def folder(self) -> str:
        """Relative to the run's folder."""
        return f"{FOLDER}/{tag_of(self.step)}"

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def from_json(data: bytes) -> "CheckpointInfo":
        """Read a marker. Raises ValueError, KeyError or TypeError when it is none."""
        plain: dict[str, Any] = json.loads(data)
        files = tuple(FileInfo(**file) for file in plain.pop("files"))
        return CheckpointInfo(files=files, **plain)


def tag_of(step: int) -> str:
    """Name of a step's checkpoint; names sort by step."""
    return f"step-{step:08}"


def published(store: Store) -> Iterator[CheckpointInfo]:
    """Every checkpoint that has a readable marker, newest first. Its files are not looked at."""
    markers = [entry.path for entry in store.find(FOLDER) if _is_marker(entry.path)]
    for path in sorted(markers, reverse=True):
        try:
            yield CheckpointInfo.from_json(store.read_bytes(path))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            logger.warning("checkpoint marker=%s is not readable: %s", store.url_of(path), error)


def newest_valid(store: Store) -> CheckpointInfo | None:
    """The newest checkpoint whose files all have the size and sha256 that its marker names."""
    valid, damaged = search_valid(store)
    for step, file in damaged:
        logger.warning("checkpoint step=%d is passed over: %s is missing or damaged", step, file)
    return valid


def search_valid(store: Store) -> tuple[CheckpointInfo | None, list[tuple[int, str]]]:
    """The newest valid checkpoint, and the newer ones that are not: step and first damaged file of each."""
    damaged: list[tuple[int, str]] = []
    for info in published(store):
        if not (file := first_damaged(store, info)):
            return info, damaged
        damaged.append((info.step, file))
    return None, damaged


def first_damaged(store: Store, info: CheckpointInfo) -> str | None:
    """The first file of a checkpoint that is missing, or has another size or sha256 than its marker says."""
    for file in info.files:
        try:
            if store.size_bytes(file.path) != file.size_bytes:
                return file.path
        except FileNotFoundError:
            return file.path
    for file in info.files:  # after all sizes: reading everything to find a missing file would be slow
        with local_copy(store, file.path) as path:
            if file_sha256(path) != file.sha256:
                return file.path
    return None


@contextmanager
def local_copy(store: Store, path: str) -> Iterator[Path]:
    """A local path with an object's content: the object itself on a local disk, else a temporary copy."""
    if store.is_local:
        yield Path(store.full(path))
        return
    with tempfile.TemporaryDirectory(prefix="pairmill-") as folder:
        local = Path(folder) / Path(path).name
        store.get_file(path, local)
        yield local


class Checkpoints:
    """Saves and loads the checkpoints of a run from inside its process group. Every call is collective."""

    def __init__(self, store: Store, *, rank: int, num_ranks: int, keep: int) -> None:
        self._store, self._rank, self._num_ranks, self._keep = store, rank, num_ranks, keep
        self.damaged: list[tuple[int, str]] = []
        """Checkpoints that `load_newest` passed over on this rank (rank 0 alone looks): step and damaged file."""

    def save(self, engine: Engine, *, samples_seen: int, files: dict[str, bytes]) -> None:
        """Publish the state after `engine.steps` steps; files: small ones to store beside it, by name."""
        tag = tag_of(engine.steps)
        if self._rank == 0:  # what an interrupted or damaged attempt at the same step left
            self._store.remove(f"{FOLDER}/{tag}.json")
            self._store.remove(f"{FOLDER}/{tag}")
        dist.barrier()
        with self._scratch() as scratch:
            engine.save(str(scratch), tag, {"samples_seen": samples_seen})
            torch.save(_random_state(), scratch / tag / f"random-{self._rank:05}.pt")
            weights = engine.full_weights()
            if self._rank == 0:
                torch.save(weights, scratch / tag / WEIGHTS_FILE)
                for name, data in files.items():
                    (scratch / tag / name).write_bytes(data)
            published_here = self._publish(scratch / tag, f"{FOLDER}/{tag}")
        everywhere: list[list[FileInfo]] = [[] for _ in range(self._num_ranks)]
        dist.all_gather_object(everywhere, published_here)
        if self._rank == 0:
            info = CheckpointInfo(
                step=engine.steps,
                num_ranks=self._num_ranks,
                zero_stage=engine.zero_stage,
                samples_seen=samples_seen,
                files=tuple(sorted((file for files in everywhere for file in files), key=lambda file: file.path)),
            )
            self._store.write_bytes(f"{FOLDER}/{tag}.json", info.to_json())
            self._prune(engine.steps)

    def load_newest(self, engine: Engine) -> int:
        """Take over the newest valid checkpoint, if there is one; returns the number of steps it has behind it."""
        found: list[CheckpointInfo | None] = [None]
        if self._rank == 0:
            found[0], self.damaged = search_valid(self._store)
        dist.broadcast_object_list(found, src=0)
        info = found[0]
        if info is None:
            return 0
        with self._local_folder(info) as folder:
            engine.load(str(folder.parent), folder.name)
            _set_random_state(torch.load(folder / f"random-{self._rank:05}.pt", weights_only=True))
        assert engine.steps == info.step
        return info.step

    def _publish(self, folder: Path, target: str) -> list[FileInfo]:
        files = []
        for local in sorted(path for path in folder.rglob("*") if path.is_file()):
            path = f"{target}/{local.relative_to(folder)}"
            size_bytes, sha256 = local.stat().st_size, file_sha256(local)
            self._store.put_file(local, path)
            files.append(FileInfo(path=path, size_bytes=size_bytes, sha256=sha256))
        return files

    def _prune(self, newest_step: int) -> None:
        """Remove all but the newest `keep`: the marker first, so that half a checkpoint is never believed.

        What is newer than `newest_step` was damaged, or this run would stand there; a folder without a marker was cut
        short. Both go as well.
        """
        kept = [info.folder for info in published(self._store) if info.step <= newest_step][: self._keep]
        names = {entry.path.removeprefix(f"{FOLDER}/").partition("/")[0] for entry in self._store.find(FOLDER)}
        folders = {f"{FOLDER}/{name.removesuffix('.json')}" for name in names if name.startswith("step-")}
        for folder in sorted(folders - set(kept)):
            self._store.remove(f"{folder}.json")
            self._store.remove(folder)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder to write to; on a local disk on the same file system, so that publishing is a rename."""
        parent = None
        if self._store.is_local:
            parent = self._store.full("work")
            Path(parent).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"checkpoint-{self._rank}-", dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _local_folder(self, info: CheckpointInfo) -> Iterator[Path]:
        if self._store.is_local:
            yield Path(self._store.full(info.folder))
            return
        with tempfile.TemporaryDirectory(prefix="pairmill-") as temporary:
            for file in info.files:
                self._store.get_file(file.path, Path(temporary) / Path(file.path).relative_to(FOLDER))
            yield Path(temporary) / tag_of(info.step)


def _is_marker(path: str) -> bool:
    return path.endswith(".json") and path.count("/") == 1


def _random_state() -> dict[str, Any]:
    """Torch's generators; order, crops and masks have no state (see training/random.py)."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
