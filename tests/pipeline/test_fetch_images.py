"""Builds whose lists say something of the images, or whose images are not plain JPEGs."""

import csv
import hashlib
import json
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.__main__ import main
from pipeline.isolate import Decoders
from pipeline.signals import perceptual_hashes

Row = dict[str, Any]


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., dict[str, Row]]:
    """Write a list and build it; returns the record's rows by caption."""

    def run(columns: Sequence[str], rows: Sequence[Sequence[str]], *words: str) -> dict[str, Row]:
        path = tmp_path / "list.csv"
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        settings = [f"input={path}", f"output={tmp_path / 'out'}", "ray.address=inline", "dedup.exact=false"]
        assert main(["build", *settings, "fetch.allow_private_addresses=true", *words]) == 0
        record = pq.read_table(tmp_path / "out" / "record" / "00000.parquet")
        return {row["caption"]: row for row in record.to_pylist()}

    return run


def body_of(name: str, width: int = 64, height: int = 48) -> bytes:
    """What the site answers for /image/<name>; see conftest."""
    draw = np.random.default_rng(list(name.encode()))
    pixels = cv2.resize(draw.integers(0, 256, (4, 4, 3), np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return bytes(cv2.imencode(".jpg", pixels)[1])


def test_hashes_of_the_list_are_checked_and_others_written(site: Any, build: Any) -> None:
    right = hashlib.md5(body_of("a")).hexdigest()
    rows = build(
        ("url", "caption", "md5"),
        [
            (f"{site.url}/image/a", "right", right),
            (f"{site.url}/image/b", "wrong", right),
            (f"{site.url}/gone/c", "gone", ""),
        ],
        *("columns.hash=md5", "fetch.verify_hash=md5", "fetch.compute_hash=sha512"),
    )
    assert (rows["right"]["status"], rows["right"]["sha512"]) == ("kept", hashlib.sha512(body_of("a")).hexdigest())
    assert (rows["wrong"]["status"], rows["wrong"]["reason"]) == ("dropped", "hash_mismatch")
    assert hashlib.md5(body_of("b")).hexdigest() in rows["wrong"]["detail"]
    assert rows["wrong"]["size_bytes"] == len(body_of("b"))
    assert rows["gone"]["reason"] == "http_404"
    assert rows["right"]["source_md5"] == right


def test_boxes_of_the_list_are_blurred(site: Any, build: Any, tmp_path: Path) -> None:
    rows = build(
        ("url", "caption", "faces"),
        [
            (f"{site.url}/image/a", "face", json.dumps([[0.0, 0.0, 0.6, 0.6]])),
            (f"{site.url}/image/a", "no face", ""),
            (f"{site.url}/image/a", "unreadable", "[[12, 30, 400, 500]]"),
        ],
        "columns.boxes=faces",
    )
    assert [rows[caption]["reason"] for caption in ("face", "no face", "unreadable")] == [None, None, "bad_boxes"]
    with tarfile.open(tmp_path / "out" / "shards" / "00000.tar") as tar:
        stored = {tar.extractfile(f"{rows[caption]['key']}.jpg").read() for caption in ("face", "no face")}  # type: ignore[union-attr]
    assert len(stored) == 2
    assert rows["face"]["sha256"] == rows["no face"]["sha256"]
    assert rows["face"]["sharpness"] < rows["no face"]["sharpness"]


def test_measures_are_in_the_record(site: Any, build: Any) -> None:
    row = build(("url", "caption"), [(f"{site.url}/image/a", "a")], "image.exif=true", "image.mode=fast")["a"]
    pixels = cv2.imdecode(np.frombuffer(body_of("a"), np.uint8), cv2.IMREAD_COLOR)
    assert (row["phash"], row["phash_mirror"]) == perceptual_hashes(pixels)
    assert row["exif"] == "{}"
    assert row["sharpness"] > 0
    assert row["md5"] is None


@pytest.mark.parametrize(
    ("words", "named"),
    [(["columns.hash=md", "fetch.verify_hash=md5"], "columns.hash=md5"), (["columns.boxes=x"], "columns.boxes")],
)
def test_columns_that_the_list_lacks_are_refused_before_any_work(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.csv").write_text("url,caption,md5\nhttp://127.0.0.1/a,b,c\n")
    settings = [f"input={tmp_path / 'list.csv'}", f"output={tmp_path / 'out'}", "ray.address=inline"]
    assert main(["build", *settings, *words]) == 2
    assert named in capsys.readouterr().err


def test_a_build_outlives_its_decoding_processes(site: Any, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are killed once while images are on their way: every row is there, and kept."""
    killed = threading.Event()
    take = Decoders.take

    def take_and_kill(self: Decoders) -> Any:
        results = take(self)
        if results and self._host is not None and not killed.is_set():
            killed.set()
            os.kill(self._host.pid, signal.SIGKILL)
        return results

    monkeypatch.setattr(Decoders, "take", take_and_kill)
    names = [f"n{number}" for number in range(30)]
    rows = build(("url", "caption"), [(f"{site.url}/image/{name}", name) for name in names], "curate.drop_blank=false")
    assert killed.is_set()
    assert {row["status"] for row in rows.values()} == {"kept"}
    assert {rows[name]["sha256"] for name in names} == {hashlib.sha256(body_of(name)).hexdigest() for name in names}
