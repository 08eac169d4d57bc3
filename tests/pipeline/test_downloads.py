"""How downloads went is told by reason, HTTP status, host and attempts, in `status` and in the report."""

import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.cli import main as pairmill
from cluster.journal import Marker
from pipeline.__main__ import main
from pipeline.downloads import COLUMNS, NO_ANSWER, Totals, status_name, tally_downloads
from pipeline.timings import Timing


def rows(*values: tuple[Any, ...]) -> pa.Table:
    types = (pa.string(), pa.string(), pa.int32(), pa.int32(), pa.int64(), pa.int32())
    columns = zip(*values, strict=True) if values else [()] * len(COLUMNS)
    return pa.table({name: pa.array(column, kind) for name, column, kind in zip(COLUMNS, columns, types, strict=True)})


def test_pairs_are_counted_by_status_host_and_attempts() -> None:
    table = rows(
        ("http://a.test/1", None, 200, 1, 100, 64),
        ("http://a.test/2", "duplicate_bytes", 200, 2, 100, 64),  # an image came, whatever became of it
        ("http://a.test:81/3", "http_404", 404, 1, None, None),
        ("http://b.test/4", "not_an_image", 200, 1, 50, None),
        ("http://c.test/5", "timeout", None, 3, None, None),
    )
    found = tally_downloads([table.slice(0, 2), table.slice(2)])
    assert {status: (t.num_pairs, t.num_images) for status, t in found.statuses()} == {
        200: (3, 2),
        404: (1, 0),
        NO_ANSWER: (1, 0),
    }
    assert [(host, t.num_pairs, t.num_failed, t.main_reason) for host, t in found.largest_hosts()] == [
        ("a.test", 3, 1, "http_404"),
        ("b.test", 1, 1, "not_an_image"),
        ("c.test", 1, 1, "timeout"),
    ]
    assert [(number, t.num_pairs, t.num_requests) for number, t in found.attempts()] == [
        (1, 3, 3),
        (2, 1, 2),
        (3, 1, 3),
    ]
    assert found.by_host["a.test"].size_bytes == 200


def test_hosts_without_a_failure_are_not_among_the_failing() -> None:
    table = rows(("http://a.test/1", None, 200, 1, 9, 64), ("http://b/2", "timeout", None, 1, None, None))
    found = tally_downloads([table])
    assert [host for host, _ in found.failing_hosts()] == ["b"]


def test_an_answer_whose_status_is_not_told_is_no_missing_answer() -> None:
    found = tally_downloads(
        [rows(("http://a/1", None, None, 1, 9, 64), ("http://a/2", "timeout", None, 1, None, None))]
    )
    assert {status_name(status): tally.num_images for status, tally in found.statuses()} == {
        "not told": 1,
        "no answer": 0,
    }


def test_pairs_that_were_not_asked_for_are_not_counted() -> None:
    found = tally_downloads([rows((None, "missing_url", None, 0, None, None)), rows()])
    assert found.statuses() == found.largest_hosts() == found.attempts() == []


def test_totals_are_of_every_marker_and_rates_of_finished_commands() -> None:
    markers = [
        Marker(stage="fetch", unit=unit, attempt="x", outputs=(), counts=counts, seconds=2.0)
        for unit, counts in (
            ("00000", {"images": 30, "requests": 50, "retries": 10, "bytes": 900}),
            ("00001", {"images": 10, "requests": 10, "retries": 0, "bytes": 100}),
        )
    ]
    timing = Timing(stage="fetch", wall_s=4.0, num_units=2, num_rows=60, num_images=40, num_bytes=1_000)
    totals = Totals.of(markers, [timing, Timing(stage="pack", wall_s=9.0, num_units=1, num_rows=40, num_images=0)])
    assert (totals.num_images, totals.num_requests, totals.num_retries, totals.size_bytes) == (40, 60, 10, 1_000)
    assert (totals.images_per_s, totals.bytes_per_s, totals.images_per_worker_s) == (10.0, 250.0, 10.0)
    assert Totals.of(markers, []).images_per_s == 0


def test_status_tells_reasons_statuses_hosts_and_speed(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Through the command that people use; the wide console keeps lines whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        assert pairmill(["status", str(dataset)]) == 0
    said = capfd.readouterr().out
    assert re.search(r"downloads: 34 images, [\d.]+ KB, 40 requests, 0 of them retries", said)
    assert re.search(r"speed: [\d.,]+ images/s, [\d.]+ [KM]B/s; [\d.,]+ images/s a worker", said)
    assert re.search(r"ok +36 +81\.8% +downloaded and decoded", said)
    assert re.search(r"http_404 +3 +6\.8% +the server answered with HTTP status 404", said)
    assert re.search(r"HTTP 404 +3 +0 +0\.0% +3 +3 +0 B +http_404", said)
    assert len(re.findall(r"127\.0\.0\.1 +40 +34 +85\.0% +6 +40", said)) == 2


def test_status_of_a_build_whose_work_is_gone_says_where_to_look(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    shutil.rmtree(folder / "work")
    assert main(["status", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "http_404" in said
    assert "work/fetch/ was removed" in said
    shutil.rmtree(folder / "journal")
    assert main(["status", str(folder)]) == 0
    assert capsys.readouterr().out == ""


def test_the_report_shows_the_downloads(dataset: Path) -> None:
    text = (dataset / "report/index.html").read_text()
    section = text[text.index('id="downloads"') :]
    plain = re.sub(r"<[^>]+>+", " ", section[: section.index("</section>")])
    words = " ".join(plain.split())
    assert re.search(r"40 requests 0\.0% of them retries", words)
    assert "HTTP 404 3 0 0.0% 3 3 0 B http_404" in words
    assert words.count("127.0.0.1 40 34 85.0% 6 40") == 2
