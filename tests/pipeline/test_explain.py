"""Explain tells the story of any pair, from a finished build and from one that stopped."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest

from pipeline.__main__ import main


def tell(capsys: pytest.CaptureFixture[str], dataset: Path, pair: str) -> str:
    assert main(["explain", str(dataset), pair]) == 0
    return capsys.readouterr().out


def uids(dataset: Path) -> dict[str, str]:
    """uid by caption."""
    table = pyarrow.dataset.dataset(dataset / "record").to_table(columns=["uid", "caption"])
    return dict(zip(table["caption"].to_pylist(), table["uid"].to_pylist(), strict=True))


def test_a_kept_pair(dataset: Path, site: Any, capsys: pytest.CaptureFixture[str]) -> None:
    story = tell(capsys, dataset, f"{site.url}/image/n9")
    for part in (
        "'picture number 9'",
        "HTTP 200, 1 attempt",
        "jpeg 64x48, stored as jpg 64x48",
        "curate.min_side_px: 48 (keeps at least 16), kept",
        "curate.blank_threshold: ",
        "kept: shards/0000",
        ".tar, key 0000",
    ):
        assert part in story


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("gone/g1", ["HTTP 404", "dropped: http_404: the server answered with HTTP status 404"]),
        ("html/page", ["HTTP 200", "dropped: not_an_image"]),
        ("moved/m0", ["1 redirects, to", "/image/m0", "kept: shards/"]),
        ("small/small", ["2 times the same", "curate.min_side_px: 12 (keeps at least 16), dropped: image_too_small"]),
        ("blank/blank", ["(keeps above 1), dropped: image_blank", "(set by curate.blank_threshold)"]),
    ],
)
def test_every_drop_has_its_story(
    dataset: Path, site: Any, capsys: pytest.CaptureFixture[str], path: str, parts: list[str]
) -> None:
    story = tell(capsys, dataset, f"{site.url}/{path}")
    assert [part for part in parts if part not in story] == []


def test_duplicates_name_each_other(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_caption = uids(dataset)
    one, other = sorted((by_caption["picture number 3"], by_caption["copy of 3"]))
    kept, dropped = tell(capsys, dataset, one), tell(capsys, dataset, other)
    assert f"represents uid {other}" in kept
    assert f"same bytes as uid {one}, key 0000" in dropped
    assert "dropped: duplicate_bytes" in dropped


def test_all_captions_of_a_url_are_told(dataset: Path, site: Any, capsys: pytest.CaptureFixture[str]) -> None:
    story = tell(capsys, dataset, f"{site.url}/image/n0")
    assert "'picture number 0'" in story
    assert "'another caption'" in story
    assert "2 times the same" not in story
    assert "2 times the same" in tell(capsys, dataset, f"{site.url}/image/n20")


def test_a_uid_of_digits_stays_text(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(dataset), "0" * 31 + "7"]) == 2
    assert f"{'0' * 31}7: no pair with this uid" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["{url}/image/n99", "image/n9"])
def test_an_unknown_url_gets_the_nearest(
    dataset: Path, site: Any, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    assert main(["explain", str(dataset), wrong.format(url=site.url)]) == 2
    message = capsys.readouterr().err
    assert "no pair with this URL" in message
    assert f"nearest: {site.url}/image/n9" in message


def test_an_unknown_uid_gets_those_that_begin_alike(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uid = uids(dataset)["picture number 5"]
    assert main(["explain", str(dataset), uid[:12]]) == 2
    assert f"nearest: {uid}" in capsys.readouterr().err


def test_a_build_that_stopped_tells_what_it_knows(
    dataset: Path, site: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stopped"
    shutil.copytree(dataset, folder)
    shutil.rmtree(folder / "journal/record")
    assert "will be kept; the dataset is not packed yet" in tell(capsys, folder, f"{site.url}/image/n9")
    by_caption = uids(dataset)
    one, other = sorted((by_caption["picture number 3"], by_caption["copy of 3"]))
    story = tell(capsys, folder, other)
    assert "step        dedup.exact, dropped: duplicate_bytes" in story
    assert f"same bytes as uid {one}: " in story
    assert "will be dropped; the dataset is not packed yet" in story
    shutil.rmtree(folder / "journal/decide")
    assert "downloaded; the build is not finished" in tell(capsys, folder, f"{site.url}/image/n9")
    assert "dropped: http_404" in tell(capsys, folder, f"{site.url}/gone/g1")
    shutil.rmtree(folder / "journal/fetch")
    assert "waits for its download" in tell(capsys, folder, f"{site.url}/image/n9")


def test_a_finished_build_is_told_of_without_its_work_and_its_journal(
    dataset: Path, site: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    for name in ("work", "journal"):
        shutil.rmtree(folder / name)
        assert "kept: shards/0000" in tell(capsys, folder, f"{site.url}/image/n9")
        assert "curate.min_side_px: 12, dropped" in tell(capsys, folder, f"{site.url}/small/small").replace(
            " (keeps at least 16)", ""
        )


def test_what_holds_no_build_is_a_bad_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(tmp_path), "http://x/y"]) == 2
    assert "holds no pairmill run" in capsys.readouterr().err
    assert main(["explain", str(tmp_path)]) == 2
    assert "pair: required" in capsys.readouterr().err
