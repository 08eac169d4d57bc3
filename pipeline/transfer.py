"""One request: what is taken of its answer, and what its end means."""

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urljoin

import pycurl

from pipeline.addresses import is_inside, is_public
from pipeline.admission import Admission, Headers, Refusal
from pipeline.backoff import retry_after_s
from pipeline.config import FetchConfig
from pipeline.handle import configured
from pipeline.job import Job, Response
from pipeline.reasons import Reason, http_reason
from pipeline.urls import port_of

MAX_HEADER_BYTES = 2**16
"""Of one answer, with its trailers and everything before it."""
UNREAD_BYTES = 2**16
"""Of a body that is of no use: reading this much keeps the connection, more is not worth it."""
_STATUS = re.compile(rb"HTTP/([0-9.]+) +([0-9]{3})")
CRUMB_BYTES, MAX_CRUMBS = 16, 4_096
"""A body that comes in so many pieces of so few bytes costs more time than it is worth."""

# libcurl's error numbers that mean one thing to us; 92, 95 and 100 have no name in pycurl.
_REASONS: dict[int, Reason] = {
    pycurl.E_UNSUPPORTED_PROTOCOL: Reason.BAD_RESPONSE,  # an HTTP version or status that does not exist
    pycurl.E_URL_MALFORMAT: Reason.INVALID_URL,
    pycurl.E_COULDNT_RESOLVE_HOST: Reason.DNS_FAILURE,
    pycurl.E_COULDNT_CONNECT: Reason.CONNECTION_FAILED,
    pycurl.E_FTP_WEIRD_SERVER_REPLY: Reason.BAD_RESPONSE,
    pycurl.E_PARTIAL_FILE: Reason.TRUNCATED,
    pycurl.E_OPERATION_TIMEDOUT: Reason.TIMEOUT,
    pycurl.E_SSL_CONNECT_ERROR: Reason.TLS_FAILURE,
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

_MALFORMED = ("HTTP/0.9", "response headers", "hexadecimal", "chunk")
"""In libcurl's messages on answers without a status line, with 300 KB of headers or with bad chunks, under any code."""

_BROKEN_OFF = ("Recv failure", "Send failure", "unexpected eof", "SYSCALL")
"""In libcurl's messages on TLS handshakes that the other side has hung up on, which says nothing of its certificate."""

_TIMES = (
    *(pycurl.TOTAL_TIME_T, pycurl.NAMELOOKUP_TIME_T, pycurl.CONNECT_TIME_T),
    *(pycurl.APPCONNECT_TIME_T, pycurl.PRETRANSFER_TIME_T, pycurl.STARTTRANSFER_TIME_T),
)
"""Microseconds from the start to the end, and to the end of each phase; 0 for phases that were not reached."""


@dataclass(kw_only=True, slots=True)
class Meter:
    """Bytes of bodies that all transfers of a downloader hold."""

    held_bytes: int = 0


@dataclass(kw_only=True, slots=True)
class _Answer:
    """What has come so far of one answer."""

    room_bytes: int = UNREAD_BYTES
    """How much more of the body is taken."""
    is_wanted: bool = False
    """The body is kept, not only read."""
    header_bytes: int = 0
    lines: list[bytes] = field(default_factory=list)
    version: str | None = None
    status: int | None = None
    headers: Headers = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    num_crumbs: int = 0
    stopped: Reason | Refusal | None = None
    """Why we broke it off."""
    is_forbidden: bool = False
    """Of the host's addresses one was refused, and none tried."""
    is_tried: bool = False


class Transfer:
    """A reusable handle and what it receives for one request."""

    def __init__(self, config: FetchConfig, meter: Meter, admission: Admission) -> None:
        self._config = config
        self._meter = meter
        self._admission = admission
        self._answer = _Answer()
        self.job: Job | None = None
        self.curl = configured(config)
        self.curl.setopt(pycurl.HEADERFUNCTION, self._take_header)
        self.curl.setopt(pycurl.WRITEFUNCTION, self._take_body)
        if not config.allow_private_addresses:
            self.curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open_socket)

    @property
    def body(self) -> bytearray:
        """What has come so far of a body that is wanted."""
        return self._answer.body

    @property
    def redirect(self) -> str | None:
        """Where the answer sends us, not yet checked."""
        location = self._answer.headers.get("location") if 300 <= (self._answer.status or 0) < 400 else None
        if not location:
            return None
        assert self.job is not None
        try:
            return urljoin(self.job.url, location[-1])
        except ValueError:  # such as http://[: the check will say what is wrong with it
            return location[-1]

    @property
    def retry_after_s(self) -> float | None:
        """How long the server asks us to wait, if it does."""
        value = self._answer.headers.get("retry-after") if self._answer.status in (429, 503) else None
        return retry_after_s(value[-1], datetime.now(UTC)) if value else None

    def begin(self, job: Job, addresses: Sequence[str]) -> None:
        """addresses: of the job's host, if that is a name."""
        self.job = job
        self._answer = _Answer()
        self.curl.setopt(pycurl.URL, job.url)
        if addresses:
            places = ",".join(f"[{address}]" if ":" in address else address for address in addresses)
            self.curl.setopt(pycurl.RESOLVE, [f"{job.host}:{port_of(job.url)}:{places}"])
        # Rather a stream of a connection that is being made than one more; without TLS it would wait for an answer.
        self.curl.setopt(pycurl.PIPEWAIT, int(job.url.startswith("https:")))
        left_s = max(0.001, self._config.timeout_s - job.attempt_seconds)
        self.curl.setopt(pycurl.TIMEOUT_MS, max(1, round(left_s * 1_000)))

    def end(self) -> Job:
        assert self.job is not None
        self._meter.held_bytes -= len(self._answer.body)
        job, self.job, self._answer = self.job, None, _Answer()
        job.dns_seconds = 0.0
        return job

    def response(self, code: int, text: str) -> Response:
        """What this request came to; `code` is libcurl's error number, 0 for none."""
        job, curl, answer = self.job, self.curl, self._answer
        assert job is not None
        total, resolved, connected, secured, asked, answered = (int(curl.getinfo(time)) / 1e6 for time in _TIMES)
        job.seconds += total
        job.attempt_seconds += total
        job.received_bytes += int(curl.getinfo(pycurl.SIZE_DOWNLOAD_T))
        reason, rule, detail = self._verdict(code, text)
        if answer.status is not None:
            job.http_status, job.final_url = answer.status, job.url
        return Response(
            index=job.index,
            reason=reason,
            rule=rule,
            detail=detail,
            http_status=job.http_status,
            http_version=answer.version,
            final_url=job.final_url,
            server_address=curl.getinfo(pycurl.PRIMARY_IP) or None,
            num_redirects=job.num_redirects,
            body=bytes(answer.body) if reason is None or job.is_needed else b"",
            attempts=job.attempts,
            received_bytes=job.received_bytes,
            seconds=round(job.seconds, 4),
            dns_seconds=round(job.dns_seconds + resolved, 4),
            connect_seconds=round(max(0.0, connected - resolved), 4),
            tls_seconds=round(max(0.0, secured - connected), 4),
            first_byte_seconds=round(max(0.0, answered - asked), 4) if answered else None,
        )

    def _verdict(self, code: int, text: str) -> tuple[str | None, str | None, str | None]:
        """(reason, rule, detail), reason None for a complete 2xx body."""
        answer, host = self._answer, self.job.host if self.job else ""
        stopped = answer.stopped
        if isinstance(stopped, Refusal):
            return stopped.reason.value, stopped.rule, stopped.detail
        detail = text.encode("utf-8", "replace").decode() or None
        if stopped is None and answer.status is not None and not 200 <= answer.status < 300:
            return http_reason(answer.status), None, detail
        if stopped is not None:
            return stopped.value, None, detail
        if code == pycurl.E_COULDNT_CONNECT and answer.is_forbidden:
            return Reason.FORBIDDEN_ADDRESS.value, None, detail
        if any(words in text.replace(host, "") for words in _MALFORMED):
            return Reason.BAD_RESPONSE.value, None, detail
        if code == pycurl.E_SSL_CONNECT_ERROR and any(words in text for words in _BROKEN_OFF):
            return Reason.CONNECTION_FAILED.value, None, detail
        if code:
            return _REASONS.get(code, Reason.CONNECTION_FAILED).value, None, detail
        return (None, None, None) if answer.body else (Reason.EMPTY_BODY.value, None, None)

    def _take_header(self, line: bytes) -> int | None:
        """One line of a status, of headers or of trailers; -1 breaks the transfer off."""
        answer = self._answer
        answer.header_bytes += len(line)
        if answer.header_bytes > MAX_HEADER_BYTES:
            answer.stopped = Reason.BAD_RESPONSE
            return -1
        if answer.status is not None:  # a trailer
            return None
        if line not in (b"\r\n", b"\n"):
            answer.lines.append(line)
            return None
        found = _STATUS.match(answer.lines[0]) if answer.lines else None
        if found is None:
            answer.stopped = Reason.BAD_RESPONSE
            return -1
        if found[2].startswith(b"1"):
            answer.lines.clear()  # the answer itself is still to come
            return None
        answer.version, answer.status = found[1].decode(), int(found[2])
        answer.headers = parse_headers(answer.lines[1:])
        if 200 <= answer.status < 300 and self.job is not None:
            answer.is_wanted, answer.room_bytes = True, self.job.max_bytes
            if not self.job.is_needed:
                answer.stopped = self._admission.judge(self.job.url, answer.headers)
        return -1 if answer.stopped else None

    def _take_body(self, data: bytes) -> int | None:
        """A piece of the body; -1 breaks the transfer off. Called for every 16 KB."""
        answer, size = self._answer, len(data)
        answer.room_bytes -= size
        if answer.room_bytes < 0:
            answer.stopped = Reason.TOO_LARGE if answer.is_wanted else None
            return -1
        if not answer.is_wanted:
            return None
        if size < CRUMB_BYTES:
            answer.num_crumbs += 1
            if answer.num_crumbs > MAX_CRUMBS:
                answer.stopped = Reason.BAD_RESPONSE
                return -1
        answer.body += data
        self._meter.held_bytes += size
        return None

    def _open_socket(self, purpose: int, address: Any) -> Any:
        family, kind, protocol, target = address
        is_ip = family in (socket.AF_INET, socket.AF_INET6)
        if not is_ip or not (is_public(target[0]) or is_inside(target[0], self._config.allow_addresses)):
            self._answer.is_forbidden = not self._answer.is_tried
            return pycurl.SOCKET_BAD
        self._answer.is_forbidden, self._answer.is_tried = False, True
        try:
            return socket.socket(family, kind, protocol)
        except OSError:  # no file left to open
            return pycurl.SOCKET_BAD


def parse_headers(lines: Sequence[bytes]) -> Headers:
    """Header lines by name in lower case."""
    together = b"".join(lines)
    try:
        text = together.decode()
    except UnicodeDecodeError:
        text = together.decode("latin-1")
    headers: dict[str, list[str]] = {}
    for line in text.split("\n"):
        name, colon, value = line.partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), []).append(value.strip())
    return headers
