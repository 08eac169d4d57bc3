"""A host as one fetch task sees it: the slots and start times that it holds, and what it has to say of it."""

from collections import deque
from dataclasses import dataclass, field

from pipeline.hosts import Ask, Grant

POLL_S = (0.02, 0.5)
"""How soon and, in the end, how often to ask again for a slot that others have."""
CLOSED_S = 1.0
"""How often to look at a host that has asked to be left alone."""


@dataclass(slots=True)
class Door:
    """`until`: requests may begin before then. Times are of `time.monotonic`."""

    every_s: float = 0.0
    granted: int = 0
    until: float = 0.0
    busy: int = 0
    waiting: set[str] = field(default_factory=set)
    starts: "deque[float] | None" = None
    """When requests may begin, each within `spacing_s`; None if the host has no rate."""
    spacing_s: float = 0.0
    peak: int = 0
    """The most requests under way since the ledger was told."""
    asked_at: float = 0.0
    ended_at: float = 0.0
    told_at: float = 0.0
    next_poll: float = 0.0
    poll_s: float = POLL_S[0]
    moved_at: float = 0.0
    """When a request began or ended, or a wait began."""
    closed_until: float = 0.0
    """The host has told us, or another task, to leave it alone until then."""
    news_until: float = 0.0
    """The same, if we know it and the ledger does not."""
    since: float = 0.0
    """When the host was first asked for."""

    def may_start(self, now: float) -> bool:
        if self.busy >= self.granted or not self.closed_until <= now < self.until:
            return False
        if self.starts is None:
            return True
        while self.starts and self.starts[0] + self.spacing_s < now:
            self.starts.popleft()  # a start that is late would crowd the next one, which may be another task's
        return bool(self.starts and self.starts[0] <= now)

    def lacks(self, limit: int, now: float) -> bool:
        """Whether the ledger could give what is missing for another request."""
        if now < max(self.next_poll, self.closed_until):
            return False
        return now >= self.until or self.granted <= self.busy < limit or (self.starts is not None and not self.starts)

    def wish(self, every_s: float) -> None:
        """The time between two requests that the host wants, 0 if it does not care or whoever asks does not know."""
        self.every_s = every_s or self.every_s
        if self.every_s and self.starts is None:  # the ledger has not heard of it yet
            self.starts = deque()

    def begin(self, url: str, now: float) -> None:
        """A request takes a slot, and its start if the host has a rate."""
        self.busy += 1
        self.peak = max(self.peak, self.busy)
        self.waiting.discard(url)
        self.moved_at = now
        self.poll_s = POLL_S[0]
        if self.starts is not None:
            self.starts.popleft()

    def close(self, until: float) -> None:
        """The host has told us to leave it alone."""
        self.news_until = max(self.news_until, until)
        self.closed_until = max(self.closed_until, until)

    def next_look(self, now: float) -> float:
        """When it is worth asking again for a request to begin."""
        if self.closed_until > now:
            return min(now + CLOSED_S, self.closed_until)
        return self.starts[0] if self.starts else min(self.next_poll, self.until)

    def tell(self, limit: int, now: float) -> Ask:
        """What the ledger is told now."""
        wanted = self.peak if self.busy else 0
        if self.waiting:  # twice as many as before: the engine may show its jobs one at a time
            wanted = min(limit, self.busy + max(self.busy, len(self.waiting)))
        self.peak = self.busy
        self.granted = min(self.granted, wanted)  # what is given back is not used while the call is under way
        self.told_at = now
        starts = max(0, len(self.waiting) - len(self.starts or ()))
        return Ask(wanted, self.busy, starts, self.every_s, max(0.0, self.news_until - now))

    def hear(self, grant: Grant, ask: Ask, now: float) -> None:
        """The ledger's answer to what it was told last."""
        self.granted = grant.slots
        if grant.closed_s > 0:
            self.closed_until = max(self.closed_until, now + grant.closed_s)
        if self.news_until <= self.told_at + ask.closed_s:  # else there is more news already
            self.news_until = 0.0
        if grant.every_s:
            self.spacing_s = grant.every_s
            self.starts = self.starts or deque()
            self.starts.extend(now + grant.first_s + place * grant.every_s for place in range(grant.starts))
        if grant.slots < ask.wanted or grant.starts < ask.starts:
            self.poll_s = min(POLL_S[1], self.poll_s * 2)
            self.next_poll = now + self.poll_s
