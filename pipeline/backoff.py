"""How long to wait before asking again: pure functions of what was asked and answered."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from zlib import crc32

LONGEST_BACKOFF_S = 60.0


def backoff_s(first_s: float, url: str, attempts: int) -> float:
    """Seconds to wait after `attempts` failed ones: doubled each time, and up to half shorter by the URL.

    The jitter keeps the URLs of a host from coming back at one moment; it is the same whenever it is computed.
    """
    jitter = crc32(f"{url} {attempts}".encode()) / 2**32
    return min(first_s * 2.0 ** (attempts - 1), LONGEST_BACKOFF_S) * (1 - jitter / 2)


def retry_after_s(value: str, now: datetime) -> float | None:
    """Seconds that a Retry-After header asks for, written as a number or as a date; None if it is neither."""
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds())
