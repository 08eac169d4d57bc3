"""Fetch outputs and small builds for the pipeline's tests."""

import csv
import hashlib
import http.server
import io
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle as pickle

from cluster.executor import InlineExecutor
from cluster.journal import Journal, Marker
from cluster.store import Store
from pipeline.__main__ import main
from pipeline.fetch import FETCHED

ROWS = pa.schema([*FETCHED, pa.field("licence", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A fetched row in short: `body` decides sha256 and image; None is a row that was dropped, with `reason`."""

    uid: int
    body: str | None = "a"
    reason: str = "http_404"
    num_rows: int = 1
    width: int = 64
    height: int = 48
    grey_std: float = 40.0
    licence: str | None = "CC0"
    url: str = ""
    caption: str = ""
    phash: int | None = None
    phash_mirror: int | None = None


def jpeg(seed: str, width: int = 64, height: int = 48) -> bytes:
    """A small picture that differs for every seed."""
    draw = np.random.default_rng(list(seed.encode()))
    pixels = cv2.resize(draw.integers(0, 256, (4, 4, 3), np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return bytes(cv2.imencode(".jpg", pixels)[1])


Fetch = Callable[[Sequence[Sequence[dict[str, Any]]]], list[Marker]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


@pytest.fixture
def fetch(store: Store) -> Fetch:
    """Commit fetch units, each a list of `Pair` fields, as the fetch stage would; returns their markers in order."""

    def commit(units: Sequence[Sequence[dict[str, Any]]]) -> list[Marker]:
        return [
            _commit(Journal(store), f"00000-{index:05}", [Pair(**pair) for pair in pairs])
            for index, pairs in enumerate(units)
        ]

    return commit


def _commit(journal: Journal, unit: str, pairs: Sequence[Pair]) -> Marker:
    with journal.attempt("fetch", unit) as output:
        places = _write_images(output.path("images.tar"), pairs)
        rows = [_row(pair, places.get(pair.uid)) for pair in pairs]
        pq.write_table(pa.Table.from_pylist(rows, ROWS), output.path("rows.parquet"))
        output.count("rows", sum(pair.num_rows for pair in pairs))
        output.count("reason:ok", sum(pair.num_rows for pair in pairs if pair.body is not None))
        return journal.commit("fetch", unit, output)


def _write_images(path: Path, pairs: Sequence[Pair]) -> dict[int, tuple[int, int]]:
    """uid -> (offset, size); stored in another order than the rows, as images arrive."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for pair in reversed(pairs):
            if pair.body is not None:
                data = jpeg(pair.body, pair.width, pair.height)
                member = tarfile.TarInfo(f"{pair.uid:032x}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return {int(member.name[:32], 16): (member.offset_data, member.size) for member in tar}


def _row(pair: Pair, place: tuple[int, int] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "uid": f"{pair.uid:032x}",
        "order": pair.uid,
        "url": pair.url or f"http://host{pair.uid % 3}.test/{pair.uid}.jpg",
        "caption": pair.caption or f"caption of {pair.uid} \N{SNOWMAN}",
        "num_rows": pair.num_rows,
        "http_status": 404 if place is None else 200,
        "attempts": 1,
        "seconds": 0.01,
        "num_redirects": 0,
        "licence": pair.licence,
    }
    if place is None:
        return {**row, "status": "dropped", "reason": pair.reason}
    assert pair.body is not None
    return {
        **row,
        "status": "ok",
        "size_bytes": 1000,
        "sha256": hashlib.sha256(pair.body.encode()).hexdigest(),
        "source_format": "jpeg",
        "original_width": pair.width,
        "original_height": pair.height,
        "width": pair.width,
        "height": pair.height,
        "image_format": "jpg",
        "is_animated": False,
        "grey_std": pair.grey_std,
        "phash": pair.phash,
        "phash_mirror": pair.phash_mirror,
        "image_offset": place[0],
        "image_size": place[1],
    }


@dataclass(kw_only=True)
class Site:
    """A web server on loopback whose paths mean what they say; see `_answer`. `delay_s` slows every answer.

    well: of the kinds `later` and `never`, which answer 503, those that give pictures by now.
    """

    url: str
    well: set[str] = field(default_factory=set)
    delay_s: float = 0.0
    num_requests: int = 0


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    answers: dict[str, Any] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            here.num_requests += 1
            time.sleep(here.delay_s)
            kind = self.path.split("/")[1]
            if kind in ("later", "never"):
                status, headers, body = (
                    _answer(self.path.replace(kind, "image")) if kind in here.well else (503, {}, b"")
                )
            else:
                status, headers, body = answers.setdefault(self.path, _answer(self.path))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            """Quiet."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients that were killed hang up in the middle of an answer."""

    server = Server(("127.0.0.1", 0), Handler)
    here = Site(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield here
    server.shutdown()
    server.server_close()
    thread.join()


def _answer(path: str) -> tuple[int, dict[str, str], bytes]:
    """`/kind/name`: (status, headers, body). The same name is the same picture, of whatever kind."""
    kind, name = path.strip("/").partition("?")[0].split("/")
    picture = jpeg(name)
    answers: dict[str, tuple[int, dict[str, str], bytes]] = {
        "image": (200, {}, picture),
        "copy": (200, {}, picture),
        "cut": (200, {}, picture[: len(picture) // 2]),
        "html": (200, {"Content-Type": "image/jpeg"}, b"<html><body>gone</body></html>"),
        "empty": (200, {}, b""),
        "moved": (302, {"Location": f"/image/{name}"}, b""),
        "blank": (200, {}, bytes(cv2.imencode(".jpg", np.full((48, 64, 3), len(name), np.uint8))[1])),
        "small": (200, {}, jpeg(name, 12, 12)),
    }
    return answers.get(kind, (404, {}, b""))


# (kind, name, caption): of a list with everything that a small list can have
LIST: tuple[tuple[str, str, str], ...] = (
    *(("image", f"n{number}", f"picture number {number}") for number in range(24)),
    ("image", "n20", "picture number 20"),
    ("image", "n0", "another caption"),
    *(("copy", f"n{number}", f"copy of {number}") for number in range(1, 5)),
    *(("moved", f"m{number}", f"moved {number}") for number in range(3)),
    *(("gone", f"g{number}", f"gone {number}") for number in range(3)),
    ("html", "page", "a page"),
    ("cut", "cut", "half a picture"),
    ("empty", "empty", "nothing"),
    ("blank", "blank", "grey"),
    ("small", "small", "too small"),
    ("small", "small", "too small"),
)
COUNTS = {
    # n0 under two captions and n1 to n4 at two addresses are one sample each
    "kept": 27,
    "repeated_pair": 1,
    "duplicate_bytes": 5,
    "http_404": 3,
    "not_an_image": 1,
    "truncated_image": 1,
    "empty_body": 1,
    "image_blank": 1,
    "image_too_small": 2,
    "unreadable_row": 1,
    "missing_url": 1,
}


@pytest.fixture(scope="module")
def url_list(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`LIST` as a CSV file with two extra columns, a row without a URL and a row that cannot be read."""
    path = tmp_path_factory.mktemp("lists") / "list.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption", "licence", "rank"])
        for rank, (kind, name, caption) in enumerate(LIST):
            writer.writerow([f"{site.url}/{kind}/{name}", caption, "CC0", rank])
        writer.writerow(["", "no address", "CC0", 99])
        file.write("a row,with,too,many,fields\r\n")
    return path


Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def words(url_list: Path) -> Words:
    """The settings of a small build into a folder, as words of a command line; further ones override."""

    def settings(output: Path, *more: str) -> list[str]:
        return [
            f"input={url_list}",
            f"output={output}",
            "ray.address=inline",
            "fetch.allow_private_addresses=true",
            "fetch.backoff_s=0",
            "plan.rows_per_unit=7",
            "pack.samples_per_shard=10",
            "curate.min_side_px=16",
            *more,
        ]

    return settings


@pytest.fixture(scope="module")
def dataset(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished build that tests may read; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("dataset") / "out"
    assert main(["build", *words(folder)]) == 0
    return folder


@pytest.fixture
def far_workers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and `ray.address=inline` does units as Ray's workers may: the last first, with pickled copies of all."""

    def as_ray_does(self: InlineExecutor, function: Any, items: Sequence[Any], **needs: Any) -> Iterator[Any]:
        for item in reversed(items):
            there, sent = pickle.loads(pickle.dumps((function, item)))
            yield pickle.loads(pickle.dumps(there(sent)))

    return lambda: monkeypatch.setattr(InlineExecutor, "map_unordered", as_ray_does)


@pytest.fixture
def counts() -> dict[str, int]:
    """What becomes of the rows of `url_list`."""
    return COUNTS
