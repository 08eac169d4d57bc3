"""A real build over the hostile web server: each row has its reason, the rest is kept, the build ends, memory stays."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from certificates import Authority
from hostile import HostileWeb, head, hostile_web, picture, whole

from pipeline.event_loop import raise_file_limit

PATIENCE_S = 120.0
LIMITS = {
    "fetch.timeout_s": 3.0,
    "fetch.connect_timeout_s": 2.0,
    "fetch.min_speed_s": 1,
    "fetch.retries": 1,
    "fetch.backoff_s": 0.1,
    "fetch.max_wait_s": 5,
    "fetch.max_bytes": 2**20,
    "fetch.memory_mib": 256,
}
MAX_RSS_MIB = 600
"""Interpreter and libraries take 250; a quarter of memory_mib is for bodies, the rest for decoding."""
NUM_HOSTS = 1_000
NUM_DEAD_URLS = 30

PAGES: dict[str, str | None] = {
    "image/plain": None,
    "image/with a space.png": None,
    "image/\N{LATIN SMALL LETTER U WITH DIAERESIS}.png?q=\N{SNOWMAN}#part": None,
    "flaky/503": None,
    "flaky/500": None,
    "reset/once": None,
    "busy/seconds/1": None,
    "busy/date/2": None,
    "busy/seconds/3600": "http_429",
    "busy/date/86400": "http_429",
    "endless_redirect/reached": None,
    "endless": "too_large",
    "endless_chunks": "bad_response",
    "endless/404 Not Found": "http_404",
    "trickle": "timeout",
    "slow_head": "timeout",
    "slow_body": "timeout",
    "silence": "timeout",
    "says_more": "truncated",
    "says_less": "truncated_image",
    "says_vast": "too_large",
    "bomb/gzip": "too_large",
    "bomb/deflate": "too_large",
    "nested": "bad_response",
    "vast_png": "too_many_pixels",
    "html": "not_an_image",
    "empty": "empty_body",
    "cut": "truncated_image",
    "loop/0": "too_many_redirects",
    "reset/always": "connection_failed",
    "status/404": "http_404",
    "status/410": "http_410",
    "status/500": "http_500",
    "opted_out": "opted_out",
    "huge_header": "bad_response",
    "header_bomb": "bad_response",
    "continue": "bad_response",
    "endless_line": "bad_response",
    f"raw/{b'no status line at all'.hex()}": "bad_response",
    f"raw/{b'HTTP/1.1 abc OK'.hex()}0d0a0d0a": "bad_response",
    f"raw/{bytes(range(128, 256)).hex()}0d0a0d0a": "bad_response",
    f"raw/{(head('200 OK', 'Content-Length: -5') + b'abcde').hex()}": "bad_response",
    f"raw/{(head('200 OK', 'Content-Length: 5', 'Content-Length: 2') + b'ab').hex()}": "bad_response",
    f"raw/{(head('200 OK', 'Transfer-Encoding: chunked') + b'zz').hex()}": "bad_response",
    f"raw/{whole(picture('folded'), 'X-A: b', ' folded: c', ': nameless', 'X-Null: a' + chr(0)).hex()}": "bad_response",
    f"raw/{whole(b'', 'Retry-After: Sun, 01 Mar ' + '9' * 30 + ' 12:00:00 GMT', status='503 Later').hex()}": "http_503",
    "raw/": "connection_failed",
}
"""Path -> reason, None for pictures that are kept; each on a host of its own."""

TARGETS: dict[str, str] = {
    "http://169.254.169.254/latest/meta-data/": "forbidden_address",
    "http://2852039166/latest/meta-data/": "forbidden_address",
    "http://0xA9.0376.43518/": "forbidden_address",
    "http://[::1]/": "forbidden_address",
    "http://[::ffff:10.0.0.1]/": "forbidden_address",
    "http://[::ffff:169.254.169.254]/": "forbidden_address",
    "http://10.0.0.1/": "forbidden_address",
    "http://100.64.0.1/": "forbidden_address",
    "http://0.0.0.0/": "forbidden_address",
    "http://user:secret@192.168.1.1/": "forbidden_address",
    "file:///etc/passwd": "unsupported_scheme",
    "gopher://127.0.0.1/": "unsupported_scheme",
    "http://a\x01b/": "invalid_url",
    "http://a b/": "invalid_url",
    "http://[::1/": "invalid_url",
    "//[": "invalid_url",
}
"""Where redirects lead -> reason."""

LISTED: dict[str, str] = {
    "http://127.0.3.1/nul\x00.jpg": "invalid_url",
    "http://127.0.3.1/line\r\nHost: other": "invalid_url",
    "\x00": "invalid_url",
    "http://127.0.3.1/" + "x" * 100_000: "invalid_url",
    "http://" + "y" * 100_000 + "/": "invalid_url",
    "http://" + "\N{LATIN SMALL LETTER U WITH DIAERESIS}" * 100 + "/": "invalid_url",
    "http://127.0.0.1:99999/": "invalid_url",
    "http://1.2.3.4.5.6/": "invalid_url",
    "javascript:alert(1)": "unsupported_scheme",
    "FILE:///etc/passwd": "unsupported_scheme",
    "//127.0.3.1/x": "invalid_url",
    "http://169.254.169.254/latest/": "forbidden_address",
    "http://[fd00:ec2::254]/latest/": "forbidden_address",
    "http://[fe80::1%25eth0]/": "forbidden_address",
    "http://0xa9fea9fe/": "forbidden_address",
}
"""URLs of the list -> reason."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a build of everything above has come to."""

    rows: dict[str, dict[str, Any]]
    expected: dict[str, str | None]
    web: HostileWeb
    dead: str
    silent: str
    wide: list[str]
    status: int
    error: str
    peak_rss_mib: float
    wall_s: float

    def reasons(self, prefix: str) -> Counter[str | None]:
        return Counter(row["reason"] for url, row in self.rows.items() if url.startswith(prefix))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    raise_file_limit()
    folder = tmp_path_factory.mktemp("hostile")
    with hostile_web() as web:
        hosts = [f"127.0.3.{number}" for number in range(1, 250)]
        wide = [f"127.1.{number // 250}.{number % 250 + 1}" for number in range(NUM_HOSTS)]
        web.port = web.listen(hosts + wide)
        free = iter(hosts)
        expected = {web.url(path, next(free)): reason for path, reason in PAGES.items()}
        expected |= {web.url(f"to/{to.encode().hex()}", next(free)): reason for to, reason in TARGETS.items()}
        expected |= {f"http://\uff11\uff12\uff17.0.3.1:{web.port}/image/wide digits": None}
        expected |= {f"http://127.0.770:{web.port}/image/short form": None}  # 127.0.3.2
        expected |= LISTED | _tls(web, folder, free) | {web.url(f"image/{host}", host): None for host in wide}
        dead, silent = f"http://127.0.3.254:{web.listen_deaf('127.0.3.254')}/", web.url("silence", next(free))
        urls = [*expected, *(f"{dead}{i}" for i in range(NUM_DEAD_URLS)), *(f"{silent}/{i}" for i in range(20))]
        source = folder / "list.jsonl"
        source.write_text("\n".join(json.dumps({"url": url, "caption": f"c {i}"}) for i, url in enumerate(urls)))
        started = time.monotonic()
        status, printed, error = build(folder, source)
        peak = re.search(r"VmHWM:\s*(\d+) kB", printed)
        yield Outcome(
            rows=record(folder / "out") if status == 0 else {},
            expected=expected,
            web=web,
            dead=dead,
            silent=silent,
            wide=wide,
            status=status,
            error=error,
            peak_rss_mib=int(peak[1]) / 1024 if peak else 0.0,
            wall_s=time.monotonic() - started,
        )


def _tls(web: HostileWeb, folder: Path, free: Iterator[str]) -> dict[str, str | None]:
    authority = Authority(folder)
    good, expired, wrong, alone, plain, babbler = (next(free) for _ in range(6))
    ports = {
        good: web.listen([good], authority.server(good)),
        expired: web.listen([expired], authority.server(expired, days=-1)),
        wrong: web.listen([wrong], authority.server("127.0.0.1")),
        alone: web.listen([alone], authority.server(alone, is_signed=False)),
        plain: web.listen([plain]),
    }
    expected: dict[str, str | None] = {
        f"https://{host}:{port}/image/tls": "tls_failure" for host, port in ports.items()
    }
    expected[f"https://{good}:{ports[good]}/image/tls"] = None
    # Plain HTTP on the port for TLS reads the handshake as a request without an end: one that never answers.
    expected[f"https://{plain}:{ports[plain]}/image/tls"] = "timeout"
    return expected | {f"https://{babbler}:{web.listen_garbage(babbler)}/image/tls": "tls_failure"}


def build(folder: Path, source: Path) -> tuple[int, str, str]:
    """`pairmill build` in a process of its own; returns its status, output with /proc/self/status, and errors."""
    code = (
        "import sys; from pipeline.__main__ import main; status = main(sys.argv[1:]); "
        "print(open('/proc/self/status').read()); sys.exit(status)"
    )
    settings = [f"{name}={value}" for name, value in LIMITS.items()]
    command = [f"input={source}", f"output={folder / 'out'}", "ray.address=inline", "plan.rows_per_unit=5000"]
    done = subprocess.run(
        [sys.executable, "-c", code, "build", *command, *settings, "fetch.allow_addresses=[127.0.0.0/8]"],
        env={**os.environ, "SSL_CERT_FILE": str(folder / "ca.pem")},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return done.returncode, done.stdout, done.stderr


def record(dataset: Path) -> dict[str, dict[str, Any]]:
    """Rows of the record by URL."""
    tables = [pq.read_table(path) for path in sorted((dataset / "record").glob("*.parquet"))]
    return {row["url"]: row for table in tables for row in table.to_pylist()}


def test_the_build_ends_in_time_with_bounded_memory(outcome: Outcome) -> None:
    assert outcome.status == 0, outcome.error[-3_000:]
    assert 50 < outcome.peak_rss_mib < MAX_RSS_MIB
    assert outcome.wall_s < PATIENCE_S / 2


def test_each_row_has_the_right_reason_and_the_rest_is_kept(outcome: Outcome) -> None:
    found = {url: outcome.rows[url]["reason"] for url in outcome.expected}
    wrong = {url[:200]: (found[url], reason) for url, reason in outcome.expected.items() if found[url] != reason}
    assert wrong == {}  # (found, expected)
    assert len(outcome.rows) == len(outcome.expected) + NUM_DEAD_URLS + 20


def test_a_thousand_hosts_are_all_fetched(outcome: Outcome) -> None:
    assert sum(outcome.reasons(outcome.web.url(f"image/{host}", host))[None] for host in outcome.wide) == NUM_HOSTS


def test_a_dead_host_costs_about_one_timeout(outcome: Outcome) -> None:
    assert set(outcome.reasons(outcome.dead)) <= {"timeout", "host_unavailable"}
    attempts = [row["attempts"] for url, row in outcome.rows.items() if url.startswith(outcome.dead)]
    assert len(attempts) == NUM_DEAD_URLS
    assert sum(attempts) < 15


def test_a_host_that_never_answers_is_left_alone(outcome: Outcome) -> None:
    assert set(outcome.reasons(outcome.silent)) <= {"timeout", "host_unavailable"}
    assert sum(number for (_, path), number in outcome.web.seen.items() if path.startswith("silence/")) < 15


def test_permanent_failures_are_asked_for_once(outcome: Outcome) -> None:
    for path in ("status/404", "status/410", "html", "empty", "cut", "bomb/gzip", "endless", "vast_png", "opted_out"):
        assert [number for (_, seen), number in outcome.web.seen.items() if seen == path] == [1], path


def test_transient_failures_are_asked_for_again(outcome: Outcome) -> None:
    for path in ("status/500", "reset/always", "flaky/503", "reset/once", "busy/seconds/1", "busy/date/2"):
        assert [number for (_, seen), number in outcome.web.seen.items() if seen == path] == [2], path
    for path in ("busy/seconds/3600", "busy/date/86400"):
        assert [number for (_, seen), number in outcome.web.seen.items() if seen == path] == [1], path


def test_rows_say_what_happened(outcome: Outcome) -> None:
    (moved,) = [row for url, row in outcome.rows.items() if "/endless_redirect/" in url]
    assert (moved["num_redirects"], moved["http_status"], moved["http_version"]) == (1, 200, "1.1")
    assert moved["final_url"].endswith("/image/reached")
    assert moved["server_address"] in moved["url"]
    (metadata,) = [row for url, row in outcome.rows.items() if "/to/" in url and b"2852039166".hex() in url]
    assert (metadata["http_status"], metadata["num_redirects"], metadata["server_address"]) == (302, 1, None)
    (secure,) = [row for url, row in outcome.rows.items() if url.startswith("https:") and row["reason"] is None]
    assert secure["tls_seconds"] > 0
    phases = secure["connect_seconds"] + secure["tls_seconds"] + secure["first_byte_seconds"]
    assert 0 < phases <= secure["seconds"] + 0.001  # rounded
