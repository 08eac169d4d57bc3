"""Names in threads beside the loop: dead ones fail nobody else, and only a plain no is final."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import pipeline.resolver
from pipeline.config import FetchConfig
from pipeline.http import Downloader
from pipeline.job import Response
from pipeline.reasons import Reason
from pipeline.resolver import Found, Resolver, known_addresses

DEADLINE_S = 10.0


class NameServer:
    """Answers in the place of the system: errors by name, `silent*` never, and counts what it is asked."""

    def __init__(self) -> None:
        self.errors: dict[str, OSError] = {}
        self.asked: list[str] = []
        self.is_over = threading.Event()

    def getaddrinfo(self, name: str, *rest: object, **more: object) -> list[tuple[Any, ...]]:
        self.asked.append(name)
        if name.startswith("silent"):
            self.is_over.wait(DEADLINE_S)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        if name in self.errors:
            raise self.errors[name]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    server = NameServer()
    monkeypatch.setattr(pipeline.resolver.socket, "getaddrinfo", server.getaddrinfo)
    monkeypatch.setattr(pipeline.resolver, "_known", {})
    yield server
    server.is_over.set()


def look_up(names: list[str], patience_s: float) -> dict[str, Found]:
    resolver, found = Resolver(patience_s, lambda: None), {}
    for name in names:
        resolver.look_up(name)
    end = time.monotonic() + DEADLINE_S
    while resolver.num_open and time.monotonic() < end:
        found |= {each.name: each for each in resolver.take(time.monotonic())}
        time.sleep(min(0.01, resolver.wait_s(1.0, time.monotonic())))
    resolver.close()
    return found


def download(urls: list[str], **settings: Any) -> list[Response]:
    config = FetchConfig(**{"timeout_s": 5, "connect_timeout_s": 5, "retries": 1, "backoff_s": 0.01, **settings})
    ended: list[Response] = []
    with Downloader(config) as downloader:
        for index, url in enumerate(urls):
            downloader.submit(index, url)
        end = time.monotonic() + DEADLINE_S
        while downloader.num_open and time.monotonic() < end:
            ended += downloader.poll(0.1, 2**20)
    return sorted(ended, key=lambda response: response.index)


def test_names_that_are_never_answered_fail_nobody_else(names: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.resolver, "MAX_THREADS", 8)
    silent, good = [f"silent{i}.example" for i in range(6)], [f"good{i}.example" for i in range(50)]
    found = look_up([*silent, *good], patience_s=0.2)
    assert {found[name].reason for name in silent} == {Reason.TIMEOUT}
    assert {found[name].addresses for name in good} == {("127.0.0.1",)}


def test_a_name_that_waits_for_its_turn_loses_no_time(names: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.resolver, "MAX_THREADS", 1)
    timer = threading.Timer(0.5, names.is_over.set)
    timer.start()
    found = look_up(["silent.example", "good.example"], patience_s=0.1)
    assert (found["silent.example"].reason, found["good.example"].reason) == (Reason.TIMEOUT, None)


def test_few_threads_do_where_no_more_can_be_started(names: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    start, num_started = threading.Thread.start, 0

    def scarce(thread: threading.Thread) -> None:
        nonlocal num_started
        num_started += 1
        if num_started > 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    good = [f"good{i}.example" for i in range(5)]
    assert set(look_up(good, patience_s=5)) == set(good)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), ("unknown_host", 1)),
        (socket.gaierror(socket.EAI_NODATA, "No address"), ("unknown_host", 1)),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), ("dns_failure", 2)),
        (socket.gaierror(socket.EAI_FAIL, "Refused"), ("dns_failure", 2)),
        (OSError(24, "Too many open files"), ("dns_failure", 2)),
    ],
)
def test_only_a_plain_no_is_final(names: NameServer, error: OSError, expected: tuple[str, int]) -> None:
    names.errors["a.example"] = error
    ended = download(["http://a.example/1", "http://a.example/2"])
    assert (ended[0].reason, ended[0].attempts) == expected
    assert ended[1].reason == ended[0].reason
    assert names.asked == ["a.example"] * (1 if expected[1] == 1 else 4)


def test_a_host_without_an_answer_costs_one_wait(names: NameServer) -> None:
    started = time.monotonic()
    ended = download([f"http://silent.example/{i}" for i in range(20)], connect_timeout_s=0.3)
    assert {response.reason for response in ended} <= {"timeout", "host_unavailable"}
    assert len(ended) == 20
    assert time.monotonic() - started < 3


def test_an_answer_is_used_by_later_units_too(names: NameServer) -> None:
    for _ in range(2):
        assert download(["http://a.example:9/"])[0].reason == "forbidden_address"
    assert names.asked == ["a.example"]
    assert known_addresses("a.example", time.monotonic()) == ("127.0.0.1",)
    assert known_addresses("a.example", time.monotonic() + 3_600) is None
