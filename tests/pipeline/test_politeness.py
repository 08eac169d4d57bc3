"""Builds against hosts that count, forbid and reserve: limits hold with any number of workers, refusals say why."""

import contextlib
import csv
import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest
import ray
from loopback import listen_on_loopback

from cluster.config import parse
from cluster.session import RayConfig, ray_session
from pipeline.__main__ import main
from pipeline.config import BuildConfig
from pipeline.hosts import Ask
from pipeline.ledgers import Message, RayLedgers, lease_of
from tests.pipeline.conftest import jpeg

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Web:
    """A server on 127.0.0.1 to 127.0.0.9 that counts. `files`: (host, path) -> answer; else a picture."""

    port: int = 0
    delay_s: float = 0.0
    files: dict[tuple[str, str], Answer] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    open_now: Counter[str] = field(default_factory=Counter)
    open_most: Counter[str] = field(default_factory=Counter)
    starts: dict[str, list[float]] = field(default_factory=dict)
    seen: list[tuple[str, str, str]] = field(default_factory=list)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"

    def reset(self) -> None:
        for counted in (self.files, self.open_now, self.open_most, self.starts, self.seen):
            counted.clear()
        self.delay_s = 0.0

    def paths(self, host: str = "127.0.0.1") -> Counter[str]:
        return Counter(path for where, path, _ in self.seen if where == host)

    @contextlib.contextmanager
    def counted(self, host: str, path: str, agent: str) -> Iterator[None]:
        with self.lock:
            self.seen.append((host, path, agent))
            self.starts.setdefault(host, []).append(time.monotonic())
            self.open_now[host] += 1
            self.open_most[host] = max(self.open_most[host], self.open_now[host])
        time.sleep(self.delay_s)
        with self.lock:  # before the answer is sent: the client may be faster than this thread
            self.open_now[host] -= 1
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[Web]:
    here = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            host = self.headers["Host"].partition(":")[0]
            status, headers, body = here.files.get((host, self.path), (200, {}, b""))
            if (host, self.path) not in here.files:
                is_file = self.path.endswith((".txt", ".json"))
                status, body = (404, b"") if is_file else (200, jpeg(self.path))
            with here.counted(host, self.path, self.headers["User-Agent"]):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            """Quiet."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients hang up where they refuse a body."""

    servers = []
    for listening in listen_on_loopback(9, backlog=256):
        one = Server(listening.getsockname(), Handler, bind_and_activate=False)
        one.socket.close()
        one.socket = listening
        servers.append((one, threading.Thread(target=one.serve_forever, daemon=True)))
    here.port = servers[0][0].socket.getsockname()[1]
    for _, thread in servers:
        thread.start()
    yield here
    for one, thread in servers:
        one.shutdown()
        one.server_close()
        thread.join()


@pytest.fixture
def web(server: Web) -> Web:
    server.reset()
    return server


Build = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Build a list of URLs; returns what the record says of each."""

    def run(urls: Sequence[str], *words: str, name: str = "out") -> dict[str, dict[str, Any]]:
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [("url", "caption"), *((url, f"picture {place}") for place, url in enumerate(urls))]
            )
        settings = [
            f"input={tmp_path / name}.csv",
            f"output={tmp_path / name}",
            "ray.address=inline",
            "fetch.allow_private_addresses=true",
            "fetch.backoff_s=0",
            "fetch.retries=0",
        ]
        assert main(["build", *settings, *words]) == 0
        rows = pyarrow.dataset.dataset(tmp_path / name / "record").to_table().to_pylist()
        return {row["url"]: row for row in rows}

    return run


def verdict(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["status"], row["reason"], row["rule"]


KEPT = ("kept", None, None)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_limit_of_a_host_holds_whatever_the_number_of_workers(web: Web, build: Build, num_workers: int) -> None:
    web.delay_s = 0.03
    urls = [web.url(f"{number}.jpg", f"127.0.0.{1 + number % 2}") for number in range(160)]
    rows = build(
        urls,
        "ray.address=",
        f"ray.num_cpus={num_workers}",
        "plan.rows_per_unit=20",
        "fetch.connections_per_host=3",
        "fetch.memory_mib=256",
    )
    assert [verdict(row) for row in rows.values()] == [KEPT] * 160
    assert dict(web.open_most) == {"127.0.0.1": 3, "127.0.0.2": 3}


def test_the_rate_of_a_host_holds(web: Web, build: Build) -> None:
    urls = [web.url(f"{number}.jpg") for number in range(40)]
    build(urls, "plan.rows_per_unit=20", "fetch.requests_per_s_per_host=20")
    starts = sorted(web.starts["127.0.0.1"])
    assert len(starts) == 40
    assert starts[-1] - starts[0] > 1.8


def test_a_retry_after_holds_for_the_units_that_follow(web: Web, build: Build) -> None:
    host = "127.0.0.9"
    web.files = {(host, f"/{number}"): (429, {"Retry-After": "3600"}, b"") for number in range(3)}
    rows = build([web.url("well"), *(web.url(str(number), host) for number in range(3))], "plan.rows_per_unit=1")
    told = Counter((row["reason"], row["rule"]) for row in rows.values())
    assert told == {(None, None): 1, ("http_429", None): 1, ("host_unavailable", "retry-after"): 2}
    assert web.paths(host).total() == 1


def test_robots_txt_is_obeyed_where_it_is_to_be(web: Web, build: Build) -> None:
    text = b"User-agent: *\nDisallow: /private/\nAllow: /private/open\n"
    web.files["127.0.0.1", "/robots.txt"] = 200, {"X-Robots-Tag": "noindex"}, text
    web.files["127.0.0.3", "/robots.txt"] = 503, {}, b""
    web.files["127.0.0.4", "/robots.txt"] = 301, {"Location": web.url("elsewhere.txt", "127.0.0.5")}, b""
    web.files["127.0.0.5", "/elsewhere.txt"] = 200, {}, b"User-agent: pairmill\nDisallow: /"
    web.files["127.0.0.1", "/leads"] = 302, {"Location": "/private/behind"}, b""
    paths = ["a", "b", "private/c", "private/open/d", "leads"]
    urls = [web.url(path) for path in paths] + [web.url("x", f"127.0.0.{host}") for host in (2, 3, 4)]
    rows = build(urls, "fetch.robots=obey", "plan.rows_per_unit=3")
    forbidden = ("dropped", "robots_disallowed", "robots.txt: Disallow: /private/")
    assert [verdict(rows[url]) for url in urls] == [
        *(KEPT, KEPT, forbidden, KEPT, forbidden, KEPT),
        ("dropped", "robots_unavailable", "robots.txt"),
        ("dropped", "robots_disallowed", "robots.txt: Disallow: /"),
    ]
    assert web.paths() == Counter(["/robots.txt", "/a", "/b", "/private/open/d", "/leads"])  # once for all units
    assert web.paths("127.0.0.3") == Counter(["/robots.txt"])


def test_robots_txt_that_redirect_to_each_other_do_not_hold_up_the_build(web: Web, build: Build) -> None:
    for host, other in (("127.0.0.1", "127.0.0.2"), ("127.0.0.2", "127.0.0.1")):
        web.files[host, "/robots.txt"] = 301, {"Location": web.url("ring", other)}, b""
        web.files[host, "/ring"] = 301, {"Location": web.url("robots.txt", other)}, b""
    rows = build([web.url("a"), web.url("b", "127.0.0.2")], "fetch.robots=obey")
    assert [verdict(row) for row in rows.values()] == [KEPT, KEPT]  # endless redirects are no robots.txt


def test_by_default_robots_txt_is_not_asked_for(web: Web, build: Build) -> None:
    web.files["127.0.0.1", "/robots.txt"] = 200, {}, b"User-agent: *\nDisallow: /"
    rows = build([web.url("a")])
    assert [verdict(row) for row in rows.values()] == [KEPT]
    assert web.paths() == Counter(["/a"])


def test_a_crawl_delay_is_kept(web: Web, build: Build) -> None:
    web.files["127.0.0.1", "/robots.txt"] = 200, {}, b"User-agent: *\nCrawl-delay: 0.4\n"
    build([web.url(f"{number}.jpg") for number in range(4)], "fetch.robots=obey")
    starts = web.starts["127.0.0.1"][1:]
    assert min(after - before for before, after in pairwise(starts)) > 0.3


def test_images_that_are_reserved_are_not_downloaded(web: Web, build: Build) -> None:
    body = jpeg("x", 640, 480)
    for path, headers in {
        "/noai": {"X-Robots-Tag": "noai, nofollow"},
        "/others": {"X-Robots-Tag": "otherbot: noai"},
        "/reserved": {"TDM-Reservation": "1"},
    }.items():
        web.files["127.0.0.1", path] = 200, headers, body
    urls = [web.url(path) for path in ("noai", "others", "reserved", "plain")]
    rows = build(urls)
    assert [verdict(rows[url]) for url in urls] == [
        ("dropped", "opted_out", "x-robots-tag: noai"),
        KEPT,
        ("dropped", "opted_out", "tdm-reservation: 1"),
        KEPT,
    ]
    assert rows[urls[0]]["http_status"] == 200
    assert rows[urls[0]]["size_bytes"] is None
    words = ["fetch.disallowed_header_directives=[]", "fetch.tdm_reservation=ignore", "dedup.exact=false"]
    assert {verdict(row) for row in build(urls, *words, name="all").values()} == {KEPT}


def test_tdmrep_json_is_read_where_it_is_to_be(web: Web, build: Build) -> None:
    rules = b'[{"location": "/art/", "tdm-reservation": 1}]'
    web.files["127.0.0.1", "/.well-known/tdmrep.json"] = 200, {}, rules
    urls = [web.url("art/a"), web.url("b")]
    rows = build(urls, "fetch.tdm_reservation=file")
    assert [verdict(rows[url]) for url in urls] == [("dropped", "opted_out", "tdmrep.json: /art/"), KEPT]
    assert "/art/a" not in web.paths()


def test_we_say_who_we_are(web: Web, build: Build, caplog: pytest.LogCaptureFixture) -> None:
    build([web.url("a")])
    assert caplog.text.count("fetch.contact is not set") == 1
    caplog.clear()
    build([web.url("b")], "fetch.contact=https://example.org/bot", name="known")
    assert "fetch.contact" not in caplog.text
    assert [agent for _, _, agent in web.seen] == [
        "pairmill/0.1 (image-text dataset builder)",
        "pairmill/0.1 (image-text dataset builder; +https://example.org/bot)",
    ]


def test_a_ledger_that_dies_comes_back_and_stays_conservative() -> None:
    config = parse(BuildConfig, ["input=a", "output=b", "fetch.timeout_s=0.5", "fetch.connect_timeout_s=0.5"]).fetch
    with ray_session(RayConfig(num_cpus=1)):
        ledgers = RayLedgers.start(config)

        def slots() -> int:
            return ledgers.send(0, Message("task", {"h": Ask(4)}, (), {})).result(30).grants["h"].slots

        assert slots() == 4
        died = time.monotonic()
        ray.kill(ledgers.actors[0], no_restart=False)
        answers: list[int] = []
        while answers[-2:] != [0, 4] and time.monotonic() < died + 60:  # the old one may answer a last time
            with contextlib.suppress(ray.exceptions.RayError):
                answers.append(slots())
            time.sleep(0.05)
        took_s = time.monotonic() - died
    assert answers[-2:] == [0, 4]
    assert took_s >= lease_of(config)
