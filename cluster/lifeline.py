"""Noticing that the Ray cluster is gone.

A driver whose cluster has lost its head waits a minute inside Ray, which then aborts the process. Here a thread asks
the head's port now and then; when it has not answered for `PATIENCE_S`, the command ends with a message of ours first.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from cluster.errors import EXIT_FAILED, RunError

logger = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""A head that is started again with its state (GCS fault tolerance) has so long; Ray itself gives up after 60 s."""
GRACE_S = 10.0
PROBE_S, PROBE_TIMEOUT_S = 2.0, 5.0

_lost = threading.Event()


@contextlib.contextmanager
def lifeline(address: str) -> Iterator[None]:
    """Watch the head at `address` (host:port) while inside; `raise_if_lost` tells.

    A command that has not noticed within GRACE_S, because it is waiting inside Ray, is ended from here.
    """
    ended = threading.Event()
    _lost.clear()

    def watch() -> None:
        answered = time.monotonic()
        while not ended.wait(PROBE_S):
            if _answers(address):
                answered = time.monotonic()
            elif time.monotonic() - answered > PATIENCE_S:
                _lost.set()
                if not ended.wait(GRACE_S):
                    print(f"pairmill: {_message()}", file=sys.stderr, flush=True)
                    os._exit(EXIT_FAILED)
                return

    thread = threading.Thread(target=watch, name="lifeline", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def raise_if_lost() -> None:
    """Raise RunError if the cluster has been away for too long."""
    if _lost.is_set():
        raise RunError(_message())


def _message() -> str:
    return (
        f"the Ray cluster has not answered for {PATIENCE_S:.0f} s: its head has ended or cannot be reached; what is "
        "finished is kept, run the same command to go on when there is a cluster (ray.address may be another)"
    )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True
