"""Many downloads at once in one thread: a native event loop (libcurl's multi interface over epoll).

Connections, TLS sessions, the certificate store and DNS answers are shared by all transfers of a `Downloader`.
Every connection, on every redirect, is opened by us, so that its real address can be refused: a name that changes its
address between a check and the connection gains nothing.
"""

import contextlib
import heapq
import os
import select
import socket
import ssl
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pycurl

from pipeline.addresses import is_public
from pipeline.config import FetchConfig
from pipeline.reasons import Reason, http_reason, is_transient
from pipeline.urls import UrlError, clean_url

RECEIVE_BYTES = 2**16
EVICT_MIN_BYTES = 2**20
RESOLVER_THREADS = 4

# libcurl's error numbers that mean one thing to us; 92, 95 and 100 have no name in pycurl.
_REASONS: dict[int, Reason] = {
    pycurl.E_UNSUPPORTED_PROTOCOL: Reason.UNSUPPORTED_SCHEME,
    pycurl.E_URL_MALFORMAT: Reason.INVALID_URL,
    pycurl.E_COULDNT_RESOLVE_HOST: Reason.DNS_FAILURE,
    pycurl.E_COULDNT_CONNECT: Reason.CONNECTION_FAILED,
    pycurl.E_FTP_WEIRD_SERVER_REPLY: Reason.BAD_RESPONSE,
    pycurl.E_PARTIAL_FILE: Reason.TRUNCATED,
    pycurl.E_OPERATION_TIMEDOUT: Reason.TIMEOUT,
    pycurl.E_SSL_CONNECT_ERROR: Reason.TLS_FAILURE,
    pycurl.E_TOO_MANY_REDIRECTS: Reason.TOO_MANY_REDIRECTS,
    pycurl.E_GOT_NOTHING: Reason.CONNECTION_FAILED,
    pycurl.E_SEND_ERROR: Reason.CONNECTION_FAILED,
    pycurl.E_RECV_ERROR: Reason.CONNECTION_FAILED,
    pycurl.E_SSL_CIPHER: Reason.TLS_FAILURE,
    pycurl.E_PEER_FAILED_VERIFICATION: Reason.TLS_FAILURE,
    pycurl.E_SSL_ISSUER_ERROR: Reason.TLS_FAILURE,
    pycurl.E_BAD_CONTENT_ENCODING: Reason.BAD_RESPONSE,
    pycurl.E_FILESIZE_EXCEEDED: Reason.TOO_LARGE,
    pycurl.E_HTTP2: Reason.CONNECTION_FAILED,
    92: Reason.CONNECTION_FAILED,  # an HTTP/2 stream was reset
    95: Reason.CONNECTION_FAILED,  # HTTP/3
    100: Reason.BAD_RESPONSE,  # headers beyond libcurl's 300 KB
}


@dataclass(frozen=True, kw_only=True)
class Response:
    """How a download ended. `reason` is None when `body` is a complete 2xx body that is not empty.

    seconds: of all attempts, without the waits between them.
    """

    index: int
    reason: str | None
    detail: str | None
    http_status: int | None
    final_url: str | None
    num_redirects: int
    body: bytes
    attempts: int
    seconds: float


@dataclass(kw_only=True)
class _Job:
    index: int
    url: str
    host: str
    attempts: int = 0
    seconds: float = 0.0


class Downloader:
    """Submit URLs, then `poll` until `num_open` is 0. Not thread-safe; close it, or use it as a context manager.

    Transient failures are repeated after a back-off while others go on; permanent ones never are.
    """

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._num_open = 0
        self._meter = _Meter()
        self._ready: deque[_Job] = deque()
        self._parked: dict[str, deque[_Job]] = {}  # jobs of hosts that have all the transfers they may have
        self._later: list[tuple[float, int, _Job]] = []  # heap by the time when they may be tried again
        self._lookups: list[tuple[Future[bool], _Job, Response]] = []
        self._num_active: Counter[str] = Counter()
        self._transfers: dict[pycurl.Curl, _Transfer] = {}
        self._idle: list[_Transfer] = []
        self._finished: list[Response] = []
        self._loop = _Loop(config)
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
        self._ready.append(_Job(index=index, url=target, host=urlsplit(target).hostname or ""))

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
        waiting = self._lookups
        self._lookups = [entry for entry in waiting if not entry[0].done()]
        for judged, job, response in waiting:
            if judged.done():
                self._retry_or_finish(job, response, may_retry=judged.result())

    def _start(self) -> None:
        config = self._config
        while self._ready and len(self._transfers) < config.connections:
            job = self._ready.popleft()
            if self._num_active[job.host] >= config.connections_per_host:
                self._parked.setdefault(job.host, deque()).append(job)
                continue
            transfer = self._idle.pop() if self._idle else _Transfer(config, self._meter)
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

    def _end(self, transfer: "_Transfer", code: int, text: str) -> None:
        response = transfer.response(code, text)
        job = self._release(transfer)
        if response.reason == Reason.DNS_FAILURE and job.attempts <= self._config.retries:
            self._lookups.append((self._resolver.submit(_is_temporary, job.host), job, response))
        else:
            self._retry_or_finish(job, response, may_retry=response.reason is not None)

    def _retry_or_finish(self, job: _Job, response: Response, *, may_retry: bool) -> None:
        if may_retry and is_transient(response.reason or "") and job.attempts <= self._config.retries:
            due = time.monotonic() + self._config.backoff_s * 2 ** (job.attempts - 1)
            heapq.heappush(self._later, (due, job.index, job))
        else:
            self._finished.append(response)

    def _release(self, transfer: "_Transfer") -> _Job:
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


class _Meter:
    """Bytes of bodies that all transfers of a downloader hold."""

    held_bytes = 0


class _Transfer:
    """A reusable handle and what it has received for one attempt."""

    def __init__(self, config: FetchConfig, meter: _Meter) -> None:
        self.body = bytearray()
        self._meter = meter
        self._config = config
        self._job: _Job | None = None
        self._is_forbidden = self._is_too_large = False
        self.curl = _configured(config)
        self.curl.setopt(pycurl.WRITEFUNCTION, self._write)
        if not config.allow_private_addresses:
            self.curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open_socket)

    def begin(self, job: _Job) -> None:
        self._job = job
        job.attempts += 1
        self.body = bytearray()
        self._is_forbidden = self._is_too_large = False
        self.curl.setopt(pycurl.URL, job.url)

    def end(self) -> _Job:
        assert self._job is not None
        self._meter.held_bytes -= len(self.body)
        job, self._job, self.body = self._job, None, bytearray()
        return job

    def response(self, code: int, text: str) -> Response:
        """What this attempt came to; `code` is libcurl's error number, 0 for none."""
        job, curl = self._job, self.curl
        assert job is not None
        job.seconds += float(curl.getinfo(pycurl.TOTAL_TIME))
        status = int(curl.getinfo(pycurl.RESPONSE_CODE)) or None
        reason = self._reason(code, text, status)
        return Response(
            index=job.index,
            reason=reason,
            detail=(text or None) if reason else None,
            http_status=status,
            final_url=curl.getinfo_raw(pycurl.EFFECTIVE_URL).decode("utf-8", "replace") if status else None,
            num_redirects=int(curl.getinfo(pycurl.REDIRECT_COUNT)),
            body=bytes(self.body) if reason is None else b"",
            attempts=job.attempts,
            seconds=round(job.seconds, 4),
        )

    def _reason(self, code: int, text: str, status: int | None) -> str | None:
        if self._is_forbidden and code == pycurl.E_COULDNT_CONNECT:
            return Reason.FORBIDDEN_ADDRESS.value
        is_final = code not in (pycurl.E_TOO_MANY_REDIRECTS, pycurl.E_UNSUPPORTED_PROTOCOL)
        if status is not None and is_final and (status >= 400 or (code == 0 and not 200 <= status < 300)):
            return http_reason(status)
        if self._is_too_large:
            return Reason.TOO_LARGE.value
        if code == pycurl.E_UNSUPPORTED_PROTOCOL and "HTTP/0.9" in text:  # an answer without a status line
            return Reason.BAD_RESPONSE.value
        if code:
            return _REASONS.get(code, Reason.CONNECTION_FAILED).value
        return None if self.body else Reason.EMPTY_BODY.value

    def _write(self, data: bytes) -> int | None:
        if len(self.body) + len(data) > self._config.max_bytes:
            self._is_too_large = True
            return -1
        self.body += data
        self._meter.held_bytes += len(data)
        return None

    def _open_socket(self, purpose: int, address: Any) -> Any:
        family, kind, protocol, target = address
        if family not in (socket.AF_INET, socket.AF_INET6) or not is_public(target[0]):
            self._is_forbidden = True
            return pycurl.SOCKET_BAD
        return socket.socket(family, kind, protocol)


class _Loop:
    """libcurl's multi handle, told by epoll which sockets are ready."""

    def __init__(self, config: FetchConfig) -> None:
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, config.connections * 2)
        self._multi.setopt(pycurl.M_MAX_HOST_CONNECTIONS, config.connections_per_host)
        self._epoll = select.epoll()
        self._watched: set[int] = set()
        self._due: float | None = None

    def add(self, curl: pycurl.Curl) -> None:
        self._multi.add_handle(curl)

    def remove(self, curl: pycurl.Curl) -> None:
        self._multi.remove_handle(curl)

    def step(self, timeout_s: float) -> Iterator[tuple[pycurl.Curl, int, str]]:
        """Wait for sockets or the timer, act, and yield (handle, error number, message) of those that ended."""
        if self._due is not None:
            timeout_s = max(0.0, min(timeout_s, self._due - time.monotonic()))
        events = self._epoll.poll(timeout_s) if self._watched or timeout_s else []
        for descriptor, event in events:
            ready = (pycurl.CSELECT_IN if event & ~select.EPOLLOUT else 0) | (
                pycurl.CSELECT_OUT if event & ~select.EPOLLIN else 0
            )
            self._multi.socket_action(descriptor, ready)
        if self._due is not None and self._due <= time.monotonic():
            self._due = None
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        more = 1
        while more:
            more, succeeded, failed = self._multi.info_read()
            for curl, code, text in (*((curl, 0, "") for curl in succeeded), *failed):
                self._multi.remove_handle(curl)
                yield curl, code, text

    def close(self) -> None:
        self._multi.close()
        self._epoll.close()

    def _watch(self, action: int, descriptor: int, multi: object, data: object) -> None:
        if action == pycurl.POLL_REMOVE:
            self._watched.discard(descriptor)
            with contextlib.suppress(OSError):  # closed sockets have left epoll by themselves
                self._epoll.unregister(descriptor)
            return
        mask = (select.EPOLLIN if action & pycurl.POLL_IN else 0) | (
            select.EPOLLOUT if action & pycurl.POLL_OUT else 0
        )
        try:
            self._epoll.modify(descriptor, mask)
        except FileNotFoundError:
            self._epoll.register(descriptor, mask)
        self._watched.add(descriptor)

    def _set_timer(self, timeout_ms: int) -> None:
        self._due = None if timeout_ms < 0 else time.monotonic() + timeout_ms / 1_000


def ca_file() -> str | None:
    """The certificates that servers are checked against: SSL_CERT_FILE, the system's, or certifi's."""
    found = [os.environ.get("SSL_CERT_FILE"), ssl.get_default_verify_paths().cafile]
    with contextlib.suppress(ImportError):
        found.append(import_module("certifi").where())
    return next((path for path in found if path and Path(path).is_file()), None)


def _configured(config: FetchConfig) -> pycurl.Curl:
    curl = pycurl.Curl()
    for option, value in (
        (pycurl.NOSIGNAL, 1),
        (pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
        (pycurl.REDIR_PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
        (pycurl.PROXY, ""),  # a proxy would connect in our place, where addresses cannot be refused
        (pycurl.FOLLOWLOCATION, 1),
        (pycurl.MAXREDIRS, config.max_redirects),
        (pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2TLS),
        (pycurl.USERAGENT, config.user_agent),
        (pycurl.HTTPHEADER, ["Accept: image/*,*/*;q=0.5"]),
        (pycurl.ENCODING, "identity"),  # ask for none, but undo what a server applies all the same
        (pycurl.TIMEOUT_MS, max(1, round(config.timeout_s * 1_000))),
        (pycurl.CONNECTTIMEOUT_MS, max(1, round(config.connect_timeout_s * 1_000))),
        (pycurl.LOW_SPEED_LIMIT, config.min_speed),
        (pycurl.LOW_SPEED_TIME, config.min_speed_s),
        (pycurl.MAXFILESIZE_LARGE, config.max_bytes),
        (pycurl.BUFFERSIZE, RECEIVE_BYTES),
        (pycurl.DNS_CACHE_TIMEOUT, 600),
        (pycurl.TCP_NODELAY, 1),
    ):
        curl.setopt(option, value)
    if certificates := ca_file():
        curl.setopt(pycurl.CAINFO, certificates)
    return curl


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
