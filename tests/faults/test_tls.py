"""Real TLS and real HTTP/2 (hypercorn): verification, and many requests over one connection."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from hostile import hostile_web, picture
from hypercorn.asyncio import serve
from hypercorn.config import Config

from pipeline.config import FetchConfig
from pipeline.http import Downloader
from pipeline.job import Response

HOST = "127.0.5.1"


@dataclass
class Multiplexing:
    """A web server that speaks HTTP/2, and what it has seen."""

    port: int = 0
    clients: set[Any] = field(default_factory=set)
    versions: set[str] = field(default_factory=set)
    open_now: int = 0
    open_most: int = 0

    async def app(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.clients.add(tuple(scope["client"]))
        self.versions.add(scope["http_version"])
        self.open_now += 1
        self.open_most = max(self.open_most, self.open_now)
        await asyncio.sleep(0.02)
        self.open_now -= 1
        body = picture(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"image/jpeg")]})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An authority that downloads trust."""
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
    return authority


@pytest.fixture
def multiplexing(trusted: Authority, tmp_path: Path) -> Iterator[Multiplexing]:
    served, loop, stop = Multiplexing(), asyncio.new_event_loop(), asyncio.Event()
    trusted.server(HOST)
    config = Config()
    config.certfile = config.keyfile = str(tmp_path / f"{HOST}-30-True.pem")
    config.bind = [f"{HOST}:0"]
    config.accesslog = config.errorlog = None
    sockets = config.create_sockets()
    served.port = sockets.secure_sockets[0].getsockname()[1]
    config.create_sockets = lambda: sockets  # type: ignore[method-assign]
    running = threading.Thread(
        target=lambda: loop.run_until_complete(serve(served.app, config, shutdown_trigger=stop.wait)),  # type: ignore[arg-type]
        daemon=True,
    )
    running.start()
    yield served
    loop.call_soon_threadsafe(stop.set)
    running.join(10)


def download(urls: list[str], **settings: Any) -> list[Response]:
    ended: list[Response] = []
    config = FetchConfig(allow_private_addresses=True, timeout_s=10, connect_timeout_s=5, retries=1, **settings)
    with Downloader(config) as downloader:
        for index, url in enumerate(urls):
            downloader.submit(index, url)
        for _ in range(1_000):
            ended += downloader.poll(0.1, 2**26)
            if not downloader.num_open:
                break
    return ended


def test_requests_to_one_host_share_one_connection(multiplexing: Multiplexing) -> None:
    ended = download([f"https://{HOST}:{multiplexing.port}/{number}" for number in range(60)], connections_per_host=6)
    assert [response.reason for response in ended] == [None] * 60
    assert {response.http_version for response in ended} == {"2"}
    assert sorted(response.body for response in ended) == sorted(picture(f"/{number}") for number in range(60))
    assert multiplexing.versions == {"2"}
    assert len(multiplexing.clients) == 1
    assert 1 < multiplexing.open_most <= 6
    assert sum(response.tls_seconds > 0 for response in ended if response.tls_seconds is not None) <= 6


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "CURL_CA_BUNDLE"])
def test_certificates_of_the_environments_authority_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    authority = Authority(tmp_path)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with hostile_web() as web:
        url = f"https://{HOST}:{web.listen([HOST], authority.server(HOST))}/image/a"
        assert [(response.reason, response.attempts) for response in download([url])] == [("tls_failure", 1)]
        monkeypatch.setenv(variable, str(authority.ca_file))
        assert [response.reason for response in download([url])] == [None]


def test_verification_can_be_turned_off(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with hostile_web() as web:
        port = web.listen([HOST], authority.server("127.0.0.1", days=-1, is_signed=False))
        url = f"https://{HOST}:{port}/image/a"
        assert [response.reason for response in download([url])] == ["tls_failure"]
        assert [response.reason for response in download([url], verify_tls=False)] == [None]
        assert [response.reason for response in download([url])] == ["tls_failure"]  # no session of before is used


def test_a_new_connection_resumes_the_tls_session_of_another_unit(trusted: Authority) -> None:
    with hostile_web() as web:
        context = trusted.server(HOST)
        url = f"https://{HOST}:{web.listen([HOST], context)}/image/a"
        for _ in range(3):
            assert [response.reason for response in download([url])] == [None]
        assert context.session_stats()["hits"] >= 1
