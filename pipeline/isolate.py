"""Decoding in child processes, so that a decoder that crashes, hangs or takes all memory costs one image.

Every body comes from strangers, and image libraries have had memory errors in every format, JPEG included, so all of
it happens there. A host process imports the decoders once and forks the children; see `pipeline.decoder_host`. A child
that dies while it decodes is forked anew in milliseconds, and the image it died of is refused with `decoder_crashed`.

Bodies and results pass through shared memory, and a few words of each through sockets that an event loop watches beside
its own: nobody waits for a child, and a child finds its next body there when it has replied.
"""

import atexit
import contextlib
import logging
import select
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from cluster.errors import RunError
from pipeline.config import ImageConfig
from pipeline.decoder_link import DEPTH, Host, Result, Task
from pipeline.picture import Boxes, ImageError
from pipeline.reasons import Reason

log = logging.getLogger(__name__)

MOST_LOST = 4
"""So many times in a row the host may end without a result in between. Then it is not the images."""

_idle: list["Decoders"] = []
_idle_lock = threading.Lock()


@contextlib.contextmanager
def lease_decoders(number: int, config: ImageConfig) -> Iterator["Decoders"]:
    """Decoding processes for one use at a time, kept for the next: a worker process starts them once, not per unit."""
    with _idle_lock:
        decoders = _idle.pop() if _idle else None
    if decoders is not None and (decoders.number, decoders.config) != (number, config):
        decoders.close()
        decoders = None
    decoders = decoders or Decoders(number, config)
    try:
        yield decoders
    except BaseException:  # an interrupt as well: no process is left behind
        decoders.close()
        raise
    with _idle_lock:
        _idle.append(decoders)


@atexit.register
def close_idle() -> None:
    """End the decoding processes that wait for their next use."""
    with _idle_lock:
        while _idle:
            _idle.pop().close()


class Decoders:
    """`number` decoding processes: `give` bodies, and `take` results when `descriptor` is readable, or once a second.

    Results come in any order. Not thread-safe. The processes start with the first body.
    """

    def __init__(self, number: int, config: ImageConfig) -> None:
        self.number = number
        self.config = config
        self._epoll = select.epoll()
        self._host: Host | None = None
        self._waiting: deque[Task] = deque()
        self._refused: list[Result] = []
        self._num_lost = 0
        """How often in a row the host has ended without a result in between."""
        self.num_open = 0
        """Bodies given whose results have not been taken."""

    @property
    def descriptor(self) -> int:
        """What to watch: readable when there is something to do for `take`."""
        return self._epoll.fileno()

    def give(self, token: Any, body: bytes, boxes: Boxes | None = None) -> None:
        """Have `pipeline.images.process` done in another process; the result carries the same token."""
        self.num_open += 1
        self._waiting.append(Task(token, body, boxes or []))
        self._hand_out()

    def take(self) -> list[Result]:
        """What has come: images, or why bodies are none. Raises RunError if no decoder lives."""
        results: list[Result] = []
        now = time.monotonic()
        for descriptor, event in self._epoll.poll(0):
            if self._host is not None and not self._host.act(descriptor, event, results, now):
                self._start_again(has_lived=bool(results))
        if self._host is not None and (task := self._host.overdue(now)) is not None:
            self._refused.append((task.token, ImageError(Reason.DECODER_CRASHED, "took too long")))
            self._end_host(without=task)
        if results:
            self._num_lost = 0
        results += self._refused
        self._refused.clear()
        self.num_open -= len(results)
        self._hand_out()
        return results

    def close(self) -> None:
        """End the processes; bodies that were given are forgotten."""
        if self._host is not None:
            self._end_host()
        self._waiting.clear()
        self.num_open = 0
        self._epoll.close()

    def _hand_out(self) -> None:
        """Let every child have what it can take. After a loss one body at a time: whose fault was it?"""
        while self._waiting:
            if self._host is None:
                self._host = Host(self.number, self.config, self._epoll)
            child = min(self._host.children, key=lambda child: len(child.tasks))
            if len(child.tasks) >= DEPTH or (self._num_lost and self._host.tasks):
                return
            child.give(self._waiting.popleft())

    def _start_again(self, has_lived: bool) -> None:
        """The host has ended: its tasks wait for another, but for one that it was alone with for the second time."""
        assert self._host is not None
        log.warning("the decoding processes ended: starting others")
        self._num_lost = 1 if has_lived else self._num_lost + 1
        tasks = self._host.tasks
        for task in tasks:
            task.num_lost += 1
        is_guilty = len(tasks) == 1 and tasks[0].num_lost > 1
        if is_guilty:
            ended = ImageError(Reason.DECODER_CRASHED, "the decoding processes ended twice")
            self._refused.append((tasks[0].token, ended))
        name = self._host.name
        self._end_host(without=tasks[0] if is_guilty else None)
        if self._num_lost > MOST_LOST:
            raise RunError(f"the decoding processes ended {self._num_lost} times in a row: {name}")

    def _end_host(self, without: Task | None = None) -> None:
        """End the host, if it has not ended by itself. What it was given, `without` apart, waits for the next."""
        host, self._host = self._host, None
        assert host is not None
        self._waiting.extendleft(reversed([task for task in host.tasks if task is not without]))
        host.close()
