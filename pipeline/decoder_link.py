"""The near end of the decoding processes: a host, its children, and what each of them has been given."""

import contextlib
import itertools
import json
import mmap
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from cluster.errors import RunError
from pipeline.config import ImageConfig
from pipeline.messages import SHELF_BYTES, Inbox, Outbox
from pipeline.picture import Boxes, ImageError, Processed
from pipeline.reasons import Reason

DEPTH = 2
"""Bodies that a child has at once: one that it decodes, and the next."""
START_TIMEOUT_S = 120
WAIT_FACTOR = 6
"""How many times its processor time an image may take by the clock: a loaded machine is no reason to refuse it."""

SETTINGS = {
    "OPENBLAS_NUM_THREADS": "1",
    # Give images' memory back to the heap, not to the system: 50 page faults an image less.
    "MALLOC_MMAP_THRESHOLD_": str(2**26),
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
}
"""Of the decoding processes' environment."""

Result = tuple[Any, Processed | ImageError]
"""A body's token, and what became of it."""


@dataclass(slots=True, eq=False)
class Task:
    """A body on its way. num_lost: how often a host has ended that had it."""

    token: Any
    body: bytes
    boxes: Boxes
    num_lost: int = 0


class Child:
    """The socket to one decoding process, and its tasks in the order of their results."""

    def __init__(self, ours: socket.socket, memory: mmap.mmap, shelves: range, epoll: select.epoll) -> None:
        ours.setblocking(False)
        epoll.register(ours, select.EPOLLIN)
        self.socket = ours
        self.tasks: deque[Task] = deque()
        self.since = 0.0
        """When it began with the first."""
        self._epoll = epoll
        self._shelves = itertools.cycle(shelves)
        self._inbox, self._outbox = Inbox(ours, memory), Outbox(ours, memory)

    def give(self, task: Task) -> None:
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks.append(task)
        with contextlib.suppress(OSError):  # who is gone will be seen to be gone
            self._outbox.put(next(self._shelves), json.dumps(task.boxes).encode(), task.body)
        if self._outbox:
            self._epoll.modify(self.socket, select.EPOLLIN | select.EPOLLOUT)

    def act(self, event: int, results: list[Result], now: float) -> bool:
        """Write and read what can be; False when the other side is gone."""
        if event & select.EPOLLOUT:
            with contextlib.suppress(OSError):
                self._outbox.flush()
            if not self._outbox:
                self._epoll.modify(self.socket, select.EPOLLIN)
        if event & ~select.EPOLLOUT:
            for words, data in self._inbox.take():
                told = json.loads(words)
                refusal = ImageError(Reason(told["reason"]), told["detail"]) if "reason" in told else None
                results.append((self.tasks.popleft().token, refusal or Processed(data=data, **told)))
                self.since = now
        return not self._inbox.is_closed


class Host:
    """A host process and its children; all that it does is seen at descriptors in `epoll`."""

    def __init__(self, number: int, config: ImageConfig, epoll: select.epoll) -> None:
        pairs = [socket.socketpair() for _ in range(number)]
        shared = os.memfd_create("pairmill")
        os.ftruncate(shared, number * DEPTH * SHELF_BYTES)
        self._memory = mmap.mmap(shared, 0)
        theirs = [shared, *(end.fileno() for _, end in pairs)]
        command = [sys.executable, "-P", "-m", "pipeline.decoder_host", config.model_dump_json(), *map(str, theirs)]
        self.name = " ".join(command[:4])
        self._longest_s = config.decode_timeout_s * WAIT_FACTOR
        self._ready_by: float | None = time.monotonic() + START_TIMEOUT_S
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=theirs,
            env=os.environ | SETTINGS | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for the one who waits for us
        )
        os.close(shared)
        self.children = []
        for first, (ours, other) in zip(range(0, number * DEPTH, DEPTH), pairs, strict=True):
            other.close()
            self.children.append(Child(ours, self._memory, range(first, first + DEPTH), epoll))
        self._child_of = {child.socket.fileno(): child for child in self.children}
        assert self._process.stdout is not None
        epoll.register(self._process.stdout, select.EPOLLIN)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def tasks(self) -> list[Task]:
        """What the children have been given and have not replied to."""
        return [task for child in self.children for task in child.tasks]

    def act(self, descriptor: int, event: int, results: list[Result], now: float) -> bool:
        """Something has happened at a descriptor of ours; False when the host has ended."""
        if child := self._child_of.get(descriptor):
            return child.act(event, results, now)
        if self._ready_by is None or not os.read(descriptor, 64):
            return False
        self._ready_by = None
        for child in self.children:
            child.since = now
        return True

    def overdue(self, now: float) -> Task | None:
        """The task that has taken too long, if there is one. Raises RunError if the host has not even started."""
        if self._ready_by is not None:
            if now > self._ready_by:
                raise RunError(f"the decoding processes did not start within {START_TIMEOUT_S} s: {self.name}")
            return None
        return next((c.tasks[0] for c in self.children if c.tasks and now > c.since + self._longest_s), None)

    def close(self) -> None:
        """End the host; its children end with it. Closed descriptors leave the epoll by themselves."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        for child in self.children:
            child.socket.close()
        self._memory.close()
