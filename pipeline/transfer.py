"""One attempt at one download: a libcurl handle, how it is set up, and what its end means."""

import contextlib
import os
import socket
import ssl
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pycurl

from pipeline.addresses import is_public
from pipeline.config import FetchConfig
from pipeline.reasons import Reason, http_reason

RECEIVE_BYTES = 2**16

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
class Job:
    """A download that is wanted, and what its attempts so far took."""

    index: int
    url: str
    host: str
    attempts: int = 0
    seconds: float = 0.0


class Meter:
    """Bytes of bodies that all transfers of a downloader hold."""

    held_bytes = 0


class Transfer:
    """A reusable handle and what it has received for one attempt."""

    def __init__(self, config: FetchConfig, meter: Meter) -> None:
        self.body = bytearray()
        self._meter = meter
        self._config = config
        self._job: Job | None = None
        self._is_forbidden = self._is_too_large = False
        self.curl = _configured(config)
        self.curl.setopt(pycurl.WRITEFUNCTION, self._write)
        if not config.allow_private_addresses:
            self.curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open_socket)

    def begin(self, job: Job) -> None:
        self._job = job
        job.attempts += 1
        self.body = bytearray()
        self._is_forbidden = self._is_too_large = False
        self.curl.setopt(pycurl.URL, job.url)

    def end(self) -> Job:
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
            detail=text.encode("utf-8", "replace").decode() if reason and text else None,
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
        if "HTTP/0.9" in text or "response headers" in text:  # no status line, or 300 KB of headers
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
