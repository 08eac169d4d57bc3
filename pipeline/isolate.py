"""Decoding in child processes, so that a decoder that crashes, hangs or takes all memory costs one image.

Every body comes from strangers, and image libraries have had memory errors in every format, JPEG included, so all of
it happens there. A host process imports the decoders once and forks one child a thread; see `pipeline.decoder_host`.
A child that dies while it decodes is forked anew in milliseconds, and the image it died of is refused with
`decoder_crashed`. Bodies and results pass through sockets (docs/images.md: what that costs).
"""

import atexit
import contextlib
import json
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

from cluster.errors import RunError
from pipeline.config import ImageConfig
from pipeline.messages import receive, send
from pipeline.picture import Boxes, ImageError, Processed
from pipeline.reasons import Reason

log = logging.getLogger(__name__)

BUFFER_BYTES = 2**20
START_TIMEOUT_S = 120
WAIT_FACTOR = 6
"""How many times its processor time an image may take by the clock: a loaded machine is no reason to refuse it."""

_SETTINGS = {
    "OPENBLAS_NUM_THREADS": "1",
    # Give images' memory back to the heap, not to the system: 50 page faults an image less.
    "MALLOC_MMAP_THRESHOLD_": str(2**26),
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
}

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
    except BaseException:
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
    """`number` decoding processes. `process` may be called from so many threads at once; further ones wait."""

    def __init__(self, number: int, config: ImageConfig) -> None:
        self.number = number
        self.config = config
        self._lock = threading.Lock()
        self._host: _Host | None = None
        self._slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(number):
            self._slots.put(slot)

    def process(self, body: bytes, boxes: Boxes | None = None) -> Processed:
        """`pipeline.images.process` in another process. Raises ImageError, and RunError if none can be started."""
        slot = self._slots.get()
        try:
            for _ in range(2):
                host = self._running()
                try:
                    told, data = host.ask(slot, body, boxes or [])
                except _HostLostError:  # not this image's fault: it, or another, was being handed over
                    self._give_up(host)
                    continue
                except TimeoutError:
                    self._give_up(host)
                    raise ImageError(Reason.DECODER_CRASHED, "took too long") from None
                if "reason" in told:
                    raise ImageError(Reason(told["reason"]), told["detail"])
                return Processed(data=data, **told)
        finally:
            self._slots.put(slot)
        raise ImageError(Reason.DECODER_CRASHED, "the decoding processes ended twice")

    def close(self) -> None:
        with self._lock:
            if self._host is not None:
                self._host.close()
                self._host = None

    def _running(self) -> "_Host":
        with self._lock:
            if self._host is None:
                self._host = _Host(self.number, self.config)
            return self._host

    def _give_up(self, host: "_Host") -> None:
        with self._lock:
            if self._host is host:
                log.warning("decoding processes ended: starting others")
                host.close()
                self._host = None


class _HostLostError(Exception):
    pass


class _Host:
    """The host process, and a socket to each of its children."""

    def __init__(self, number: int, config: ImageConfig) -> None:
        self._children: list[socket.socket] = []
        theirs: list[socket.socket] = []
        # Blocking calls with the system's own time-out: polling first would cost another hand-over of the GIL.
        longest = struct.pack("ll", config.decode_timeout_s * WAIT_FACTOR, 0)
        for _ in range(number):
            ours, other = socket.socketpair()
            for end in (ours, other):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, longest)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, longest)
            self._children.append(ours)
            theirs.append(other)
        descriptors = [end.fileno() for end in theirs]
        command = [
            sys.executable,
            "-P",
            "-m",
            "pipeline.decoder_host",
            config.model_dump_json(),
            *map(str, descriptors),
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
            env=os.environ | _SETTINGS | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for the one who waits for us
        )
        for end in theirs:
            end.close()
        assert self._process.stdout is not None
        is_up = _is_readable(self._process.stdout.fileno(), START_TIMEOUT_S)
        if not is_up or self._process.stdout.readline() != b"ready\n":
            self.close()
            raise RunError(f"the decoding process did not start: {' '.join(command[:4])}")

    def ask(self, slot: int, body: bytes, boxes: Boxes) -> tuple[dict[str, Any], bytes]:
        """Hand a body over and wait for what it comes to. Raises TimeoutError, and _HostLostError."""
        child = self._children[slot]
        try:
            send(child, json.dumps(boxes).encode(), body)
            told, data = receive(child)
            return json.loads(told), data
        except BlockingIOError:
            raise TimeoutError from None
        except (EOFError, OSError, ValueError):
            raise _HostLostError from None

    def close(self) -> None:
        """End the host; its children end with it, and threads that wait for them are told."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _is_readable(descriptor: int, timeout_s: float) -> bool:
    """Whether there is something to read before the time is over. select() cannot watch descriptors above 1,023."""
    watch = select.poll()
    watch.register(descriptor, select.POLLIN)
    return bool(watch.poll(timeout_s * 1_000))
