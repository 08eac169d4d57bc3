"""How downloads went: by HTTP status, by host and by number of attempts; and what all of them took.

Exact totals come from the markers of the fetch stage. Statuses, hosts and attempts are counted over rows, of the
fetch stage or of the record, which for a large dataset are a sample of whole units, and so a random one.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from cluster.journal import Marker
from pipeline.timings import Timing, bytes_per_s, images_per_s

COLUMNS = ("url", "reason", "http_status", "attempts", "size_bytes", "width")
MAX_HOSTS = 12
NO_ANSWER, UNTOLD = 0, -1
"""In the place of a status; fetch.engine=img2dataset tells none unless it is an error."""


@dataclass(kw_only=True)
class Tally:
    """Pairs of one kind: how many were asked for, and what came. `reasons` are of those that gave no image."""

    num_pairs: int = 0
    num_images: int = 0
    num_requests: int = 0
    size_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def num_failed(self) -> int:
        return self.num_pairs - self.num_images

    @property
    def image_share(self) -> float:
        """Of the pairs, 0 to 1."""
        return self.num_images / self.num_pairs if self.num_pairs else 0.0

    @property
    def main_reason(self) -> str:
        """The most frequent one, "" if nothing failed."""
        return min(self.reasons, key=lambda reason: (-self.reasons[reason], reason), default="")


@dataclass(frozen=True, kw_only=True)
class Downloads:
    """Tallies of the pairs that were asked for over the network."""

    by_status: dict[int, Tally]
    by_host: dict[str, Tally]
    by_attempts: dict[int, Tally]

    def statuses(self) -> list[tuple[int, Tally]]:
        """Most frequent first."""
        return sorted(self.by_status.items(), key=lambda item: (-item[1].num_pairs, item[0]))

    def largest_hosts(self) -> list[tuple[str, Tally]]:
        """The hosts with most pairs."""
        return sorted(self.by_host.items(), key=lambda item: (-item[1].num_pairs, item[0]))[:MAX_HOSTS]

    def failing_hosts(self) -> list[tuple[str, Tally]]:
        """The hosts with most failures."""
        failing = [(host, tally) for host, tally in self.by_host.items() if tally.num_failed]
        return sorted(failing, key=lambda item: (-item[1].num_failed, item[0]))[:MAX_HOSTS]

    def attempts(self) -> list[tuple[int, Tally]]:
        return sorted(self.by_attempts.items())


def tally_downloads(tables: Iterable[pa.Table]) -> Downloads:
    """Count rows that have COLUMNS. A pair gave an image if its width is known, whatever was decided of it later."""
    downloads = Downloads(by_status={}, by_host={}, by_attempts={})
    for table in tables:
        asked = table.filter(pc.greater(table["attempts"], 0))
        rows: Iterator[tuple[str, str, int, int, int, int]]
        rows = zip(*(asked[name].to_pylist() for name in COLUMNS), strict=True)
        for url, reason, status, attempts, size_bytes, width in rows:
            for tally in (
                downloads.by_status.setdefault(status or (NO_ANSWER if size_bytes is None else UNTOLD), Tally()),
                downloads.by_host.setdefault(host_of(url), Tally()),
                downloads.by_attempts.setdefault(attempts, Tally()),
            ):
                tally.num_pairs += 1
                tally.num_requests += attempts
                tally.size_bytes += size_bytes or 0
                if width is not None:
                    tally.num_images += 1
                else:
                    tally.reasons[reason] += 1
    return downloads


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What all downloads took.

    images_per_s, bytes_per_s: of the whole build, 0 while no command has finished the stage.
    images_per_worker_s: of a task's time.
    """

    num_images: int
    num_requests: int
    num_retries: int
    size_bytes: int
    images_per_s: float
    bytes_per_s: float
    images_per_worker_s: float

    @staticmethod
    def of(markers: Sequence[Marker], timings: list[Timing]) -> "Totals":
        """From the fetch stage's markers, and what the build's commands took."""
        counts: Counter[str] = Counter()
        for marker in markers:
            counts.update(marker.counts)
        busy_s = sum(marker.seconds for marker in markers)
        return Totals(
            num_images=counts["images"],
            num_requests=counts["requests"],
            num_retries=counts["retries"],
            size_bytes=counts["bytes"],
            images_per_s=images_per_s(timings),
            bytes_per_s=bytes_per_s(timings),
            images_per_worker_s=counts["images"] / busy_s if busy_s else 0.0,
        )


def host_of(url: str | None) -> str:
    """A URL's host, for people."""
    try:
        return urlsplit(url or "").hostname or "(no host)"
    except ValueError:
        return "(no host)"


def status_name(status: int) -> str:
    """An HTTP status, or the lack of one, for people."""
    return {NO_ANSWER: "no answer", UNTOLD: "not told"}.get(status, f"HTTP {status}")


def size_text(size_bytes: float | None) -> str:
    """A number of bytes for people; None is that of an imported image as somebody else has downloaded it."""
    if size_bytes is None:
        return "size not known"
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.3g} TB"
