"""Whether a request may go out now, and whether its answer may be used: what politeness decides, the engine obeys.

The engine (pipeline.http) asks before every request, each redirect and each repetition too, in its one thread: no
method may block or wait. A method that needs an answer from elsewhere says "ask again in a moment" and looks for it at
the next call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.config import FetchConfig
from pipeline.ledgers import Ledgers, LocalLedgers
from pipeline.reasons import Reason

Headers = Mapping[str, Sequence[str]]
"""Header names in lower case -> their values, in order; undecodable bytes are Latin-1."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """We must not, or were asked not to. `rule`: what said so, such as `robots.txt`; it stands in the row."""

    reason: Reason
    rule: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Need:
    """First this URL has to be fetched (robots.txt): the engine does so and tells `learn`; the asker waits."""

    url: str


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a request that was let go ended. retry_after_s: what the host asked for, in seconds from now."""

    reason: str | None
    http_status: int | None
    retry_after_s: float | None


class Admission(Protocol):
    """Asked by the engine of one task; another task has another one."""

    def ask(self, url: str, host: str, now: float) -> float | Refusal | Need:
        """0.0: go, and `done` will follow exactly once. Else seconds to wait (the engine may ask sooner), or why not.

        now: time.monotonic().
        """

    def done(self, host: str, ended: Ended, now: float) -> None:
        """A request that was let go has ended, or was given up."""

    def tick(self, now: float) -> None:
        """The engine's loop has turned: do what is due without being asked. Called at least once a second."""

    def learn(self, url: str, http_status: int | None, body: bytes) -> None:
        """What a needed URL has brought after its redirects; no status: the host could not be reached."""

    def judge(self, url: str, headers: Headers) -> Refusal | None:
        """Whether the headers of a 2xx answer forbid its use; asked before the body is read."""

    def close(self) -> None:
        """The task ends: give back what is still held."""


class Unrestricted:
    """An `Admission` that lets everything go."""

    def ask(self, url: str, host: str, now: float) -> float | Refusal | Need:
        return 0.0

    def done(self, host: str, ended: Ended, now: float) -> None: ...

    def tick(self, now: float) -> None: ...

    def learn(self, url: str, http_status: int | None, body: bytes) -> None: ...

    def judge(self, url: str, headers: Headers) -> Refusal | None:
        return None

    def close(self) -> None: ...


def admission_of(config: FetchConfig, ledgers: Ledgers | None = None) -> Admission:
    """The admission of one task, as the settings ask for. ledgers: the cluster's; None: limits of this task alone."""
    from pipeline.politeness import Politeness

    return Politeness(config, ledgers or LocalLedgers(config))
