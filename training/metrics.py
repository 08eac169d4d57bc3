"""What a run records: JSON lines of every rank, TensorBoard curves and the progress file of rank 0.

    metrics/rank0.jsonl     one line a logged step, flat: step, loss, loss/NAME, metric/NAME, lr, samples_per_s, ...
    tensorboard/            the same numbers of rank 0
    progress.json           the newest line of rank 0 with totals, about once a second

On a local disk lines are appended where they belong; on an object store they are kept aside and uploaded by `sync`.
"""

import json
import logging
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from cluster.store import Store

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
STOP_FILE = "stop"
METRICS_FOLDER, TENSORBOARD_FOLDER = "metrics", "tensorboard"
_BEACON_INTERVAL_S = 1.0

Line = dict[str, float | int | str]


class RunLog:
    """The records of one rank. Lines of steps that a resumed run will do again are dropped first."""

    def __init__(self, store: Store, *, rank: int, start_step: int) -> None:
        self._store, self._rank = store, rank
        self._temporary = None if store.is_local else tempfile.TemporaryDirectory(prefix="pairmill-metrics-")
        self._root = Path(self._temporary.name if self._temporary else store.full(""))
        path = f"{METRICS_FOLDER}/rank{rank}.jsonl"
        self._file = self._root / path
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if self._temporary and store.exists(path):
            store.get_file(path, self._file)
        _drop_steps_from(self._file, start_step)
        self._lines = self._file.open("a", encoding="utf-8")
        self._curves = _curves(self._root / TENSORBOARD_FOLDER, start_step) if rank == 0 else None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self._lines.close()
        if self._curves:
            self._curves.close()
        self._upload()
        if self._temporary:
            self._temporary.cleanup()

    def record(self, line: Line) -> None:
        """Record the numbers of one step."""
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        if self._curves:
            for name, value in line.items():
                if name != "step" and not isinstance(value, str):
                    self._curves.add_scalar(name, value, int(line["step"]))

    def sync(self) -> None:
        """Bring everything recorded so far into the store."""
        if self._curves:
            self._curves.flush()
        self._upload()

    def _upload(self) -> None:
        if self._temporary:
            for file in sorted(path for path in self._root.rglob("*") if path.is_file()):
                self._store.write_bytes(str(file.relative_to(self._root)), file.read_bytes())


class Beacon:
    """Rank 0's line to whoever started the run: posts its progress, and sees a request to stop, off the hot path."""

    def __init__(self, store: Store, *, active: bool) -> None:
        """active: False on the other ranks, where it does nothing."""
        self._store, self._active = store, active
        self._newest: dict[str, Any] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="beacon", daemon=True)
        self.stop_requested = False

    def __enter__(self) -> "Beacon":
        if self._active:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._active:
            self._closing.set()
            self._thread.join()
            self._exchange()

    def post(self, progress: dict[str, Any]) -> None:
        """Make `progress` the newest; older ones that were not written yet are forgotten."""
        self._newest = progress | {"written": time.time(), "host": socket.gethostname(), "pid": os.getpid()}

    def _loop(self) -> None:
        self._exchange()
        while not self._closing.wait(_BEACON_INTERVAL_S):
            self._exchange()

    def _exchange(self) -> None:
        newest, self._newest = self._newest, None
        try:
            if newest is not None:
                self._store.write_bytes(PROGRESS_FILE, json.dumps(newest).encode())
            self.stop_requested = self.stop_requested or self._store.exists(STOP_FILE)
        except Exception as error:  # each store has its own; a display is not worth a run, the next second tries again
            logger.warning("progress not written: %s", error)


def read_lines(store: Store, rank: int = 0) -> list[dict[str, Any]]:
    """The recorded lines of a rank, by step; none if there are none yet. A line cut short is left out."""
    try:
        text = store.read_bytes(f"{METRICS_FOLDER}/rank{rank}.jsonl").decode()
    except FileNotFoundError:
        return []
    return list(_parsed(text))


def read_progress(store: Store) -> dict[str, Any] | None:
    """The newest progress, or None before there is any."""
    try:
        loaded = json.loads(store.read_bytes(PROGRESS_FILE))
    except (FileNotFoundError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _parsed(text: str) -> list[dict[str, Any]]:
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _drop_steps_from(file: Path, start_step: int) -> None:
    if file.exists():
        kept = [line for line in _parsed(file.read_text(encoding="utf-8")) if line["step"] < start_step]
        aside = file.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        aside.replace(file)  # at once: killed in the middle, the curve so far would be lost


def _curves(folder: Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start_step)
