"""How many requests a host gets at once and how often, over the whole cluster: one ledger, asked by every fetch task.

A task holds *slots* of a host (requests that it may have under way) on a lease: a task that dies stops renewing and its
slots come back. Tasks say what they want in total, not what to add, so a message that is lost or repeated does no harm.

The key is the host's name as it stands in the URL, in lower case, without port. It is what site owners see and what
robots.txt belongs to. Addresses would make one host of all sites behind a content network, and registrable domains one
of all the blogs of a hosting service, while a site that spreads over many names has said that it can take it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

TURN_S = 5.0
"""Where more tasks want a host than it has slots, each keeps its slot for this long at most."""
PATIENCE_S = 3.0
"""A task that waits for a slot and has not asked for this long has lost its place."""
HORIZON_S = 1.0
"""Starts under a rate are handed out at most this far ahead: a task that dies wastes no more."""
SWEEP_S = 60.0
LONGEST_CLOSED_S = 24 * 3_600.0
"""No Retry-After is obeyed for longer."""


class Ask(NamedTuple):
    """What a task says of one host. wanted: slots that it could use, 0 gives all back. busy: requests under way.
    starts: requests that wait to begin. every_s: the host's own wish for the time between two requests, 0 none.
    closed_s: it has just asked to be left alone for so long."""

    wanted: int
    busy: int = 0
    starts: int = 0
    every_s: float = 0.0
    closed_s: float = 0.0


class Grant(NamedTuple):
    """The answer. slots: requests that may be under way; fewer than now means that some are to end first.

    Where the host has a rate (`every_s` > 0), `starts` requests may begin, the first in `first_s` and the others
    `every_s` apart; with `starts` 0 it is worth asking again in `first_s`. Nothing may begin for `closed_s`: the host
    has told some task so.
    """

    slots: int
    starts: int = 0
    first_s: float = 0.0
    every_s: float = 0.0
    closed_s: float = 0.0


@dataclass(slots=True)
class _Lease:
    slots: int
    since: float
    until: float


@dataclass(slots=True)
class _Host:
    leases: dict[str, _Lease] = field(default_factory=dict)
    queue: dict[str, float] = field(default_factory=dict)
    """Tasks without a slot, in the order in which they came -> when they last asked."""
    next_start: float = 0.0
    closed_until: float = 0.0

    def forget(self, now: float) -> None:
        """Drop leases that ran out and waiters that no longer ask."""
        for holder in [holder for holder, lease in self.leases.items() if lease.until <= now]:
            del self.leases[holder]
        for holder in [holder for holder, asked in self.queue.items() if asked + PATIENCE_S <= now]:
            del self.queue[holder]

    def is_idle(self, now: float) -> bool:
        return not self.leases and not self.queue and max(self.next_start, self.closed_until) <= now


class Ledger:
    """Who holds which host. Pure but for the clock; one call at a time.

    connections: slots of every host. requests_per_s: starts of every host, None for no limit. lease_s: how long an
    answer holds. silent_s: grant nothing for so long; a ledger that lost its memory waits until old leases are over.
    """

    def __init__(
        self,
        *,
        connections: int,
        requests_per_s: float | None,
        lease_s: float,
        silent_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connections = connections
        self._every_s = 1.0 / requests_per_s if requests_per_s else 0.0
        self._lease_s = lease_s
        self._clock = clock
        self._silent_until = clock() + silent_s
        self._next_sweep = clock() + SWEEP_S
        self._hosts: dict[str, _Host] = {}

    @property
    def num_hosts(self) -> int:
        """Hosts that something is known of."""
        return len(self._hosts)

    @property
    def silent_s(self) -> float:
        """For how long it will grant nothing."""
        return max(0.0, self._silent_until - self._clock())

    def call(self, holder: str, asks: Mapping[str, Ask]) -> dict[str, Grant]:
        """Answer what one task says of some hosts; each answer renews the task's lease of that host."""
        now = self._clock()
        if now >= self._next_sweep:
            self._sweep(now)
        return {name: self._answer(name, holder, ask, now) for name, ask in asks.items()}

    def _answer(self, name: str, holder: str, ask: Ask, now: float) -> Grant:
        host = self._hosts.setdefault(name, _Host())
        host.forget(now)
        host.closed_until = max(host.closed_until, now + min(ask.closed_s, LONGEST_CLOSED_S))
        slots = self._slots(host, holder, ask, now)
        held = max(slots, ask.busy)
        lease = host.leases.pop(holder, None)
        if held:
            since = lease.since if lease else now
            host.leases[holder] = _Lease(slots=held, since=since, until=now + self._lease_s)
        if ask.wanted and not held:
            host.queue[holder] = now
        else:
            host.queue.pop(holder, None)
        grant = self._paced(host, slots, ask, now)._replace(closed_s=host.closed_until - now)
        if host.is_idle(now):
            del self._hosts[name]
        return grant

    def _slots(self, host: _Host, holder: str, ask: Ask, now: float) -> int:
        """How many slots a task may hold: all that are free if nobody waits, else an equal share, in turns."""
        if not ask.wanted or now < max(self._silent_until, host.closed_until):
            return 0
        room = max(0, self._connections - sum(lease.slots for who, lease in host.leases.items() if who != holder))
        waiting = [who for who in host.queue if who != holder]
        if not waiting:
            return min(ask.wanted, room)
        num_tasks = len({*host.leases, *host.queue, holder})
        share = max(1, self._connections // num_tasks)
        mine = host.leases.get(holder)
        if mine is None:
            ahead = list(host.queue).index(holder) if holder in host.queue else len(waiting)
            return min(ask.wanted, share, max(0, room - ahead))
        if num_tasks > self._connections and now - mine.since >= TURN_S:
            return 0
        return min(ask.wanted, share, max(mine.slots, room - len(waiting)), room)

    def _paced(self, host: _Host, slots: int, ask: Ask, now: float) -> Grant:
        """The answer with the moments at which requests may begin, if the host has a rate."""
        every_s = max(self._every_s, ask.every_s)
        if not every_s:
            return Grant(slots)
        first = max(now, host.next_start)
        starts = 0
        if slots and first - now <= HORIZON_S:
            starts = min(ask.starts, 1 + int((now + HORIZON_S - first) / every_s))
        host.next_start = first + starts * every_s
        return Grant(slots, starts, first - now, every_s)

    def _sweep(self, now: float) -> None:
        self._next_sweep = now + SWEEP_S
        for name, host in list(self._hosts.items()):
            host.forget(now)
            if host.is_idle(now):
                del self._hosts[name]
