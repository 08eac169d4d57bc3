"""Host names to addresses, in threads beside an event loop.

libcurl has 20 threads for this, and a name whose servers do not answer holds one of them for many seconds, while the
names behind it use up their own time: among 40 such names, half of 150 good hosts were timeouts. Here a name's time
begins when its turn comes, so dead names may delay others but never fail them.
"""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from pipeline.reasons import Reason

MAX_THREADS = 128
"""A thread sleeps until the answer comes; what it costs is its stack."""
LIFE_S = 600.0
"""How long an answer is used, by all units that a process does."""
MAX_KNOWN = 100_000

_known: dict[str, tuple[float, tuple[str, ...]]] = {}
"""Name -> (end of its life, addresses)."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What became of a name: addresses, or the reason why there are none."""

    name: str
    addresses: tuple[str, ...] = ()
    reason: Reason | None = None
    detail: str | None = None
    seconds: float = 0.0


class Resolver:
    """`look_up` names, then `take` what was found. Not thread-safe but for `wake`, which it calls from its threads."""

    def __init__(self, patience_s: float, wake: Callable[[], None]) -> None:
        self._patience_s = patience_s
        self._wake = wake
        self._todo: SimpleQueue[str | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._running: dict[str, float] = {}
        """Name -> when its turn came, in that order; without those that were given up."""
        self._done: deque[Found] = deque()
        self._num_threads = 0
        self.num_open = 0
        """Names looked up whose finding has not been taken."""

    def look_up(self, name: str) -> None:
        self.num_open += 1
        self._todo.put(name)
        if self._num_threads < MAX_THREADS:
            try:
                threading.Thread(target=self._work, name=f"dns {self._num_threads}", daemon=True).start()
                self._num_threads += 1
            except RuntimeError:  # a container may have no more of them; those that are there do
                if not self._num_threads:
                    raise

    def take(self, now: float) -> list[Found]:
        """What was found, and names that took too long. now: time.monotonic()."""
        if not self.num_open:
            return []
        with self._lock:
            while self._running and (found := self._overdue(now)):
                self._done.append(found)
        taken = [self._done.popleft() for _ in range(len(self._done))]
        self.num_open -= len(taken)
        return taken

    def wait_s(self, most_s: float, now: float) -> float:
        """Seconds until a name takes too long, at least 0 and at most `most_s`."""
        with self._lock:
            started = next(iter(self._running.values()), None)
        return most_s if started is None else max(0.0, min(most_s, started + self._patience_s - now))

    def close(self) -> None:
        """Forget what is under way; nothing wakes anybody from now on."""
        with self._lock:
            self._running.clear()
            self._wake = _ignore
        while not self._todo.empty():
            self._todo.get()
        for _ in range(self._num_threads):
            self._todo.put(None)

    def _overdue(self, now: float) -> Found | None:
        name, started = next(iter(self._running.items()))
        if started + self._patience_s > now:
            return None
        del self._running[name]
        detail = f"no answer about the name within {self._patience_s:g} s"
        return Found(name=name, reason=Reason.TIMEOUT, detail=detail, seconds=now - started)

    def _work(self) -> None:
        while (name := self._todo.get()) is not None:
            started = time.monotonic()
            with self._lock:
                self._running[name] = started
            found = _resolve(name, started)
            with self._lock:
                if self._running.pop(name, None) is not None:
                    self._done.append(found)
                    self._wake()


def known_addresses(name: str, now: float) -> tuple[str, ...] | None:
    """What was found of a name not long ago in this process, by whomever."""
    entry = _known.get(name)
    return entry[1] if entry and entry[0] > now else None


def _resolve(name: str, started: float) -> Found:
    addresses: tuple[str, ...] = ()
    reason = detail = None
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        addresses = tuple(dict.fromkeys(str(answer[4][0]).partition("%")[0] for answer in answers))
        if len(_known) >= MAX_KNOWN:
            _known.clear()
        _known[name] = (time.monotonic() + LIFE_S, addresses)
    except socket.gaierror as error:  # all but a plain no may be otherwise tomorrow
        is_no = error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
        reason, detail = Reason.UNKNOWN_HOST if is_no else Reason.DNS_FAILURE, error.strerror
    except UnicodeError as error:  # a label of more than 63 letters or none
        reason, detail = Reason.UNKNOWN_HOST, str(error)
    except OSError as error:  # such as no file left to open
        reason, detail = Reason.DNS_FAILURE, error.strerror
    seconds = time.monotonic() - started
    return Found(name=name, addresses=addresses, reason=reason, detail=detail, seconds=seconds)


def _ignore() -> None: ...
