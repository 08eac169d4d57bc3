"""Checkpoints of a run: written under a step's folder, believed only when the step's marker exists and agrees.

    checkpoints/step-00000100/...      DeepSpeed's state by rank, random state by rank, weights.pt, config, tokenizer
    checkpoints/step-00000100.json     the marker: size and sha256 of every file; written last

A checkpoint that was cut short has no marker; one that was damaged later does not agree with it and is passed over.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import logging
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.disk import full_disk, is_full
from cluster.errors import RunError
from cluster.journal import file_sha256
from cluster.scratch import scratch_folder
from cluster.store import Store
from pipeline.manifest import FileInfo
from training.elastic import convert
from training.engine import Engine

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE = "weights.pt", "config.json", "tokenizer.json"
CLASSES_FILE = "classes.json"
WORK_FOLDER = "work"
CONVERTED = f"{WORK_FOLDER}/universal"
POLL_S = 0.1
GRACE_S = 30.0
PARTS_PATIENCE_S = 1_800.0
TRANSFERS = 8
_CUT_SHORT = re.compile(r"inline_container|PytorchStreamWriter")  # torch.save, where it cannot write on


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
    with scratch_folder() as folder:
        local = folder / Path(path).name
        store.get_file(path, local)
        yield local


class Checkpoints:
    """Saves and loads the checkpoints of a run from inside its process group. Every call is collective.

    A checkpoint is written to a local folder while training waits, and brought to the store behind its back: each
    rank's files by a thread of its own, then the marker by rank 0, once every rank has left the list of its files.
    """

    def __init__(self, store: Store, *, rank: int, num_ranks: int, keep: int) -> None:
        self._store, self._rank, self._num_ranks, self._keep = store, rank, num_ranks, keep
        self._publishing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._ended = threading.Event()
        self.damaged: list[tuple[int, str]] = []
        """Checkpoints that `load_newest` passed over on this rank (rank 0 alone looks): step and damaged file."""

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.wait()
        elif self._publishing:  # what was saved before a failure is worth a moment
            done, _ = concurrent.futures.wait([self._publishing], timeout=GRACE_S)
            if error := self._publishing.exception() if done else f"not done within {GRACE_S:g} s":
                logger.warning("the newest checkpoint was not published: %s", error)
        self._ended.set()  # a rank that is gone brings no part, and the process cannot end before its threads
        self._thread.shutdown(wait=False, cancel_futures=True)

    def save(self, engine: Engine, *, samples_seen: int, files: dict[str, bytes]) -> None:
        """Save the state after `engine.steps` steps, and begin to publish it; waits for the checkpoint before.

        files: small ones to store beside it, by name. Raises what went wrong with the checkpoint before.
        """
        self.wait()
        info = CheckpointInfo(
            step=engine.steps,
            num_ranks=self._num_ranks,
            zero_stage=engine.zero_stage,
            samples_seen=samples_seen,
            files=(),
        )
        tag = tag_of(info.step)
        if self._rank == 0:  # what an interrupted or damaged attempt at the same step left
            self._store.remove(f"{info.folder}.json")
            self._store.remove(info.folder)
        dist.barrier()
        with _full_disk_named(self._store), contextlib.ExitStack() as stack:
            scratch = stack.enter_context(self._scratch())
            engine.save(str(scratch), tag, {"samples_seen": samples_seen})
            torch.save(_random_state(), scratch / tag / f"random-{self._rank:05}.pt")
            weights = engine.full_weights()
            if self._rank == 0:
                torch.save(weights, scratch / tag / WEIGHTS_FILE)
                for name, data in files.items():
                    (scratch / tag / name).write_bytes(data)
            self._publishing = self._thread.submit(self._publish, info, scratch / tag, stack.pop_all())

    def wait(self) -> None:
        """Wait until what was saved is published. Raises what went wrong with it."""
        if self._publishing:
            self._publishing.result()
        self._publishing = None

    def load_newest(self, engine: Engine) -> int:
        """Take over the newest valid checkpoint, if there is one; returns the number of steps it has behind it.

        Another number of ranks than wrote it sees the same samples, crops and masks: only sums change their order.
        """
        found: list[CheckpointInfo | None] = [None]
        if self._rank == 0:
            self._store.remove(WORK_FOLDER)  # what a killed group had not published: as large as a checkpoint
            found[0], self.damaged = search_valid(self._store)
        dist.broadcast_object_list(found, src=0)
        info = found[0]
        if info is None:
            return 0
        files = [file.path for file in info.files]
        with _full_disk_named(self._store), self._local_folder(info.folder, files) as folder:
            if info.num_ranks == self._num_ranks or info.zero_stage == 0:
                engine.load(str(folder.parent), folder.name)
            else:
                self._load_converted(engine, info, folder)
            writer = self._rank % info.num_ranks  # without effect: order, crops and masks have no state
            _set_random_state(torch.load(folder / f"random-{writer:05}.pt", weights_only=True))
        assert engine.steps == info.step
        return info.step

    def _load_converted(self, engine: Engine, info: CheckpointInfo, folder: Path) -> None:
        """Rank 0 converts, all ranks load."""
        converted = f"{CONVERTED}/{tag_of(info.step)}"
        if self._rank == 0:
            with self._scratch() as scratch:
                convert(folder, scratch / "all")
                files = [path for path in (scratch / "all").rglob("*") if path.is_file()]
                at_once(
                    lambda local: self._store.put_file(local, f"{converted}/{local.relative_to(scratch / 'all')}"),
                    files,
                )
        dist.barrier()
        weights = torch.load(folder / WEIGHTS_FILE, weights_only=True)
        with self._local_folder(converted, [entry.path for entry in self._store.find(converted)]) as local_folder:
            engine.load_converted(str(local_folder.parent), local_folder.name, weights)
        dist.barrier()
        if self._rank == 0:
            self._store.remove(CONVERTED)

    def _publish(self, info: CheckpointInfo, folder: Path, cleanup: contextlib.ExitStack) -> None:
        """Bring this rank's files to the store; rank 0 then makes the marker."""
        with cleanup:
            files = []
            for local in sorted(path for path in folder.rglob("*") if path.is_file()):
                path = f"{info.folder}/{local.relative_to(folder)}"
                size_bytes, sha256 = local.stat().st_size, file_sha256(local)
                self._store.put_file(local, path)
                files.append(FileInfo(path=path, size_bytes=size_bytes, sha256=sha256))
        part = json.dumps([asdict(file) for file in files]).encode()
        self._store.write_bytes(_part_path(info, self._rank), part)
        if self._rank == 0:
            parts = [self._await_part(_part_path(info, rank)) for rank in range(self._num_ranks)]
            whole = dataclasses.replace(info, files=tuple(sorted(itertools.chain(*parts), key=lambda file: file.path)))
            for rank in range(self._num_ranks):
                self._store.remove(_part_path(info, rank))
            self._store.write_bytes(f"{info.folder}.json", whole.to_json())
            self._prune(info.step)

    def _await_part(self, path: str) -> list[FileInfo]:
        """The list of a rank's files, once it is there. RunError when it does not come."""
        deadline = time.monotonic() + PARTS_PATIENCE_S
        while True:
            try:
                return [FileInfo(**file) for file in json.loads(self._store.read_bytes(path))]
            except FileNotFoundError:
                if self._ended.wait(POLL_S) or time.monotonic() > deadline:
                    raise RunError(
                        f"{self._store.url_of(path)}: a rank has not brought its part of the checkpoint to the store "
                        f"within {PARTS_PATIENCE_S / 60:.0f} minutes; run the same command again"
                    ) from None

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
        if not self._store.is_local:
            with scratch_folder() as folder:
                yield folder
            return
        parent = self._store.full(WORK_FOLDER)
        Path(parent).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"checkpoint-{self._rank}-", dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _local_folder(self, folder: str, paths: Sequence[str]) -> Iterator[Path]:
        """A local folder of the same name with the store's objects `paths`, which lie below `folder`."""
        if self._store.is_local:
            yield Path(self._store.full(folder))
            return
        with scratch_folder() as temporary:
            parent = Path(folder).parent
            at_once(lambda path: self._store.get_file(path, temporary / Path(path).relative_to(parent)), paths)
            yield temporary / Path(folder).name


@contextmanager
def _full_disk_named(store: Store) -> Iterator[None]:
    """RunError with the full disk's name for what is raised inside because of one."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if is_full(error) or _CUT_SHORT.search(str(error)):
            raise full_disk(*([store.url] if store.is_local else [])) from error
        raise


def at_once(transfer: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Several transfers at a time: a converted checkpoint is three small files a parameter. Raises what any raised."""
    with ThreadPoolExecutor(TRANSFERS) as pool:
        for _ in pool.map(transfer, items):
            pass


def _part_path(info: CheckpointInfo, rank: int) -> str:
    """Where a rank says which files it has brought; gone when the marker is made."""
    return f"{info.folder}/files-{rank:05}.json"


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
