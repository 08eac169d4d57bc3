"""What a task knows of one host: who waits for it, how many requests it has, and when it is to be left alone.

A circuit breaker: after `fetch.host_failures` transient failures in a row, or one timeout of a host that has never
answered, the host is *open*: one request at a time probes it, after ever longer waits. Its first success closes the
breaker. After `fetch.retries` failed probes, or when it would make the unit wait longer than `fetch.max_wait_s` in all,
the host is *given up*: what is left of it is parked, that is, ends with a transient reason. So it is when the unit has
been busy with it for `fetch.max_busy_s`, however well it answers.
"""

from collections import deque
from dataclasses import dataclass, field

from pipeline.config import FetchConfig
from pipeline.job import Job
from pipeline.reasons import Reason, is_transient

LONGEST_PROBE_WAIT_S = 30.0


@dataclass(kw_only=True)
class HostQueue:
    """One host of one task. Times are of time.monotonic()."""

    name: str
    waiting: deque[Job] = field(default_factory=deque)
    addresses: tuple[str, ...] = ()
    """Of the name, once they are known."""
    looks_up: Job | None = None
    """The job for which the name is being looked up; the others wait."""
    num_active: int = 0
    num_needs: int = 0
    """Downloads such as robots.txt for which the waiting ones have to wait."""
    not_before: float = 0.0
    alarm: float | None = None
    """When the engine is going to look at this host again by itself."""
    given_up: tuple[Reason, str] | None = None
    """Why nothing more is asked of this host."""
    is_down: bool = False
    """Open because it was too slow: a unit does not wait for it at its end."""
    is_open: bool = False
    has_answered: bool = False
    num_failures: int = 0
    num_probes: int = 0
    waited_s: float = 0.0
    busy_s: float = 0.0
    """For how long requests were under way, up to `busy_since`."""
    busy_since: float = 0.0

    def has_room(self, config: FetchConfig, now: float) -> bool:
        """Whether a request may start."""
        if self.looks_up is not None:
            return False
        return now >= self.not_before and self.num_active < (1 if self.is_open else config.connections_per_host)

    def next(self, config: FetchConfig, now: float) -> Job | None:
        """Take out the waiting job that may start now, if there is one."""
        if not self.waiting or not self.has_room(config, now):
            return None
        return self.waiting.popleft() if not self.num_needs or self.waiting[0].is_needed else None

    def begin(self, now: float) -> None:
        """A request begins."""
        if not self.num_active:
            self.busy_since = now
        self.num_active += 1

    def end(self, config: FetchConfig, now: float) -> None:
        """A request has ended; give up if the unit has been busy with the host for too long."""
        self.num_active -= 1
        self.busy_s += now - self.busy_since
        self.busy_since = now
        if self.busy_s > config.max_busy_s and not self.given_up:
            self.given_up = Reason.HOST_UNAVAILABLE, f"not asked again: has kept the unit busy for {self.busy_s:.0f} s"

    def pause(self, seconds: float, config: FetchConfig, now: float) -> None:
        """Ask nothing for some time; give up if that would be too long in all."""
        due = now + seconds
        if due <= self.not_before:
            return
        self.waited_s += due - max(now, self.not_before)
        self.not_before = due
        if self.waited_s > config.max_wait_s:
            self.given_up = Reason.HOST_UNAVAILABLE, f"not asked again: would have to wait for {self.waited_s:.0f} s"

    def succeeded(self) -> None:
        """It has given an answer that is not a transient failure."""
        self.has_answered = True
        self.is_open = self.is_down = False
        self.num_failures = self.num_probes = 0

    def failed(self, reason: str, config: FetchConfig, now: float) -> None:
        """A request has failed, maybe for the moment only."""
        if not is_transient(reason):
            return self.succeeded()
        self.num_failures += 1
        is_dead = reason == Reason.TIMEOUT and not self.has_answered
        was_probe = self.is_open and now >= self.not_before
        self.is_open = self.is_open or is_dead or self.num_failures >= config.host_failures
        self.is_down = self.is_down or is_dead or (self.is_open and reason == Reason.TIMEOUT)
        if was_probe and self.num_probes > config.retries:
            self.given_up = Reason.HOST_UNAVAILABLE, f"not asked again after {self.num_failures} failures in a row"
        elif was_probe or (self.is_open and not self.num_probes):
            self.pause(min(config.backoff_s * 2**self.num_probes, LONGEST_PROBE_WAIT_S), config, now)
            self.num_probes += 1
        return None
