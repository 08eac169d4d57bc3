"""Rules about where an image lies: lists of URLs, and of hosts with their subdomains."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.reasons import Reason
from pipeline.rules.base import Rule, Verdicts
from pipeline.rules.lists import Entries

_HOST = r"^[A-Za-z]+://(?:[^/?#]*@)?(?P<host>\[[^\]]*\]|[^/:?#]+)"


@dataclass(frozen=True, kw_only=True)
class BlockedUrls(Rule):
    """URLs that are on a list, letter by letter."""

    urls: Entries
    name = "curate.blocked_urls"
    reason = Reason.URL_BLOCKED
    columns = ("url",)

    def judge(self, rows: pa.Table) -> Verdicts:
        return Verdicts(keep=~_is_listed(rows, self.urls))


@dataclass(frozen=True, kw_only=True)
class AllowedUrls(Rule):
    """URLs that are not on a list, letter by letter."""

    urls: Entries
    name = "curate.allowed_urls"
    reason = Reason.URL_NOT_ALLOWED
    columns = ("url",)

    def judge(self, rows: pa.Table) -> Verdicts:
        return Verdicts(keep=_is_listed(rows, self.urls))


@dataclass(frozen=True, kw_only=True)
class BlockedHosts(Rule):
    """Hosts that are on a list, or below one that is."""

    hosts: Entries
    name = "curate.blocked_hosts"
    reason = Reason.HOST_BLOCKED
    columns = ("url",)

    def judge(self, rows: pa.Table) -> Verdicts:
        hosts, is_listed = _listed_hosts(rows, self.hosts)
        return Verdicts(keep=~is_listed, details=_told(hosts, is_listed))


@dataclass(frozen=True, kw_only=True)
class AllowedHosts(Rule):
    """Hosts that are neither on a list nor below one that is."""

    hosts: Entries
    name = "curate.allowed_hosts"
    reason = Reason.HOST_NOT_ALLOWED
    columns = ("url",)

    def judge(self, rows: pa.Table) -> Verdicts:
        hosts, is_listed = _listed_hosts(rows, self.hosts)
        return Verdicts(keep=is_listed, details=_told(hosts, ~is_listed))


def plain_host(host: str) -> str:
    """A host's name as it is compared: lower case, in ASCII, without a dot at its end."""
    name = host.lower().rstrip(".")
    if name.isascii():
        return name
    try:
        return name.encode("idna").decode()
    except UnicodeError:
        return name


def _listed_hosts(rows: pa.Table, entries: Entries) -> tuple[list[str | None], NDArray[np.bool_]]:
    """([N] each URL's host, [N] whether it or a domain above it is listed)."""
    found = pc.struct_field(pc.extract_regex(rows.column("url").combine_chunks(), _HOST), "host").dictionary_encode()
    names = [plain_host(name) for name in found.dictionary.to_pylist()]
    listed = _hosts_of(entries)
    is_listed = np.array([any(domain in listed for domain in _domains(name)) for name in names] + [False])
    places = pc.fill_null(found.indices, len(names)).to_numpy()
    return [(*names, None)[place] for place in places.tolist()], is_listed[places]


def _told(hosts: list[str | None], is_dropped: NDArray[np.bool_]) -> list[str | None]:
    """The host of each row that is dropped."""
    told: list[str | None] = [None] * len(hosts)
    for row in np.flatnonzero(is_dropped).tolist():
        told[row] = f"host {hosts[row]}" if hosts[row] else None
    return told


def _domains(host: str) -> Iterator[str]:
    """www.example.org, example.org, org."""
    yield host
    while "." in host:
        host = host.partition(".")[2]
        yield host


def _is_listed(rows: pa.Table, entries: Entries) -> NDArray[np.bool_]:
    listed = _urls_of(entries)
    return np.array([url in listed for url in rows.column("url").to_pylist()], bool)


@lru_cache(maxsize=4)
def _hosts_of(entries: Entries) -> frozenset[str]:
    return frozenset(plain_host(entry.removeprefix("*.").strip(".")) for entry in entries.read())


@lru_cache(maxsize=4)
def _urls_of(entries: Entries) -> frozenset[str]:
    return frozenset(entries.read())
