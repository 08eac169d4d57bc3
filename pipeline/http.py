"""Many downloads at once in one thread: a native event loop (libcurl's multi interface over epoll).

Connections, TLS sessions, the certificate store and DNS answers are shared by all transfers of a `Downloader`.
Every connection, on every redirect, is opened by us, so that its real address can be refused: a name that changes its
address between a check and the connection gains nothing.
"""

import heapq
import socket
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urlsplit

import pycurl

from pipeline.config import FetchConfig
from pipeline.event_loop import EventLoop
from pipeline.reasons import Reason, is_transient
from pipeline.transfer import Job, Meter, Response, Transfer
from pipeline.urls import UrlError, clean_url

EVICT_MIN_BYTES = 2**20
RESOLVER_THREADS = 4


class Downloader:
    """Submit URLs, then `poll` until `num_open` is 0. Not thread-safe; close it, or use it as a context manager.

    Transient failures are repeated after a back-off while others go on; permanent ones never are.
    """

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._num_open = 0
        self._meter = Meter()
        self._ready: deque[Job] = deque()
        self._parked: dict[str, deque[Job]] = {}  # jobs of hosts that have all the transfers they may have
        self._later: list[tuple[float, int, Job]] = []  # heap by the time when they may be tried again
        self._lookups: list[tuple[Future[bool], Job, Response]] = []
        self._num_active: Counter[str] = Counter()
        self._transfers: dict[pycurl.Curl, Transfer] = {}
        self._idle: list[Transfer] = []
        self._finished: list[Response] = []
        self._loop = EventLoop(config)
        self._resolver = ThreadPoolExecutor(RESOLVER_THREADS, thread_name_prefix="dns")

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
        try:
            target = clean_url(url)
        except UrlError as error:
            self._finished.append(_refused(index, error.reason, str(error)))
            return
        self._ready.append(Job(index=index, url=target, host=urlsplit(target).hostname or ""))

    def poll(self, timeout_s: float, limit_bytes: int) -> list[Response]:
        """Go on for at most `timeout_s` or until something happens; returns what ended.

        limit_bytes: memory for bodies. At the limit nothing new starts; above it the transfers that began last are
        given up, and begin again when there is room. One turn of the loop may add 0.7 MB a connection.
        """
        self._wake(time.monotonic())
        held = self.held_bytes
        if held > limit_bytes:
            self._evict(held - limit_bytes)
        elif held < limit_bytes:
            self._start()
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
        self._loop.close()
        self._resolver.shutdown(wait=False, cancel_futures=True)

    def _wait_s(self, timeout_s: float) -> float:
        if self._finished:
            return 0.0
        if self._later:
            timeout_s = min(timeout_s, self._later[0][0] - time.monotonic())
        return max(0.0, min(timeout_s, 0.05 if self._lookups else timeout_s))

    def _wake(self, now: float) -> None:
        """Bring back what has waited long enough, and what the resolver has judged."""
        while self._later and self._later[0][0] <= now:
            self._ready.append(heapq.heappop(self._later)[2])
        waiting, self._lookups = self._lookups, []
        for entry in waiting:
            judged, job, response = entry
            if judged.done():  # asked once: the answer may come at any moment
                self._retry_or_finish(job, response, may_retry=judged.result())
            else:
                self._lookups.append(entry)

    def _start(self) -> None:
        config = self._config
        while self._ready and len(self._transfers) < config.connections:
            job = self._ready.popleft()
            if self._num_active[job.host] >= config.connections_per_host:
                self._parked.setdefault(job.host, deque()).append(job)
                continue
            transfer = self._idle.pop() if self._idle else Transfer(config, self._meter)
            transfer.begin(job)
            self._num_active[job.host] += 1
            self._transfers[transfer.curl] = transfer
            self._loop.add(transfer.curl)

    def _evict(self, excess_bytes: int) -> None:
        """Give up the large transfers that began last, until the excess is gone; one always goes on."""
        large = [transfer for transfer in self._transfers.values() if len(transfer.body) >= EVICT_MIN_BYTES]
        for transfer in reversed(large[1:]):
            if excess_bytes <= 0:
                return
            excess_bytes -= len(transfer.body)
            self._loop.remove(transfer.curl)
            del self._transfers[transfer.curl]
            job = self._release(transfer)
            job.attempts -= 1
            self._ready.append(job)

    def _end(self, transfer: Transfer, code: int, text: str) -> None:
        response = transfer.response(code, text)
        job = self._release(transfer)
        if response.reason == Reason.DNS_FAILURE and job.attempts <= self._config.retries:
            self._lookups.append((self._resolver.submit(_is_temporary, job.host), job, response))
        else:
            self._retry_or_finish(job, response, may_retry=response.reason is not None)

    def _retry_or_finish(self, job: Job, response: Response, *, may_retry: bool) -> None:
        if may_retry and is_transient(response.reason or "") and job.attempts <= self._config.retries:
            due = time.monotonic() + self._config.backoff_s * 2 ** (job.attempts - 1)
            heapq.heappush(self._later, (due, job.index, job))
        else:
            self._finished.append(response)

    def _release(self, transfer: Transfer) -> Job:
        """Free a handle and its host's place; the next job of that host may start."""
        job = transfer.end()
        self._idle.append(transfer)
        self._num_active[job.host] -= 1
        parked = self._parked.get(job.host)
        if parked:
            self._ready.appendleft(parked.popleft())
        if not parked:
            self._parked.pop(job.host, None)
        if not self._num_active[job.host]:
            del self._num_active[job.host]
        return job


def _is_temporary(host: str) -> bool:
    """Whether a name that did not resolve may do so later: not if its servers say that it does not exist."""
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return error.errno == socket.EAI_AGAIN
    except (OSError, UnicodeError):
        return False
    return True


def _refused(index: int, reason: Reason, detail: str) -> Response:
    return Response(
        index=index,
        reason=reason.value,
        detail=detail,
        http_status=None,
        final_url=None,
        num_redirects=0,
        body=b"",
        attempts=0,
        seconds=0.0,
    )
