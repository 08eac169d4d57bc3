"""One task's side of the ledger: what it holds of each host, and the few batched calls that keep it so.

The engine asks before every request; almost always the answer is here already. Calls to the ledger go out in batches,
are never waited for, and are one at a time to each shard. Whatever the ledger does, the limits hold: a request begins
only under a lease that outlives it.
"""

import logging
import uuid
from concurrent.futures import Future
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pipeline.config import FetchConfig
from pipeline.door import Door
from pipeline.hosts import Ask
from pipeline.ledgers import Answer, Ledgers, Message, Note, lease_of, shard_of

logger = logging.getLogger(__name__)

GATHER_S = 0.001
"""What the engine asks within so long goes out in one call."""
REPLY_S = 0.003
"""How soon an answer of the ledger may be there."""
TOUR_S = 0.125
"""How often all hosts are looked at, for those that have to be mentioned."""
LINGER_S = 0.1
"""A slot is kept for so long after its request has ended: the next one to the host may follow."""
REFRESH_S = (1.0, 0.25)
"""How often hosts with requests under way are mentioned, with one slot and with more: others may wait for a share."""
IDLE_S = 2.0
"""A slot that was waited for and not taken for so long goes back."""
WINDOW_PER_CONNECTION = 4
"""Hosts for which slots are asked ahead of need, a connection."""
NOTES_CHARS, SMALL_CHARS = 2**24, 2**13
"""Of sites' files, what a task keeps. Beyond it those of more than some lines count as not to be had for now."""
LATER_S = 0.25
FAILED_S = 0.5


@dataclass(slots=True)
class _Line:
    """The way to one shard: what is to be told, and the call under way."""

    dirty: dict[str, None] = field(default_factory=dict)
    due: float = float("inf")
    """When it is to be told."""
    questions: set[str] = field(default_factory=set)
    notes: dict[str, Note] = field(default_factory=dict)
    call: "Future[Answer] | None" = None
    told: dict[str, Ask] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    kept: dict[str, Note] = field(default_factory=dict)
    sent_at: float = float("-inf")


class Turnstile:
    """Slots and start times of hosts for one fetch task. Not thread-safe; no method blocks but `close`, briefly."""

    def __init__(self, ledgers: Ledgers, config: FetchConfig) -> None:
        self._ledgers = ledgers
        self._limit = config.connections_per_host
        self._wait_s = config.host_wait_s
        self._usable_s = lease_of(config) - config.timeout_s
        self._window = WINDOW_PER_CONNECTION * config.connections
        self._holder = uuid.uuid4().hex[:12]
        self._doors: dict[str, Door] = {}
        self._lines = [_Line() for _ in range(ledgers.num_shards)]
        self._notes: dict[str, Note | None] = {}
        self._notes_chars = 0
        self._silent_until = 0.0
        """Until then a ledger that was started again grants nothing: nobody's fault, so it is not counted as a wait."""
        self._num_ahead = 0
        """Hosts that are waited for and have no request under way; exact after a tour."""
        self._next_tour = 0.0
        self.num_calls = 0

    def ask(self, url: str, host: str, now: float, every_s: float = 0.0) -> float | None:
        """0.0: a request to the host may begin, and counts until `done`. Else seconds to wait.

        None: no request of ours to this host could begin for `fetch.host_wait_s`, or those that could came so far
        apart, by the host's own wish, that it took so long in all. every_s: that wish, the least time between two.
        """
        door = self._doors.get(host)
        if door is None:
            if self._num_ahead >= self._window:
                return LATER_S
            self._num_ahead += 1
            door = self._doors[host] = Door(moved_at=now, since=now)
        if not door.waiting and not door.busy and now - door.asked_at > IDLE_S:
            door.moved_at = now
        door.asked_at = now
        door.wish(every_s)
        door.waiting.add(url)
        if not door.may_start(now):
            if door.lacks(self._limit, now) and host not in self._line(host).told:
                self._mark(host, now)
            self._exchange(now)
        if door.may_start(now):
            self._begin(door, url, now)
            return 0.0
        waited_s = max(
            now - max(door.moved_at, self._silent_until) if not door.busy else 0.0, now - door.since if every_s else 0.0
        )
        if waited_s > self._wait_s:
            door.waiting.discard(url)
            self._mark(host, now)
            return None
        return self._delay(host, door, now)

    def closed_s(self, host: str, now: float) -> float:
        """For how long a host wants to be left alone, as far as we know."""
        door = self._doors.get(host)
        return max(0.0, door.closed_until - now) if door else 0.0

    def done(self, host: str, now: float, closed_s: float = 0.0) -> None:
        """A request that was let go has ended. closed_s: the host wants to be left alone for so long."""
        door = self._doors[host]
        door.busy -= 1
        door.ended_at = door.moved_at = now
        if closed_s:
            door.close(now + closed_s)
        if closed_s or door.granted <= door.busy:  # we were told to let some requests end: others wait for it
            self._mark(host, now)
            self._exchange(now)

    def tick(self, now: float) -> None:
        """Do what is due; called at every turn of the engine, so it costs next to nothing when nothing is."""
        if now >= self._next_tour:
            self._exchange(now)

    def note(self, url: str, now: float) -> Note | None:
        """What the cluster knows of a site's file; see `is_asking` for whether None is an answer."""
        if url not in self._notes:
            self._notes[url] = None
            line = self._line(urlsplit(url).hostname or "")
            line.questions.add(url)
            self._tell(line, now)
        self._exchange(now)
        return self._notes[url]

    def is_asking(self, url: str) -> bool:
        """Whether the cluster's answer about a file is still on its way."""
        line = self._line(urlsplit(url).hostname or "")
        return url in line.questions or url in line.asked

    def keep(self, url: str, note: Note, now: float) -> None:
        """Tell the cluster, and ourselves, what a file says."""
        self._remember(url, note)
        line = self._line(urlsplit(url).hostname or "")
        line.notes[url] = note
        self._tell(line, now)
        self._exchange(now)

    def close(self) -> None:
        """Give everything back, without waiting for an answer."""
        for index, line in enumerate(self._lines):
            hosts = [host for host in self._doors if self._line(host) is line]
            if hosts or line.notes:
                self._ledgers.send(index, Message(self._holder, {host: Ask(0) for host in hosts}, (), line.notes))
            line.call, line.dirty, line.notes, line.due = None, {}, {}, float("inf")
        self._doors.clear()

    def _remember(self, url: str, note: Note) -> None:
        self._notes_chars += len(note.text)
        is_kept = self._notes_chars <= NOTES_CHARS or len(note.text) <= SMALL_CHARS
        self._notes[url] = note if is_kept else Note(None, "")

    def _begin(self, door: Door, url: str, now: float) -> None:
        self._num_ahead -= not door.busy
        door.begin(url, now)

    def _delay(self, host: str, door: Door, now: float) -> float:
        """When to ask again for a host whose turn has not come."""
        line = self._line(host)
        if host in line.dirty or host in line.told:
            return REPLY_S
        return max(REPLY_S, door.next_look(now) - now)

    def _mark(self, host: str, now: float) -> None:
        line = self._line(host)
        line.dirty[host] = None
        self._tell(line, now)

    def _tell(self, line: _Line, now: float) -> None:
        line.due = min(line.due, now if self._ledgers.answers_at_once else now + GATHER_S)

    def _line(self, host: str) -> _Line:
        return self._lines[shard_of(host, len(self._lines))]

    def _exchange(self, now: float) -> None:
        """Take in answers that have come and send what is due."""
        if now >= self._next_tour:
            self._next_tour = now + TOUR_S
            self._tour(now)
        for index, line in enumerate(self._lines):
            self._take(line, now)
            if line.call is None and now >= line.due:
                self._send(index, line, now)
                self._take(line, now)

    def _tour(self, now: float) -> None:
        """Mention hosts that are in use, and those that no longer are."""
        for host, door in self._doors.items():
            if door.busy:
                if now - door.told_at >= REFRESH_S[door.granted > 1]:
                    self._mark(host, now)
            elif now - max(door.asked_at, door.ended_at) >= (IDLE_S if door.waiting else LINGER_S):
                door.waiting.clear()
                self._mark(host, now)
        self._num_ahead = sum(1 for door in self._doors.values() if door.waiting and not door.busy)

    def _send(self, index: int, line: _Line, now: float) -> None:
        told = {}
        for host in line.dirty:
            if door := self._doors.get(host):
                told[host] = door.tell(self._limit, now)
        message = Message(self._holder, told, tuple(line.questions), line.notes)
        line.told, line.asked, line.kept = told, message.questions, line.notes
        line.dirty, line.questions, line.notes, line.due = {}, set(), {}, float("inf")
        line.sent_at = now
        line.call = self._ledgers.send(index, message)
        self.num_calls += 1

    def _take(self, line: _Line, now: float) -> None:
        """The answer of the call under way, if it has come."""
        if line.call is None or not line.call.done():
            return
        call, told, line.call, line.told = line.call, line.told, None, {}
        asked, line.asked = line.asked, ()
        try:
            answer = call.result()
        except Exception as error:  # whatever Ray says of an actor that is being started again
            logger.warning("the ledger of hosts does not answer, asking again: %s", type(error).__name__)
            line.questions.update(asked)
            line.notes = line.kept | line.notes
            line.dirty |= dict.fromkeys(told)
            line.due = now + FAILED_S
            return
        if answer.silent_s:
            self._silent_until = now + answer.silent_s
        for url, note in answer.notes.items():
            self._remember(url, note)
        for host, grant in answer.grants.items():
            door = self._doors[host]
            door.hear(grant, told[host], now)
            door.until = line.sent_at + self._usable_s
            if not (door.busy or door.waiting or door.granted):
                del self._doors[host]
