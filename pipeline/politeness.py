"""The `Admission` of a fetch task: hosts' slots and rates, robots.txt and tdmrep.json, and directives in headers.

A site's files are fetched by the engine, once a day for the whole cluster: whoever needs one first asks the ledger's
notebook, then the site, and tells the notebook.
"""

import time
from urllib.parse import urlsplit

from pipeline.admission import Ended, Headers, Need, Refusal
from pipeline.config import FetchConfig
from pipeline.directives import product_token, refused_by
from pipeline.ledgers import Ledgers, Note
from pipeline.reasons import Reason
from pipeline.robots import MAX_BYTES, ROBOTS_PATH, TDM_PATH, Robots, file_url, tdm_verdict
from pipeline.turnstile import REPLY_S, Turnstile

PARSED_CHARS = 2**22
"""Of the files that are parsed, the last ones are kept: 30 bytes for each character."""
NOTEBOOK_PATIENCE_S = 5.0
"""A ledger that is being started again is not waited for longer: the site is asked instead."""


class Politeness:
    """See `pipeline.admission.Admission`. One for each fetch task."""

    def __init__(self, config: FetchConfig, ledgers: Ledgers) -> None:
        self._config = config
        self._turnstile = Turnstile(ledgers, config)
        self._token = product_token(config.user_agent)
        self._paths = [ROBOTS_PATH] if config.robots == "obey" else []
        self._paths += [TDM_PATH] if config.tdm_reservation == "file" else []
        self._patience_s = NOTEBOOK_PATIENCE_S + (config.max_redirects + 1) * config.timeout_s * (config.retries + 1)
        self._wanted: dict[str, float] = {}
        self._robots: dict[str, Robots] = {}
        self._parsed_chars = 0
        self._allowed: dict[str, float] = {}

    @property
    def num_calls(self) -> int:
        """Calls to the ledger so far."""
        return self._turnstile.num_calls

    def ask(self, url: str, host: str, now: float) -> float | Refusal | Need:
        closed_s = self._turnstile.closed_s(host, now)
        if closed_s > self._config.max_wait_s:
            detail = f"asks to be left alone for {closed_s:.0f} s more"
            return Refusal(reason=Reason.HOST_UNAVAILABLE, rule="retry-after", detail=detail)
        every_s = 0.0
        if self._paths and urlsplit(url).path not in (ROBOTS_PATH, TDM_PATH):
            judged = self._judged(url, now)
            if isinstance(judged, Refusal | Need):
                return judged
            if judged < 0:
                return REPLY_S
            every_s = judged
        wait_s = self._turnstile.ask(url, host, now, every_s)
        if wait_s is None:
            return Refusal(
                reason=Reason.HOST_BUSY,
                rule="fetch.host_wait_s",
                detail=f"no turn within {self._config.host_wait_s:g} s",
            )
        return wait_s

    def done(self, host: str, ended: Ended, now: float) -> None:
        self._turnstile.done(host, now, ended.retry_after_s or 0.0)

    def tick(self, now: float) -> None:
        self._turnstile.tick(now)

    def learn(self, url: str, http_status: int | None, body: bytes) -> None:
        text = body[:MAX_BYTES].decode("utf-8-sig", "replace")
        self._turnstile.keep(url, Note(http_status, text), time.monotonic())

    def judge(self, url: str, headers: Headers) -> Refusal | None:
        rule = refused_by(headers, self._config)
        return Refusal(reason=Reason.OPTED_OUT, rule=rule, detail="") if rule else None

    def close(self) -> None:
        self._turnstile.close()

    def _judged(self, url: str, now: float) -> float | Refusal | Need:
        """What the site's files say: the time between requests that it wants, -1.0 while we do not know yet, or no."""
        if url in self._allowed:
            return self._allowed[url]
        for path in self._paths:
            file = file_url(url, path)
            note = self._turnstile.note(file, now)
            if note is None:
                return self._missing(file, now)
            if refusal := self._refusal(file, path, note, url):
                return refusal
        robots = self._robots.get(file_url(url, ROBOTS_PATH))
        self._allowed[url] = robots.crawl_delay_s if robots else 0.0
        return self._allowed[url]

    def _robots_of(self, file: str, note: Note) -> Robots:
        if file not in self._robots:
            self._robots[file] = Robots(note.http_status, note.text, self._token)
            self._parsed_chars += len(note.text)
        while self._parsed_chars > PARSED_CHARS and len(self._robots) > 1:
            self._parsed_chars -= self._robots.pop(next(iter(self._robots))).num_chars
        return self._robots[file]

    def _missing(self, file: str, now: float) -> float | Need:
        """Ask the notebook, then the site. A file that never comes is trouble: sites may redirect theirs in a ring."""
        waited_s = now - self._wanted.setdefault(file, now)
        if self._turnstile.is_asking(file) and waited_s < NOTEBOOK_PATIENCE_S:
            return -1.0
        if waited_s < self._patience_s:
            return Need(url=file)
        self._turnstile.keep(file, Note(None, ""), now)
        return -1.0

    def _refusal(self, file: str, path: str, note: Note, url: str) -> Refusal | None:
        if path == ROBOTS_PATH:
            verdict, reason = self._robots_of(file, note).verdict(url), Reason.ROBOTS_DISALLOWED
        else:
            verdict, reason = tdm_verdict(note.http_status, note.text, url), Reason.OPTED_OUT
        if verdict.rule is None:
            return None
        if not verdict.is_final:
            reason = Reason.ROBOTS_UNAVAILABLE
        return Refusal(reason=reason, rule=verdict.rule, detail=verdict.detail)
