"""Where the ledger of hosts is: in this process, or in Ray actors that every task of the cluster asks.

Beside slots the ledger keeps *notes*: what a site's robots.txt and tdmrep.json say, so that the cluster asks for each
once a day.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol
from zlib import crc32

from pipeline.config import FetchConfig
from pipeline.hosts import Ask, Grant, Ledger

LEASE_MARGIN_S = 2.0
CORES_PER_SHARD = 256
"""One actor answers some thousand calls a second, a task asks it ten times a second at most."""
NOTE_LIFE_S = 24 * 3_600.0
"""RFC 9309, 2.4: a cached robots.txt should not be used for more than 24 hours."""
TROUBLE_LIFE_S = 600.0
NOTES_BYTES = 256 * 2**20


class Note(NamedTuple):
    """A site's file as it was fetched: its status, None if there was no answer, and its content."""

    http_status: int | None
    text: str

    @property
    def is_trouble(self) -> bool:
        """The site could not say what it wants: ask again soon."""
        return self.http_status is None or self.http_status >= 500 or self.http_status == 429


class Message(NamedTuple):
    """What a task says: of hosts, files that it asks for, files that it has fetched (both by URL)."""

    holder: str
    asks: dict[str, Ask]
    questions: tuple[str, ...]
    notes: dict[str, Note]


class Answer(NamedTuple):
    """The ledger's answer; `notes` has those questions that somebody has answered.

    silent_s: it was started again, and for so long it grants nothing to anybody.
    """

    grants: dict[str, Grant]
    notes: dict[str, Note]
    silent_s: float = 0.0


class Notebook:
    """Notes by URL, each for its life, the oldest forgotten when there are too many bytes."""

    def __init__(self, max_bytes: int = NOTES_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._size_bytes = 0
        self._notes: OrderedDict[str, tuple[float, Note]] = OrderedDict()

    def keep(self, url: str, note: Note) -> None:
        self._drop(url)
        life_s = TROUBLE_LIFE_S if note.is_trouble else NOTE_LIFE_S
        self._notes[url] = (self._clock() + life_s, note)
        self._size_bytes += len(url) + len(note.text)
        while self._size_bytes > self._max_bytes:
            self._drop(next(iter(self._notes)))

    def get(self, url: str) -> Note | None:
        entry = self._notes.get(url)
        return entry[1] if entry and entry[0] > self._clock() else None

    def _drop(self, url: str) -> None:
        if entry := self._notes.pop(url, None):
            self._size_bytes -= len(url) + len(entry[1].text)


class Desk:
    """A ledger and a notebook: answers messages, one at a time."""

    def __init__(self, config: FetchConfig, *, restarted: bool = False) -> None:
        lease_s = lease_of(config)
        self._ledger = Ledger(
            connections=config.connections_per_host,
            requests_per_s=config.requests_per_s_per_host,
            lease_s=lease_s,
            silent_s=lease_s if restarted else 0.0,
        )
        self._notebook = Notebook()

    def answer(self, message: Message) -> Answer:
        for url, note in message.notes.items():
            self._notebook.keep(url, note)
        found = {url: known for url in message.questions if (known := self._notebook.get(url))}
        return Answer(self._ledger.call(message.holder, message.asks), found, self._ledger.silent_s)


def lease_of(config: FetchConfig) -> float:
    """How long a lease holds: a request that begins in its first half has ended, at the latest by its timeout,
    before the lease is over, so nothing has to be renewed in time for the limit to hold."""
    return 2 * config.timeout_s + LEASE_MARGIN_S


class Ledgers(Protocol):
    """The ledgers of all hosts, sharded by host. Can be pickled and sent to workers."""

    @property
    def num_shards(self) -> int: ...

    @property
    def answers_at_once(self) -> bool:
        """Whether `send` returns finished futures."""

    def send(self, shard: int, message: Message) -> "Future[Answer]":
        """Ask a shard; never blocks. The future fails when the shard cannot be reached just now."""


class LocalLedgers:
    """One ledger in this process, for a build without Ray and for tests."""

    num_shards = 1
    answers_at_once = True

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._desk = Desk(config)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalLedgers, (self._config,)

    def send(self, shard: int, message: Message) -> "Future[Answer]":
        future: Future[Answer] = Future()
        future.set_result(self._desk.answer(message))
        return future


class HostLedger(Desk):
    """A desk as a Ray actor."""

    def __init__(self, config: FetchConfig) -> None:
        import ray

        super().__init__(config, restarted=ray.get_runtime_context().was_current_actor_reconstructed)


@dataclass(frozen=True, kw_only=True)
class RayLedgers:
    """Ray actors that need no core. One that dies is started again and grants nothing until its old leases are over."""

    actors: tuple[Any, ...]
    answers_at_once: bool = field(default=False, init=False)

    @staticmethod
    def start(config: FetchConfig) -> "RayLedgers":
        """Start them on the connected cluster; they end with this process."""
        import ray

        num_cores = float(ray.cluster_resources().get("CPU", 1.0))
        remote = ray.remote(num_cpus=0, max_restarts=-1)(HostLedger)
        return RayLedgers(actors=tuple(remote.remote(config) for _ in range(1 + int(num_cores) // CORES_PER_SHARD)))

    @property
    def num_shards(self) -> int:
        return len(self.actors)

    def send(self, shard: int, message: Message) -> "Future[Answer]":
        future: Future[Answer] = self.actors[shard].answer.remote(message).future()
        return future


def shard_of(host: str, num_shards: int) -> int:
    """The shard that a host belongs to."""
    return crc32(host.encode()) % num_shards if num_shards > 1 else 0
