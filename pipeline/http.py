"""Many downloads at once in one thread: a native event loop (libcurl's multi interface over epoll).

Connections, TLS sessions, the certificate store and DNS answers are shared by all transfers of a `Downloader`.
Every connection is opened by us, so that its real address can be refused: a name that changes its address between a
check and the connection gains nothing. Redirects are followed here, not by libcurl: each hop is a request like any
other, with the limits of its own host.

What fails transiently is tried again after a back-off while others go on; a host that keeps failing is left alone
(pipeline.host_queue). Nothing here waits for the end of anything but the network.
"""

import time
from dataclasses import replace

import pycurl

from pipeline.addresses import is_address
from pipeline.admission import Admission, Ended, Need, Refusal, Unrestricted
from pipeline.backoff import backoff_s
from pipeline.config import FetchConfig
from pipeline.event_loop import EventLoop
from pipeline.host_queue import HostQueue
from pipeline.job import Job, Response
from pipeline.reasons import Reason, http_reason, is_transient
from pipeline.resolver import Found, Resolver, known_addresses
from pipeline.schedule import Schedule
from pipeline.transfer import Meter, Transfer
from pipeline.urls import UrlError, clean_url, host_of

EVICT_MIN_BYTES = 2**20
"""What is given up has at least this much, or half of the mean: beginning again is not free."""
TOO_MANY_REQUESTS = http_reason(429)
NEEDED_MAX_BYTES = 2**19
"""Of a robots.txt: RFC 9309 asks for at least 500 KiB."""


class Downloader:
    """Submit URLs, then `poll` until `num_open` is 0. Not thread-safe; close it, or use it in `with`."""

    def __init__(self, config: FetchConfig, admission: Admission | None = None) -> None:
        self._config = config
        self._admission = admission or Unrestricted()
        self._num_open = 0
        self._meter = Meter()
        self._schedule = Schedule(config, self._park)
        self._needs: set[str] = set()
        self._transfers: dict[pycurl.Curl, Transfer] = {}
        self._idle: list[Transfer] = []
        self._finished: list[Response] = []
        self._loop = EventLoop(config)
        self._resolver = Resolver(config.connect_timeout_s, self._loop.wake)

    def __enter__(self) -> "Downloader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def num_open(self) -> int:
        """Downloads submitted whose response has not been returned."""
        return self._num_open

    @property
    def held_bytes(self) -> int:
        """Bytes received so far by transfers that are under way."""
        return self._meter.held_bytes

    def submit(self, index: int, url: str) -> None:
        """Queue a download; its response carries the same index."""
        self._num_open += 1
        job = Job(index=index, start_url=url, max_bytes=self._config.max_bytes)
        if self._aim(job, url):
            self._schedule.ready.append(job)

    def watch(self, descriptor: int) -> None:
        """Let `poll` also return when there is something to read at a descriptor."""
        self._loop.watch(descriptor)

    def poll(self, timeout_s: float, limit_bytes: int, *, may_start: bool = True) -> list[Response]:
        """Go on for at most `timeout_s` or until something happens; returns what ended.

        limit_bytes: memory for bodies. At the limit nothing new starts; above it the transfers that began last are
        given up, and begin again when there is room. One turn of the loop may add 0.7 MB a connection.
        """
        now = time.monotonic()
        self._look_again(now)
        self._admission.tick(now)
        held = self.held_bytes
        if held > limit_bytes:
            self._evict(held - limit_bytes, now)
        elif held < limit_bytes and may_start:
            self._start(now)
        self._park_the_hopeless()
        for curl, code, text in self._loop.step(self._wait_s(timeout_s)):
            self._end(self._transfers.pop(curl), code, text)
        finished, self._finished = self._finished, []
        self._num_open -= len(finished)
        return finished

    def close(self) -> None:
        for curl in self._transfers:
            self._loop.remove(curl)
        for transfer in (*self._transfers.values(), *self._idle):
            transfer.curl.close()
        self._transfers.clear()
        self._resolver.close()
        self._loop.close()

    # What is to be done when.

    def _wait_s(self, timeout_s: float) -> float:
        if self._finished:
            return 0.0
        now = time.monotonic()
        return self._schedule.wait_s(self._resolver.wait_s(timeout_s, now), now)

    def _look_again(self, now: float) -> None:
        """Bring back what has waited long enough, or for the resolver."""
        self._schedule.bring_back(now)
        for found in self._resolver.take(now):
            self._go_on(self._schedule.host(found.name), found, now)

    # Beginning.

    def _aim(self, job: Job, url: str) -> bool:
        """Set a job's next URL; one that cannot be requested ends it."""
        try:
            job.url = clean_url(url)
        except UrlError as error:
            self._finish(job, job.ended(error.reason, str(error)))
            return False
        job.host = host_of(job.url)
        job.start = job.start or (job.url, job.host)
        return True

    def _start(self, now: float) -> None:
        """Begin what may begin."""
        while self._schedule.ready and len(self._transfers) < self._loop.max_transfers:
            job = self._schedule.ready.popleft()
            host = self._schedule.host(job.host)
            if host.given_up:
                self._park(job, *host.given_up)
            elif not host.has_room(self._config, now) or (host.num_needs and not job.is_needed):
                self._schedule.queue(job, host, now)
            elif self._is_found(host, now):
                self._ask(job, host, now)
            else:
                host.looks_up = job
                self._resolver.look_up(host.name)

    def _is_found(self, host: HostQueue, now: float) -> bool:
        """Whether we know where a host is."""
        if not host.addresses:
            host.addresses = known_addresses(host.name, now) or ()
        return bool(host.addresses) or is_address(host.name)

    def _go_on(self, host: HostQueue, found: Found, now: float) -> None:
        """A name has been looked up, for the first of those who wait for its host."""
        job, host.looks_up = host.looks_up, None
        assert job is not None
        job.seconds += found.seconds
        job.attempt_seconds += found.seconds
        if found.addresses:
            host.addresses, job.dns_seconds = found.addresses, found.seconds
            self._schedule.ready.appendleft(job)
            return
        job.attempts += not job.num_redirects
        reason = found.reason or Reason.DNS_FAILURE
        response = replace(job.ended(reason, found.detail), dns_seconds=round(found.seconds, 4))
        if reason == Reason.UNKNOWN_HOST:
            host.given_up = reason, found.detail or reason.sentence
            self._finish(job, response)
        else:
            self._conclude(job, response, now)
        self._schedule.advance(host, now)

    def _ask(self, job: Job, host: HostQueue, now: float) -> None:
        # A needed file is asked for by its own name on every hop: two sites that redirect theirs to each other would
        # wait for one another for ever.
        url = job.start_url if job.is_needed else job.url
        verdict = self._admission.ask(url, job.host, now)
        if isinstance(verdict, Need):
            self._fetch_needed(verdict.url, host)
            self._schedule.queue(job, host, now)
        elif isinstance(verdict, Refusal):
            self._finish(job, job.ended(verdict.reason, verdict.detail, verdict.rule))
            self._schedule.advance(host, now)
        elif verdict > 0:
            host.waiting.appendleft(job)
            self._schedule.look_at(host, now + verdict)
        else:
            self._begin(job, host)
            self._schedule.advance(host, now)

    def _begin(self, job: Job, host: HostQueue) -> None:
        if not job.num_redirects:
            job.attempts += 1
        transfer = self._idle.pop() if self._idle else Transfer(self._config, self._meter, self._admission)
        transfer.begin(job, host.addresses)
        host.begin(time.monotonic())
        self._transfers[transfer.curl] = transfer
        self._loop.add(transfer.curl)

    def _fetch_needed(self, url: str, host: HostQueue) -> None:
        """Fetch what the admission needs, once; those who wait for `host` wait for it too."""
        if url not in self._needs:
            self._needs.add(url)
            host.num_needs += 1
            job = Job(index=-1, start_url=url, max_bytes=NEEDED_MAX_BYTES, needed_by=host.name)
            if self._aim(job, url):
                self._schedule.ready.appendleft(job)

    # Ending.

    def _end(self, transfer: Transfer, code: int, text: str) -> None:
        now = time.monotonic()
        response, redirect, pause_s = transfer.response(code, text), transfer.redirect, transfer.retry_after_s
        ended = Ended(reason=response.reason, http_status=response.http_status, retry_after_s=pause_s)
        host = self._release(transfer, ended, now)
        job = transfer.end()
        host.has_answered = host.has_answered or response.http_version is not None  # the status may be a hop's
        if redirect is not None:
            host.succeeded()
            self._redirect(job, response, redirect)
        else:
            self._conclude(job, response, now, pause_s)
        self._schedule.advance(host, now)

    def _release(self, transfer: Transfer, ended: Ended, now: float) -> HostQueue:
        """Free a handle and its place at the host."""
        assert transfer.job is not None
        self._idle.append(transfer)
        host = self._schedule.host(transfer.job.host)
        host.end(self._config, now)
        self._admission.done(host.name, ended, now)
        return host

    def _redirect(self, job: Job, response: Response, target: str) -> None:
        if job.num_redirects >= self._config.max_redirects:
            self._finish(job, replace(response, reason=Reason.TOO_MANY_REDIRECTS.value, detail=None))
            return
        job.last = response
        job.num_redirects += 1
        if self._aim(job, target):
            self._schedule.ready.appendleft(job)

    def _conclude(self, job: Job, response: Response, now: float, pause_s: float | None = None) -> None:
        """An attempt has ended: finish the job, or have it tried again."""
        host = self._schedule.host(job.host)
        if response.reason is None or not is_transient(response.reason):
            host.succeeded()
            self._finish(job, response)
            return
        job.last = response
        wait_s = backoff_s(self._config.backoff_s, job.start_url, job.attempts)
        host.failed(response.reason, self._config, now)
        if pause_s is not None or response.reason == TOO_MANY_REQUESTS:
            host.pause(wait_s if pause_s is None else pause_s, self._config, now)
        if job.attempts > self._config.retries or host.given_up:
            self._finish(job, response)
        elif host.is_open or host.not_before > now + wait_s:
            job.restart()
            start = self._schedule.host(job.host)
            self._schedule.queue(job, start, now)
            self._schedule.advance(start, now)
        else:
            job.restart()
            self._schedule.put_off(job, now + wait_s)

    def _finish(self, job: Job, response: Response) -> None:
        if not job.is_needed:
            self._finished.append(response)
            return
        is_told = response.reason in (None, Reason.EMPTY_BODY, Reason.TOO_LARGE, Reason.TOO_MANY_REDIRECTS)
        is_told = is_told or (response.reason or "").startswith("http_")
        self._admission.learn(job.start_url, response.http_status if is_told else None, response.body)
        host = self._schedule.host(job.needed_by)
        host.num_needs -= 1
        self._schedule.advance(host, time.monotonic())

    def _park(self, job: Job, reason: Reason, detail: str) -> None:
        """End a job whose host is not asked again, with what its own last attempt came to if there was one."""
        last = job.last
        if last is None or last.reason is None or not is_transient(last.reason) or reason == Reason.UNKNOWN_HOST:
            last = job.ended(reason, detail)
        self._finish(job, last)

    def _park_the_hopeless(self) -> None:
        """At the end a unit does not wait for hosts that were too slow."""
        if self._transfers or self._resolver.num_open or self._schedule.has_due:
            return
        waiting = self._schedule.hosts_waited_for()
        if all(host.is_down for host in waiting):
            for host in waiting:
                host.given_up = Reason.HOST_UNAVAILABLE, "the host was too slow, and nothing else was left to do"
                self._schedule.advance(host, time.monotonic())

    def _evict(self, excess_bytes: int, now: float) -> None:
        """Give up the large transfers that began last, until the excess is gone; one always goes on."""
        least = min(EVICT_MIN_BYTES, self.held_bytes // (2 * max(1, len(self._transfers))))
        large = [transfer for transfer in self._transfers.values() if len(transfer.body) > least]
        for transfer in reversed(large[1:]):
            if excess_bytes <= 0:
                return
            excess_bytes -= len(transfer.body)
            self._loop.remove(transfer.curl)
            del self._transfers[transfer.curl]
            host = self._release(transfer, Ended(reason=None, http_status=None, retry_after_s=None), now)
            job = transfer.end()
            job.attempts -= 1
            job.restart()
            self._schedule.ready.append(job)
            self._schedule.advance(host, now)
