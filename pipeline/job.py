"""A download: what is wanted, and how it ended."""

from dataclasses import dataclass, replace

from pipeline.reasons import Reason


@dataclass(frozen=True, kw_only=True)
class Response:
    """How a download ended. `reason` is None when `body` is a complete 2xx body that is not empty.

    seconds: of all attempts, without the waits between them. The four other times are of the last request; those of
    its connection are 0 when it used one that was open. received_bytes: of all bodies, as they came over the network.
    """

    index: int
    reason: str | None
    rule: str | None = None
    detail: str | None
    http_status: int | None = None
    http_version: str | None = None
    final_url: str | None = None
    server_address: str | None = None
    num_redirects: int = 0
    body: bytes = b""
    attempts: int = 0
    received_bytes: int = 0
    seconds: float = 0.0
    dns_seconds: float | None = None
    connect_seconds: float | None = None
    tls_seconds: float | None = None
    first_byte_seconds: float | None = None


@dataclass(kw_only=True)
class Job:
    """A download that is wanted, and what its requests so far took."""

    index: int
    start_url: str
    max_bytes: int
    needed_by: str = ""
    """The host whose requests wait for this one, if the admission wants it and not the user."""
    url: str = ""
    """Of the next request: of the start, or where a redirect leads."""
    host: str = ""
    start: tuple[str, str] | None = None
    """The first url and host."""
    attempts: int = 0
    num_redirects: int = 0
    seconds: float = 0.0
    attempt_seconds: float = 0.0
    dns_seconds: float = 0.0
    """What it took to look up the host for the next request."""
    received_bytes: int = 0
    http_status: int | None = None
    final_url: str | None = None
    last: Response | None = None
    """How the request before ended."""

    @property
    def is_needed(self) -> bool:
        return bool(self.needed_by)

    def ended(self, reason: Reason, detail: str | None, rule: str | None = None) -> Response:
        """How it ended where no request was made that would tell."""
        last = self.last or Response(index=self.index, reason=None, detail=None)
        return replace(
            last,
            reason=reason.value,
            rule=rule,
            detail=detail,
            num_redirects=self.num_redirects,
            attempts=self.attempts,
            seconds=round(self.seconds, 4),
        )

    def restart(self) -> None:
        """The next request is the first of another attempt."""
        assert self.start is not None
        self.url, self.host = self.start
        self.num_redirects, self.attempt_seconds = 0, 0.0
        self.http_status = self.final_url = None
