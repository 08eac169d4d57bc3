"""What a downloader must not do, whoever asks it to: connections, headers and redirects as a server sees them."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import HostileWeb, Line, head, whole

import pipeline.resolver
from pipeline.admission import Admission, Ended, Headers, Need, Refusal, Unrestricted
from pipeline.config import FetchConfig
from pipeline.http import Downloader
from pipeline.job import Response
from pipeline.reasons import Reason

HOSTS = [f"127.0.4.{number}" for number in range(1, 12)]
QUICK: dict[str, Any] = {"timeout_s": 5, "connect_timeout_s": 5, "retries": 1, "backoff_s": 0.01}


class Echo(HostileWeb):
    """Sets cookies, and has rules."""

    async def answer_cookie(self, line: Line, argument: str, num_asked: int) -> bool:
        location = f"Location: /image/{argument}" if num_asked else f"Location: /cookie/{argument}"
        await line.send(whole(b"", "Set-Cookie: id=1; Path=/", location, status="302 Found"))
        return True

    async def answer_steady(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(head("200 OK"))
        await line.forever(bytes(2**14), 0.01)
        return False

    async def answer_robots(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(whole(b"Disallow: /private"))
        return True


@pytest.fixture
def web() -> Iterator[Echo]:
    with Echo() as web:
        web.port = web.listen(HOSTS)
        yield web


def download(urls: list[str], admission: Admission | None = None, **settings: Any) -> list[Response]:
    ended: list[Response] = []
    with Downloader(FetchConfig(**{**QUICK, **settings}), admission) as downloader:
        for index, url in enumerate(urls):
            downloader.submit(index, url)
        for _ in range(2_000):
            ended += downloader.poll(0.1, 2**26)
            if not downloader.num_open:
                break
    return sorted(ended, key=lambda response: response.index)


def reasons(ended: list[Response]) -> list[str | None]:
    return [response.reason for response in ended]


def test_named_networks_are_allowed_and_nothing_else(web: Echo) -> None:
    urls = [web.url("image/a", host) for host in HOSTS[:2]]
    assert reasons(download(urls, allow_addresses=["127.0.4.1/32"])) == [None, "forbidden_address"]
    assert web.connections == {"127.0.4.1": 1}


@pytest.mark.parametrize("addresses", [["127.0.4.2"], ["127.0.4.2", "127.0.4.3"]])
def test_a_name_that_changes_to_a_private_address_is_refused_at_the_connection(
    web: Echo, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    """127.0.4.1 stands for a public address, 127.0.4.2 for a private one that the name's owner turns to later."""
    name, answer = "rebind.example", ["127.0.4.1"]

    def resolving(name: str, *rest: object, **more: object) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in answer]

    monkeypatch.setattr(pipeline.resolver.socket, "getaddrinfo", resolving)
    assert reasons(download([web.url("image/a", name)], allow_addresses=["127.0.4.1"])) == [None]
    answer[:] = addresses
    monkeypatch.setattr(pipeline.resolver, "_known", {})  # ten minutes later
    again = download([web.url("image/a", name)], allow_addresses=["127.0.4.1"])
    assert [(response.reason, response.attempts) for response in again] == [("forbidden_address", 1)]
    assert set(web.connections) == {"127.0.4.1"}


def test_a_redirect_from_an_allowed_address_to_another_is_refused(web: Echo) -> None:
    target = web.url("image/a", "127.0.4.2")
    ended = download([web.url(f"to/{target.encode().hex()}", "127.0.4.1")], allow_addresses=["127.0.4.1"])
    assert reasons(ended) == ["forbidden_address"]
    assert (ended[0].http_status, ended[0].num_redirects) == (302, 1)
    assert set(web.connections) == {"127.0.4.1"}


def test_proxies_and_credentials_of_the_environment_are_not_used(
    web: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.4.9:9")
    (tmp_path / ".netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reasons(download([web.url("image/a", "127.0.4.1")], allow_addresses=["127.0.0.0/8"])) == [None]
    assert not any("authorization" in request.lower() for request in web.heads)


def test_cookies_and_passwords_are_never_sent(web: Echo) -> None:
    url = web.url("cookie/a", "127.0.4.1").replace("//", "//user:secret@")
    ended = download([url, url], allow_addresses=["127.0.0.0/8"])
    assert reasons(ended) == [None, None]
    sent = "\n".join(web.heads).lower()
    assert "cookie:" not in sent
    assert "authorization" not in sent
    assert "secret" not in sent
    assert "user-agent: pairmill" in sent


def test_every_hop_has_the_limits_of_its_host(web: Echo) -> None:
    """Twenty redirects from ten hosts to one: it is asked by no more than two at once."""
    target = "127.0.4.11"
    urls = [
        web.url(f"to/{web.url(f'image/{number}', target).encode().hex()}", host)
        for number, host in enumerate(HOSTS[:10] * 2)
    ]
    ended = download(urls, allow_addresses=["127.0.0.0/8"], connections_per_host=2)
    assert reasons(ended) == [None] * 20
    assert {response.num_redirects for response in ended} == {1}
    assert web.connections[target] <= 2


def test_many_small_bodies_are_held_within_the_memory_limit(web: Echo) -> None:
    limit_bytes, most, ended = 1_000_000, 0, []
    config = FetchConfig(**QUICK, allow_addresses=["127.0.0.0/8"], max_bytes=400_000)
    with Downloader(config) as downloader:
        assert downloader.poll(0.0, -1) == []
        for host in [host for host in HOSTS[:6] for _ in range(2)]:
            downloader.submit(0, web.url("steady", host))
        for _ in range(10_000):
            ended += downloader.poll(0.1, limit_bytes)
            most = max(most, downloader.held_bytes)
            if not downloader.num_open:
                break
    assert reasons(ended) == ["too_large"] * 12
    assert most < 2 * limit_bytes


@pytest.mark.parametrize("addresses", [["127.0.4.1", "127.0.5.1"], ["127.0.5.1", "127.0.4.1"]])
def test_a_public_address_that_is_down_is_transient_whatever_the_name_has_beside_it(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(pipeline.resolver.socket, "getaddrinfo", lambda *name, **more: answers)
    monkeypatch.setattr(pipeline.resolver, "_known", {})
    assert reasons(download(["http://both.example:9/"], allow_addresses=["127.0.4.1"])) == ["connection_failed"]


def test_what_a_host_is_called_does_not_change_what_its_failure_means(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.4.1", 0))
    monkeypatch.setattr(pipeline.resolver.socket, "getaddrinfo", lambda *name, **more: [answer])
    url = "http://chunk-hexadecimal.example:9/"
    assert reasons(download([url], allow_addresses=["127.0.4.1"])) == ["connection_failed"]


@pytest.mark.parametrize(
    ("said", "is_reset", "expected"),
    [
        (b"", False, "connection_failed"),
        (b"", True, "connection_failed"),
        (b"\x16\x03\x03\x00\x7a\x02", False, "connection_failed"),  # the beginning of a ServerHello
        (b"\x15\x03\x03\x00\x02\x02\x28", False, "tls_failure"),  # alert: handshake failure
    ],
)
def test_a_tls_handshake_that_is_broken_off_is_transient_and_one_that_fails_is_not(
    said: bytes, is_reset: bool, expected: str
) -> None:
    with socket.create_server(("127.0.4.1", 0)) as listener:

        def hang_up() -> None:
            for _ in range(2):
                line, _ = listener.accept()
                line.recv(4_096)
                line.send(said)
                if is_reset:
                    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                line.close()

        threading.Thread(target=hang_up, daemon=True).start()
        url = f"https://127.0.4.1:{listener.getsockname()[1]}/"
        [ended] = download([url], allow_addresses=["127.0.4.1"], retries=1)
    assert (ended.reason, ended.attempts) == (expected, 2 if expected == "connection_failed" else 1)


def test_a_long_retry_after_parks_the_rest_of_the_host_at_once(web: Echo) -> None:
    urls = [web.url(f"busy/seconds/3600/{number}", "127.0.4.1") for number in range(50)]
    ended = download([*urls, web.url("image/a", "127.0.4.2")], allow_addresses=["127.0.0.0/8"], connections_per_host=4)
    assert ended[-1].reason is None
    assert set(reasons(ended[:-1])) == {"http_429", "host_unavailable"}
    assert web.requests("127.0.4.1") <= 8
    assert all(response.attempts <= 1 for response in ended)


def test_a_unit_with_a_dead_host_ends_after_about_one_timeout(web: Echo) -> None:
    dead, started = f"http://127.0.4.9:{web.listen_deaf('127.0.4.9')}", time.monotonic()
    urls = [*(f"{dead}/{number}" for number in range(100)), web.url("image/a", "127.0.4.1")]
    ended = download(urls, allow_addresses=["127.0.0.0/8"], connect_timeout_s=1, retries=2)
    assert ended[-1].reason is None
    assert set(reasons(ended[:-1])) == {"timeout", "host_unavailable"}
    assert 1 <= time.monotonic() - started < 2.5


def test_a_host_that_was_down_for_a_moment_is_probed_and_then_used_again(web: Echo) -> None:
    """Eight URLs fail once each: five failures in a row open the breaker, the first probe that succeeds closes it."""
    urls = [web.url(f"flaky/503/{number}", "127.0.4.1") for number in range(8)]
    ended = download(urls, allow_addresses=["127.0.0.0/8"], connections_per_host=8, retries=3)
    assert reasons(ended) == [None] * 8
    assert {response.attempts for response in ended} == {2}


def test_a_host_that_refuses_connections_is_left_alone() -> None:
    ended = download([f"http://127.0.4.77:9/{number}" for number in range(40)], allow_private_addresses=True, retries=2)
    assert set(reasons(ended)) == {"connection_failed", "host_unavailable"}
    assert sum(response.attempts for response in ended) < 20


class Strict(Unrestricted):
    """Wants a file of each host first, lets one request of a host go every 30 ms, and refuses what the file says."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[int | None, bytes]] = {}
        self.asked: list[str] = []
        self.busy: dict[str, int] = {}
        self.next_start: dict[str, float] = {}
        self.is_closed = False

    def ask(self, url: str, host: str, now: float) -> float | Refusal | Need:
        needed = "/".join(url.split("/")[:3]) + "/robots/txt"
        if url != needed:
            if needed not in self.files:
                return Need(url=needed)
            if "/private" in url and b"Disallow: /private" in self.files[needed][1]:
                return Refusal(reason=Reason.OPTED_OUT, rule="robots.txt", detail="/private")
            if (wait_s := self.next_start.get(host, 0.0) - now) > 0:
                return wait_s
            self.next_start[host] = now + 0.03
        self.asked.append(url)
        self.busy[host] = self.busy.get(host, 0) + 1
        return 0.0

    def done(self, host: str, ended: Ended, now: float) -> None:
        self.busy[host] -= 1

    def learn(self, url: str, http_status: int | None, body: bytes) -> None:
        assert url not in self.files
        self.files[url] = http_status, body

    def judge(self, url: str, headers: Headers) -> Refusal | None:
        if "noai" in headers.get("x-robots-tag", ()):
            return Refusal(reason=Reason.OPTED_OUT, rule="x-robots-tag", detail="noai")
        return None


def test_the_admission_is_asked_and_obeyed(web: Echo) -> None:
    admission = Strict()
    hosts = ["127.0.4.1", "127.0.4.2"]
    paths = ["image/1", "image/2", "private/3", "opted_out", f"to/{b'/private/x'.hex()}"]
    ended = download(
        [web.url(path, host) for path in paths for host in hosts], admission, allow_addresses=["127.0.0.0/8"]
    )
    assert reasons(ended) == [None] * 4 + ["opted_out"] * 6
    assert [response.rule for response in ended[4:]] == ["robots.txt"] * 2 + ["x-robots-tag"] * 2 + ["robots.txt"] * 2
    assert sorted(admission.files) == [web.url("robots/txt", host) for host in hosts]
    assert {status for status, _ in admission.files.values()} == {200}
    assert set(admission.busy.values()) == {0}
    assert not any("private" in path for _, path in web.seen)
    assert sum(web.seen.values()) == len(admission.asked)


def test_a_needed_file_of_a_dead_host_is_told_as_missing() -> None:
    admission = Strict()
    ended = download(["http://127.0.4.78:9/a", "http://127.0.4.78:9/b"], admission, allow_private_addresses=True)
    assert set(reasons(ended)) <= {"connection_failed", "host_unavailable"}
    assert admission.files == {"http://127.0.4.78:9/robots/txt": (None, b"")}
