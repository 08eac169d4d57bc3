"""What a site's files allow: robots.txt (RFC 9309) and /.well-known/tdmrep.json (W3C TDMRep).

Pure: files in, verdicts out. Patterns are matched by Protego, the parser that Scrapy uses.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from protego import Protego

ROBOTS_PATH = "/robots.txt"
TDM_PATH = "/.well-known/tdmrep.json"
MAX_BYTES = 500 * 1024
"""Of a file, what is read: RFC 9309, 2.5 asks for at least this much."""
MAX_LINES, MAX_TRIED = 1_000, 4
"""Of a robots.txt, how long it may be, and how many lines are tried, to name the line that forbids a URL. Naming only:
a file of 36,000 lines that all match would take ten minutes a URL."""
MAX_RULES = 1_000
"""Of a tdmrep.json, what is read."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a URL may be requested. `rule` is what forbids it, such as `robots.txt: Disallow: /private`, else None.

    is_final: False when the site could not be asked, so that it may be allowed later.
    """

    rule: str | None = None
    detail: str = ""
    is_final: bool = True


ALLOWED = Verdict()


def file_url(url: str, path: str) -> str:
    """A file of the site that a URL belongs to: scheme, host and port are the site."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"


class Robots:
    """A site's robots.txt, for one robot.

    A 2xx file is obeyed, none (4xx but 429, or endless redirects) allows everything, and a site that cannot say (5xx,
    429, no answer) is left alone for now: RFC 9309, 2.3.1.
    """

    def __init__(self, http_status: int | None, text: str, token: str) -> None:
        self._status = http_status
        self._text = text
        self._token = token
        is_there = http_status is not None and 200 <= http_status < 300
        self._parsed = Protego.parse(text) if is_there else None

    @property
    def num_chars(self) -> int:
        return len(self._text)

    @property
    def crawl_delay_s(self) -> float:
        """The time between two requests that the site asks for; 0 if it does not."""
        delay = self._parsed.crawl_delay(self._token) if self._parsed else None
        return float(delay or 0.0)

    def verdict(self, url: str) -> Verdict:
        if self._parsed is None:
            status = self._status
            if status is not None and status < 500 and status != 429:
                return ALLOWED
            said = f"HTTP {status}" if status else "no answer"
            return Verdict(rule="robots.txt", detail=f"{said} to the request for robots.txt", is_final=False)
        if self._parsed.can_fetch(url, self._token):
            return ALLOWED
        return Verdict(rule=f"robots.txt: {self._line(url)}")

    def _line(self, url: str) -> str:
        """The longest line that forbids the URL: each is tried alone, among the groups as they are."""
        lines = self._text.splitlines()
        if len(lines) > MAX_LINES:
            return "Disallow"
        patterns = {place: pattern for place, line in enumerate(lines) if (pattern := _pattern(line))}
        longest_first = sorted(patterns, key=lambda place: -len(patterns[place]))
        for place in islice((place for place in longest_first if matches(patterns[place], url)), MAX_TRIED):
            alone = (line if at == place or not _is_rule(line) else "Disallow:" for at, line in enumerate(lines))
            if not Protego.parse("\n".join(alone)).can_fetch(url, self._token):
                return f"Disallow: {patterns[place]}"
        return "Disallow"


def tdm_verdict(http_status: int | None, text: str, url: str) -> Verdict:
    """What a site's tdmrep.json says of a URL: the first rule whose location matches. A broken file says nothing."""
    if http_status is None or not 200 <= http_status < 300:
        return ALLOWED
    for location, is_reserved in _tdm_rules(text):
        if matches(location, url):
            return Verdict(rule=f"tdmrep.json: {location}") if is_reserved else ALLOWED
    return ALLOWED


@lru_cache(maxsize=16)
def _tdm_rules(text: str) -> list[tuple[str, bool]]:
    """(location, whether it is reserved) of each rule of a tdmrep.json."""
    try:
        rules: Any = json.loads(text)
    except (ValueError, RecursionError):
        return []
    told = [rule for rule in rules[:MAX_RULES] if isinstance(rule, dict)] if isinstance(rules, list) else []
    found = [(rule.get("location"), str(rule.get("tdm-reservation")) == "1") for rule in told]
    return [(location, is_reserved) for location, is_reserved in found if isinstance(location, str) and location]


def matches(pattern: str, url: str) -> bool:
    """Whether a path pattern of robots.txt (`*` any text, `$` the end) matches a URL's path and query."""
    return not _single(" ".join(pattern.split())).can_fetch(url, "a")


@lru_cache(maxsize=10_000)
def _single(pattern: str) -> Protego:
    return Protego.parse(f"User-agent: *\nDisallow: {pattern}")


def _pattern(line: str) -> str:
    """The pattern of a Disallow line, "" for any other."""
    name, _, value = line.partition("#")[0].partition(":")
    return value.strip() if name.strip().lower() == "disallow" else ""


def _is_rule(line: str) -> bool:
    return line.partition(":")[0].strip().lower() in ("allow", "disallow")
