"""Signed URLs without their signatures: whoever has one may read what it signs, so none goes into files or logs."""

import logging
import re
from typing import Any
from urllib.parse import urlsplit

REDACTED = "signature-removed"
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s\"'<>|,;)\]}]+")
# Of AWS (versions 4 and 2), Google Cloud (the same two), Azure's shared access signatures, CloudFront; plain tokens.
_SECRETS = frozenset(
    {
        *("x-amz-signature", "x-amz-credential", "x-amz-security-token", "awsaccesskeyid", "signature"),
        *("x-goog-signature", "x-goog-credential", "googleaccessid", "sig", "policy", "key-pair-id"),
        *("token", "access_token", "auth", "api_key", "apikey", "password"),
    }
)
# They come with the above and are others each time that a URL is signed.
_BESIDE = frozenset(
    {
        *("x-amz-algorithm", "x-amz-date", "x-amz-expires", "x-amz-signedheaders", "x-id", "expires"),
        *("x-goog-algorithm", "x-goog-date", "x-goog-expires", "x-goog-signedheaders"),
        *("sv", "se", "st", "sp", "sr", "spr", "sip", "skoid", "sktid", "skt", "ske", "sks", "skv"),
    }
)


def redact_url(url: str) -> str:
    """The URL without what signs it, always the same for the same object; others as they are."""
    head, mark, rest = url.partition("?")
    query, hash_mark, fragment = rest.partition("#")
    pairs = query.split("&")
    if not mark or not any(_name(pair) in _SECRETS for pair in pairs):
        return url
    kept = [pair for pair in pairs if _name(pair) not in _SECRETS | _BESIDE]
    return f"{head}?{'&'.join([*kept, REDACTED])}{hash_mark}{fragment}"


def redact_text(text: str) -> str:
    """A text in which no URL is signed, nor has a password before its host."""
    return _URL.sub(lambda found: redact_url(_without_password(found[0])), text)


def redact(value: Any) -> Any:
    """A plain value (of strings, lists and dicts) in which no URL is signed."""
    if isinstance(value, str):
        return redact_url(value) if "://" in value else value
    if isinstance(value, dict):
        return {name: redact(each) for name, each in value.items()}
    return [redact(each) for each in value] if isinstance(value, list | tuple) else value


def redact_logs() -> None:
    """Have every line that this process logs from now on go through `redact_text`."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, _Formatter):
            handler.setFormatter(_Formatter(handler.formatter or logging.Formatter()))


class _Formatter(logging.Formatter):
    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(self._inner.format(record))


def _name(pair: str) -> str:
    return pair.partition("=")[0].lower()


def _without_password(url: str) -> str:
    try:
        has_password = "@" in urlsplit(url).netloc and ":" in urlsplit(url).netloc.rpartition("@")[0]
    except ValueError:
        return url
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{REDACTED}@{rest.partition('@')[2]}" if has_password else url
