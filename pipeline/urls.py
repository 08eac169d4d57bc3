"""Which URLs can be requested, and in which spelling they go to the server."""

import re
import socket
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.reasons import Reason

MAX_URL_CHARS = 8_192
_PLAIN = r"^https?://[A-Za-z0-9]([A-Za-z0-9.-]{0,200}[A-Za-z0-9])?(:[0-9]{1,4})?(/[!$-;=?-Z_a-z~]*)?$"
_CLEAN = re.compile(r"https?://([a-z0-9](?:[a-z0-9.-]{0,200}[a-z0-9-])?)(:[1-9][0-9]{0,3})?/[!$-;=?-Z_a-z~]*")
"""Most URLs: they are sent as they are, if the host is not a number."""
_KEPT = "!#$%&'()*+,-./:;=?@[]_~"
"""Characters of a path and query that are sent as they are; `%` because most URLs are quoted already."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ENDS_IN_NUMBER = re.compile(r"(^|\.)(\d+|0[xX][0-9a-fA-F]*)\.?$")


class UrlError(ValueError):
    """The URL cannot be requested. `reason` is the row's reason."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def clean_url(text: str) -> str:
    """The URL as it is sent: no blanks around, IDN host in ASCII, other characters percent-encoded, no fragment.

    A host's last dot is left out, so that `a.example.` and `a.example` are one host for every limit.

    User names and passwords are left out: a crawler has no business with whoever's they are. Numeric spellings of an
    IPv4 address (2130706433, 0x7f.1, 0177.0.0.1) become the usual one. Raises UrlError for another scheme, a missing
    host, control characters or an endless URL.
    """
    if len(text) <= MAX_URL_CHARS and (plain := _CLEAN.fullmatch(text)) and not _ENDS_IN_NUMBER.search(plain[1]):
        return text
    text = text.strip()
    if len(text) > MAX_URL_CHARS:
        raise UrlError(Reason.INVALID_URL, f"longer than {MAX_URL_CHARS} characters")
    if _CONTROL.search(text):
        raise UrlError(Reason.INVALID_URL, "contains control characters")
    try:
        parts = urlsplit(text)
        port = parts.port
        text.encode()
    except ValueError as error:
        raise UrlError(Reason.INVALID_URL, str(error)) from None
    if parts.scheme and parts.scheme not in ("http", "https"):
        raise UrlError(Reason.UNSUPPORTED_SCHEME, f"scheme {parts.scheme}"[:100])
    if not parts.scheme or not parts.hostname or port == 0:
        raise UrlError(Reason.INVALID_URL, "no http(s)://host in it")
    authority = _host(parts.hostname) + (f":{port}" if port is not None else "")
    query = f"?{quote(parts.query, safe=_KEPT)}" if parts.query else ""
    return f"{parts.scheme}://{authority}{quote(parts.path, safe=_KEPT) or '/'}{query}"


def host_of(url: str) -> str:
    """The host of a URL from `clean_url`, without its port; an IPv6 address without its brackets."""
    authority = url.split("/", 3)[2]
    return authority[1:].partition("]")[0] if authority.startswith("[") else authority.partition(":")[0]


def port_of(url: str) -> int:
    """The port of a URL from `clean_url`."""
    scheme, _, authority = url.split("/", 3)[:3]
    port = authority.rpartition("]")[2].partition(":")[2]
    return int(port) if port else (443 if scheme == "https:" else 80)


def url_problems(urls: pa.StringArray) -> tuple[list[str | None], list[str | None]]:
    """(reason, detail) of each URL that cannot be requested, None for the others; null URLs are `missing_url`."""
    reasons: list[str | None] = [None] * len(urls)
    details: list[str | None] = [None] * len(urls)
    is_short = pc.less_equal(pc.utf8_length(urls), MAX_URL_CHARS)
    plain = pc.and_(pc.match_substring_regex(urls, _PLAIN), is_short).fill_null(False)
    for index in pc.indices_nonzero(pc.invert(plain)).to_pylist():
        url = urls[index].as_py()
        if url is None:
            reasons[index] = Reason.MISSING_URL.value
            continue
        try:
            clean_url(url)
        except UrlError as error:
            reasons[index], details[index] = error.reason.value, str(error)
    return reasons, details


def _host(host: str) -> str:
    if ":" in host:
        return f"[{host}]"
    if host.isascii():
        name = host
    else:
        try:
            name = host.encode("idna").decode()
        except UnicodeError:
            raise UrlError(Reason.INVALID_URL, "the host is not a valid international name") from None
    name = name.removesuffix(".")
    if not 0 < len(name) <= 253 or not all(char.isalnum() or char in "-._" for char in name):
        raise UrlError(Reason.INVALID_URL, "the host is not a valid name")
    return _address(name) if _ENDS_IN_NUMBER.search(name) else name


def _address(name: str) -> str:
    """A host that ends in a number is an IPv4 address, in whatever spelling, or nothing."""
    try:
        return socket.inet_ntoa(socket.inet_aton(name.rstrip(".")))
    except OSError:
        raise UrlError(Reason.INVALID_URL, "the host is not a valid address") from None
