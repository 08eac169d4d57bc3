import asyncio
import contextlib
import gzip
import io
import json
import os
import socket
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from loopback import listen_on_loopback
from PIL import Image

from cluster.config import parse
from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal
from cluster.progress import Progress
from cluster.store import Store
from pipeline.config import BuildConfig, FetchConfig
from pipeline.event_loop import raise_file_limit
from pipeline.fetch import FETCHED, FetchStage
from pipeline.http import Downloader
from pipeline.job import Response
from pipeline.plan import OrderStage, ReadStage

Row = dict[str, Any]
FAST = ("fetch.allow_private_addresses=true", "fetch.backoff_s=0.02", "fetch.timeout_s=10")


def jpeg(seed: int = 0, size: int = 64) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def head(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return head(status, f"Content-Length: {len(body)}", *headers) + body


@dataclass
class Web:
    """A server that writes raw bytes, so that it can misbehave in every way. `seen` counts requests by path."""

    port: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    long_answer: bytes = b""
    open_now: Counter[str] = field(default_factory=Counter)
    open_most: Counter[str] = field(default_factory=Counter)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                path = request.split()[1].decode().lstrip("/")
                host = request.decode().lower().partition("host: ")[2].partition(":")[0]
                self.seen[path] += 1
                self.open_now[host] += 1
                self.open_most[host] = max(self.open_most[host], self.open_now[host])
                keep = await self.answer(path, writer)
                self.open_now[host] -= 1
                if not keep:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def answer(self, path: str, writer: asyncio.StreamWriter) -> bool:
        """Write the answer to a path; True keeps the connection open."""
        kind, _, argument = path.partition("/")
        if kind == "jpg":
            writer.write(answer(jpeg(int(argument))))
        elif kind == "status":
            writer.write(answer(b"no" * 50, status=f"{argument} Whatever"))
        elif kind == "flaky" and self.seen[path] <= 2:
            writer.write(answer(b"", status="503 Busy"))
        elif kind == "flaky":
            writer.write(answer(jpeg()))
        elif kind == "reset" and self.seen[path] == 1:
            writer.transport.abort()
            return False
        elif kind == "reset":
            writer.write(answer(jpeg()))
        elif kind == "truncated":
            writer.write(head("200 OK", "Content-Length: 5000") + jpeg()[:1_000])
            return False
        elif kind == "cut":
            writer.write(answer(jpeg(size=200)[:3_000]))
        elif kind == "empty":
            writer.write(answer(b""))
        elif kind == "html":
            writer.write(answer(b"<html><body>not found</body></html>", "Content-Type: image/jpeg"))
        elif kind == "gzip":
            writer.write(answer(gzip.compress(jpeg()), "Content-Encoding: gzip"))
        elif kind == "bomb":
            writer.write(answer(gzip.compress(bytes(20 * 2**20)), "Content-Encoding: gzip"))
        elif kind == "announced":
            writer.write(head("200 OK", "Content-Length: 99999999999"))
        elif kind == "endless":
            writer.write(head("200 OK"))
            while not writer.is_closing():
                writer.write(bytes(2**16))
                await writer.drain()
        elif kind == "slow":
            await asyncio.sleep(float(argument))
            writer.write(answer(jpeg()))
        elif kind == "drip":
            writer.write(head("200 OK", "Content-Length: 1000"))
            for _ in range(1_000):
                writer.write(b"\xff")
                await writer.drain()
                await asyncio.sleep(0.05)
        elif kind == "long":
            writer.write(self.long_answer)
        elif kind == "raw":
            writer.write(bytes.fromhex(argument))
            return False
        elif kind == "to":
            writer.write(answer(b"moved", f"Location: {bytes.fromhex(argument).decode()}", status="302 Found"))
        elif kind == "loop":
            writer.write(answer(b"", "Location: /loop", status="301 Moved"))
        elif kind == "nowhere":
            writer.write(answer(b"", status="304 Not Modified"))
        await writer.drain()
        return True

    def raw(self, answer: bytes) -> str:
        return self.url(f"raw/{answer.hex()}")

    def redirect(self, target: str) -> str:
        return self.url(f"to/{target.encode().hex()}")


@pytest.fixture
def web() -> Iterator[Web]:
    """A running server on 127.0.0.1 to 127.0.0.3."""
    served, loop, ready = Web(), asyncio.new_event_loop(), threading.Event()
    servers: list[asyncio.Server] = []

    async def main() -> None:
        sockets = listen_on_loopback(3, backlog=512)
        served.port = sockets[0].getsockname()[1]
        servers.extend([await asyncio.start_server(served.serve, sock=each) for each in sockets])
        ready.set()

    def run() -> None:
        loop.run_until_complete(main())
        loop.run_forever()
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield served

    def stop() -> None:
        for server in servers:
            server.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: loop.stop())

    loop.call_soon_threadsafe(stop)
    thread.join(10)


def fetch(folder: Path, urls: list[str], *settings: str) -> tuple[dict[str, Row], dict[str, bytes], Any]:
    """Plan and fetch a list; returns rows by URL, images by uid, and the markers."""
    folder.mkdir(exist_ok=True)
    source = folder / "list.jsonl"
    source.write_text("\n".join(json.dumps({"url": url, "caption": f"c{i}"}) for i, url in enumerate(urls)))
    config = parse(BuildConfig, [f"input={source}", f"output={folder / 'out'}", *FAST, *settings])
    store = Store(config.output)
    journal, progress = Journal(store), Progress()
    read = run_stage(ReadStage.of(config), journal, InlineExecutor(), progress)
    run: Any = partial(run_stage, journal=journal, executor=InlineExecutor(), progress=progress)
    order = OrderStage.of(config, store, read).with_rules(config.curate, run)
    ordered = run_stage(order, journal, InlineExecutor(), progress)
    markers = run_stage(FetchStage.of(config, store, ordered), journal, InlineExecutor(), progress)
    rows: dict[str, Row] = {}
    images: dict[str, bytes] = {}
    for marker in markers.values():
        with store.open(marker.path_of("rows.parquet")) as file:
            table = pq.read_table(file)
        assert table.schema.names[: len(FETCHED)] == FETCHED.names
        rows |= {row["url"]: row for row in table.to_pylist()}
        with tarfile.open(store.full(marker.path_of("images.tar"))) as tar:
            for member in tar:
                images[Path(member.name).stem] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return rows, images, markers


def test_kept_images_and_their_rows_belong_together(tmp_path: Path, web: Web) -> None:
    urls = [web.url(f"jpg/{i}") for i in range(40)]
    rows, images, markers = fetch(tmp_path, urls, "plan.rows_per_unit=15", "image.size=32")
    assert len(rows) == len(images) == 40
    assert sorted(markers) == ["00000-00000", "00000-00001", "00000-00002"]
    for marker in markers.values():
        table = pq.read_table(tmp_path / "out" / marker.path_of("rows.parquet"))
        tar = (tmp_path / "out" / marker.path_of("images.tar")).read_bytes()
        assert table["order"].to_pylist() == sorted(table["order"].to_pylist())
        for row in table.to_pylist():
            data = tar[row["image_offset"] : row["image_offset"] + row["image_size"]]
            assert data == images[row["uid"]]
            assert Image.open(io.BytesIO(data)).size == (32, 32) == (row["width"], row["height"])
    row = rows[web.url("jpg/7")]
    body = jpeg(7)
    assert (row["status"], row["reason"], row["http_status"], row["attempts"]) == ("ok", None, 200, 1)
    assert (row["size_bytes"], row["sha256"]) == (len(body), sha256(body).hexdigest())
    assert (row["source_format"], row["image_format"], row["original_width"]) == ("jpeg", "jpg", 64)
    assert sum(marker.counts["reason:ok"] for marker in markers.values()) == 40


def test_many_open_files_do_no_harm(tmp_path: Path, web: Web) -> None:
    raise_file_limit()
    with contextlib.ExitStack() as stack:
        for _ in range(1_100):  # select() would refuse the next ones
            stack.enter_context(open(os.devnull))
        rows, _, _ = fetch(tmp_path, [web.url("jpg/1")])
    assert [row["reason"] for row in rows.values()] == [None]


def test_each_failure_has_its_reason(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, *rest: object, **more: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("pipeline.resolver.socket.getaddrinfo", resolve)
    expected = {
        web.url("jpg/1"): None,
        web.url("gzip"): None,
        web.redirect(web.url("jpg/2")): None,
        web.url("status/404"): "http_404",
        web.url("status/403"): "http_403",
        web.url("status/500"): "http_500",
        web.url("nowhere"): "http_304",
        web.url("empty"): "empty_body",
        web.url("html"): "not_an_image",
        web.url("truncated"): "truncated",
        web.url("cut"): "truncated_image",
        web.url("loop"): "too_many_redirects",
        web.url("announced"): "too_large",
        web.url("endless"): "too_large",
        web.url("bomb"): "too_large",
        web.redirect("ftp://a.example/x"): "unsupported_scheme",
        web.redirect("file:///etc/passwd"): "unsupported_scheme",
        "http://127.0.0.1:9/closed": "connection_failed",
        "http://nonexistent.invalid/": "unknown_host",
        "gopher://a.example/x": "unsupported_scheme",
        "nothing": "invalid_url",
    }
    rows, images, markers = fetch(tmp_path, [*expected], "fetch.max_bytes=10000000", "fetch.retries=1")
    assert {url: row["reason"] for url, row in rows.items()} == expected
    assert {row["status"] for row in rows.values() if row["reason"]} == {"dropped"}
    assert len(images) == 3
    assert web.seen["status/404"] == 1
    assert web.seen["status/500"] == web.seen["truncated"] == 2
    assert rows[web.url("loop")]["num_redirects"] == 5
    moved = rows[web.redirect(web.url("jpg/2"))]
    assert (moved["final_url"], moved["num_redirects"]) == (web.url("jpg/2"), 1)
    (marker,) = markers.values()
    assert marker.counts["rows"] == len(expected)
    assert marker.counts["reason:ok"] == 3
    assert marker.counts["reason:too_large"] == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"this is no HTTP at all\r\n\r\n", "bad_response"),
        (b"", "connection_failed"),
        (head("200 OK", "Content-Length: -5"), "bad_response"),
        (head("200 OK", "Content-Length: 5", "Content-Length: 2") + b"ok", "bad_response"),
        (head("200 OK", "Content-Encoding: gzip", "Content-Length: 4") + b"abcd", "bad_response"),
        (head("200 OK", "Transfer-Encoding: chunked") + b"10\r\nxx", "truncated"),
        (head("200 OK", *(f"X-{i}: {'a' * 2_000}" for i in range(200))), "bad_response"),
        (head("302 \u00ff", "X-\u00ff: \u00fe", "Location: http://a\x01b/"), "invalid_url"),
        (head("404 Gone", "Content-Length: 500") + b"x", "http_404"),
    ],
)
def test_malformed_answers_have_their_reason(web: Web, answer: bytes, reason: str) -> None:
    if len(answer) > 10_000:  # too long for a URL
        web.long_answer, url = answer, web.url("long")
    else:
        url = web.raw(answer)
    config = FetchConfig(allow_private_addresses=True, retries=0)
    assert [response.reason for response in download(config, [url])] == [reason]


def test_transient_failures_are_tried_again_and_permanent_ones_never(tmp_path: Path, web: Web) -> None:
    urls = [web.url("flaky"), web.url("reset"), web.url("status/410"), web.url("status/429")]
    rows, _, _ = fetch(tmp_path, urls, "fetch.retries=3")
    attempts = {url: (row["reason"], row["attempts"]) for url, row in rows.items()}
    assert attempts[web.url("flaky")] == (None, 3)
    assert (attempts[web.url("reset")][0], web.seen["reset"]) == (None, 2)  # or libcurl does it
    assert attempts[web.url("status/410")] == ("http_410", 1)
    assert attempts[web.url("status/429")] == ("http_429", 4)


def test_waiting_for_a_retry_holds_up_nobody(web: Web) -> None:
    config = FetchConfig(allow_private_addresses=True, retries=1, backoff_s=1.5, connections=1)
    ended = download(config, [web.url("status/503"), *(web.url(f"jpg/{i}") for i in range(5))])
    assert [response.index for response in ended][-1] == 0
    assert ended[-1].attempts == 2


def test_a_host_that_answers_slowly_does_not_hold_a_unit_for_ever(web: Web) -> None:
    config = FetchConfig(allow_private_addresses=True, connections_per_host=2, max_busy_s=0.6)
    urls = [web.url(f"slow/0.25#{number}") for number in range(40)]
    begun = time.monotonic()
    reasons = Counter(response.reason for response in download(config, [*urls, web.url("jpg/1", "127.0.0.2")]))
    assert time.monotonic() - begun < 4, "40 of them would take 5 s"
    assert set(reasons) == {None, "host_unavailable"}
    assert reasons[None] >= 5


def test_slow_servers_are_timeouts(tmp_path: Path, web: Web) -> None:
    urls = [web.url("slow/30"), web.url("drip"), web.url("jpg/1")]
    limits = ("fetch.timeout_s=2.5", "fetch.connect_timeout_s=1", "fetch.min_speed_s=1", "fetch.retries=0")
    started = time.monotonic()
    rows, _, _ = fetch(tmp_path, urls, *limits)
    assert [rows[url]["reason"] for url in urls] == ["timeout", "timeout", None]
    assert time.monotonic() - started < 10


def test_private_addresses_are_refused_on_redirects_too(web: Web) -> None:
    """The guard is on for the whole world but this server, which stands for a public one."""
    targets = [
        "http://169.254.169.254/latest/meta-data",
        f"http://[::1]:{web.port}/jpg/1",
        "http://10.0.0.1/",
    ]
    config = FetchConfig(timeout_s=5, connect_timeout_s=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.transfer.is_public", lambda address: address == "127.0.0.1")
        ended = download(config, [*(web.redirect(target) for target in targets), web.url("jpg/1")])
    assert [response.reason for response in sorted(ended, key=lambda response: response.index)] == [
        *["forbidden_address"] * 3,
        None,
    ]
    assert web.seen["jpg/1"] == 1


def test_a_build_refuses_loopback_unless_it_is_allowed(tmp_path: Path, web: Web) -> None:
    rows, _, _ = fetch(tmp_path, [web.url("jpg/1")], "fetch.allow_private_addresses=false")
    assert rows[web.url("jpg/1")]["reason"] == "forbidden_address"
    assert web.connections == 0


def download(config: FetchConfig, urls: list[str], limit_bytes: int = 2**28) -> list[Response]:
    ended: list[Response] = []
    with Downloader(config) as downloader:
        for index, url in enumerate(urls):
            downloader.submit(index, url)
        while downloader.num_open:
            ended += downloader.poll(0.1, limit_bytes)
    return ended


def test_connections_are_reused_and_hosts_are_not_crowded(web: Web) -> None:
    hosts = ["127.0.0.2", "127.0.0.3"]
    urls = [web.url(f"slow/0.01?{i}", host) for i in range(30) for host in hosts]
    config = FetchConfig(allow_private_addresses=True, connections_per_host=3)
    web_slow = [url.replace("?", "#") for url in urls]  # fragments are not sent
    assert [response.reason for response in download(config, web_slow)] == [None] * 60
    assert max(web.open_most.values()) <= 3
    assert web.connections <= 6


def test_bodies_above_the_memory_limit_are_given_up_and_begun_again(web: Web) -> None:
    """Eight endless bodies of up to 4 MB, 6 MB to hold them in."""
    config = FetchConfig(allow_private_addresses=True, max_bytes=4_000_000, connections=8, retries=0)
    most = 0
    ended: list[Response] = []
    with Downloader(config) as downloader:
        for index in range(8):
            downloader.submit(index, web.url("endless"))
        while downloader.num_open:
            ended += downloader.poll(0.1, 6_000_000)
            most = max(most, downloader.held_bytes)
    assert [response.reason for response in ended] == ["too_large"] * 8
    assert {response.attempts for response in ended} == {1}
    assert most < 6_000_000 + 8 * 700_000  # what one turn of the loop may add


def test_rows_without_download_keep_the_plans_verdict(tmp_path: Path, web: Web) -> None:
    rows, _, _ = fetch(tmp_path, [web.url("jpg/1"), "ftp://a/x"], "curate.min_caption_chars=10")
    row = rows[web.url("jpg/1")]
    assert (row["status"], row["reason"], row["rule"], row["score"]) == (
        *("dropped", "caption_too_short", "curate.min_caption_chars"),
        2.0,
    )
    assert (row["attempts"], row["sha256"], web.connections) == (0, None, 0)


def test_same_responses_give_the_same_rows_and_images(tmp_path: Path, web: Web) -> None:
    urls = [web.url(path) for path in (*(f"jpg/{i}" for i in range(20)), "html", "status/404", "empty")]
    results = [fetch(tmp_path / name, urls)[:2] for name in ("one", "two")]
    moment = ("detail", "image_offset", *FETCHED.names[FETCHED.names.index("attempts") :])
    for rows, _ in results:
        for row in rows.values():
            for name in moment:
                row.pop(name)
    assert results[0] == results[1]
