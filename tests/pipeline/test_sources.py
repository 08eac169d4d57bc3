"""Several sources in one dataset: names, shares, priorities and categories; and builds against earlier datasets."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipeline.__main__ import main
from pipeline.manifest import read_manifest
from pipeline.verify import verify
from training.data.sources import SourceConfig, classes_of, open_sources


def published(folder: Path) -> dict[str, bytes]:
    files = [*sorted((folder / "shards").iterdir()), folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def samples_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (
        pyarrow.dataset.dataset(sorted((folder / "shards").glob("*.parquet"))).to_table().to_pylist()
    )
    return rows


def record_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(folder / "record").to_table().to_pylist()
    return rows


def counts_of(folder: Path) -> dict[str, int]:
    return read_manifest(str(folder))[1].counts


@pytest.fixture(scope="module")
def lists(site: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs.csv (30 pairs), other.csv (links and texts), classes.parquet (categories without captions)."""
    folder = tmp_path_factory.mktemp("sources")
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("url", "caption", "tag"), *((f"{site.url}/image/p{n}", f"pair number {n}", f"t{n}") for n in range(30))]
        )
    with open(folder / "other.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("link", "text", "tag"), *((f"{site.url}/copy/p{n}", f"other number {n}", "o") for n in range(8))]
        )
    table = {"url": [f"{site.url}/image/c{n}" for n in range(9)], "category": [f"class {n % 3}" for n in range(9)]}
    pq.write_table(pa.table(table), folder / "classes.parquet")
    return folder


def words(output: Path, *more: str) -> list[str]:
    return [
        f"output={output}",
        "ray.address=inline",
        "fetch.allow_private_addresses=true",
        "plan.rows_per_unit=7",
        "pack.samples_per_shard=10",
        *more,
    ]


def test_sources_with_other_columns_are_united_and_named(lists: Path, tmp_path: Path) -> None:
    sources = [
        f"input={lists / 'pairs.csv'}",
        f"sources.other.input={lists / 'other.csv'}",
        "sources.other.columns.url=link",
        "sources.other.columns.caption=text",
        "sources.other.priority=1",
        f"sources.classes.input={lists / 'classes.parquet'}",
        "sources.classes.label=category",
        "curate.min_caption_words=2",
    ]
    assert main(["build", *words(tmp_path / "out", *sources)]) == 0
    store, manifest = read_manifest(str(tmp_path / "out"))
    assert verify(store, manifest) == []
    assert manifest.counts == {"duplicate_bytes": 8, "kept": 30 + 9}
    samples = samples_of(tmp_path / "out")
    by_source = {name: [row for row in samples if row["source"] == name] for name in ("input", "other", "classes")}
    assert {name: len(rows) for name, rows in by_source.items()} == {"input": 22, "other": 8, "classes": 9}
    assert {row["tag"] for row in by_source["other"]} == {"o"}  # of each pair of duplicates, the preferred source's
    assert {(row["caption"], row["tag"]) for row in by_source["classes"]} == {("", None)}
    assert {row["label"] for row in by_source["input"]} == {None}
    # What is trained on such a dataset: captions from one part of it, categories from the other.
    place = str(tmp_path / "out")
    parts = [
        SourceConfig(dataset=place, select=["source!=classes"]),
        SourceConfig(dataset=place, select=["source=classes"], caption_column="", label_column="label"),
    ]
    assert classes_of(parts) == ("class 0", "class 1", "class 2")
    mixture = open_sources(parts, classes_of(parts))
    assert len(mixture) == 30 + 9
    assert all(caption.split()[1] == "number" for caption in mixture.captions())
    assert sorted(mixture.sample(row).label for row in range(30, 39)) == sorted([0, 1, 2] * 3)


def test_no_model_drops_categories_for_captions_that_they_have_not_got(
    lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sources = [
        f"input={lists / 'pairs.csv'}",
        f"sources.classes.input={lists / 'classes.parquet'}",
        "sources.classes.label=category",
        "curate.image_text_model=plugin_models:WithTexts",
        "curate.min_image_text_score=1.1",
    ]
    assert main(["build", *words(tmp_path / "out", *sources)]) == 0
    assert counts_of(tmp_path / "out") == {"caption_mismatch": 30, "kept": 9}


def test_balance_leaves_categories_without_a_caption_alone(lists: Path, tmp_path: Path) -> None:
    sources = [
        f"input={lists / 'pairs.csv'}",
        f"sources.classes.input={lists / 'classes.parquet'}",
        "sources.classes.label=category",
        "balance.concepts=[number 1, unicorn]",
        "balance.per_concept=1",
    ]
    assert main(["build", *words(tmp_path / "out", *sources)]) == 0
    kept = [(row["caption"], row["label"]) for row in samples_of(tmp_path / "out")]
    assert sum(caption == "" for caption, _ in kept) == 9
    assert all("number 1" in caption for caption, _ in kept if caption)


def test_a_share_of_a_source_is_chosen_by_uid_and_a_smaller_one_is_part_of_it(
    lists: Path, site: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"sources.pairs.input={lists / 'pairs.csv'}"
    requests = site.num_requests
    assert main(["build", *words(tmp_path / "half", source, "sources.pairs.weight=0.5")]) == 0
    kept = {row["uid"] for row in samples_of(tmp_path / "half")}
    assert 5 <= len(kept) <= 25
    assert site.num_requests == requests + len(kept)
    out = [row for row in record_of(tmp_path / "half") if row["reason"] == "sampled_out"]
    assert len(out) == 30 - len(kept)
    assert all(row["score"] >= row["threshold"] == 0.5 for row in out)
    assert {row["rule"] for row in out} == {"sources.pairs.weight"}
    # Another seed is another order of the same share; a smaller share needs nobody to be asked.
    assert main(["build", *words(tmp_path / "seed", source, "sources.pairs.weight=0.5", "seed=1")]) == 0
    assert {row["uid"] for row in samples_of(tmp_path / "seed")} == kept
    requests = site.num_requests
    assert main(["curate", str(tmp_path / "half"), f"output={tmp_path / 'less'}", "sources.pairs.weight=0.3"]) == 0
    assert {row["uid"] for row in samples_of(tmp_path / "less")} < kept
    assert site.num_requests == requests
    assert main(["build", *words(tmp_path / "fresh", source, "sources.pairs.weight=0.3")]) == 0
    assert published(tmp_path / "less") == published(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["sources.a.input={lists}/pairs.csv", "sources.a.weight=2"],
            "sources.a.weight=2: a dataset holds a pair once",
        ),
        (["sources.a.weight=1"], "sources.a.input: required"),
        (["sources.a.input={lists}/none.csv"], "sources.a.input={lists}/none.csv: no such file"),
        (["sources.input.input={lists}/pairs.csv"], "not a name for a source"),
        (
            ["sources.a.input={lists}/pairs.csv", "sources.a.columns.boxes=tag"],
            "sources.a.columns.boxes=tag: one column has to have them in all sources",
        ),
        (["sources.a.input={lists}/pairs.csv", "sources.a.labl=x"], "sources.a.labl"),
        (["sources.a.input={lists}/classes.parquet"], "classes.parquet: no column caption"),
        (["sources.a.input={lists}/classes.parquet", "sources.a.label=clas"], "classes.parquet: no column clas"),
        (
            ["sources.a.input={lists}/ranked.parquet", "input={lists}/pairs.csv"],
            "tag holds int64, but string in",
        ),
        ([], "input: required, and not given; add input=..., or sources.NAME.input=..."),
        (["input={lists}/pairs.csv", "against={lists}"], "no finished dataset here"),
        (["input={lists}/pairs.csv", "base={lists}"], "no finished dataset here"),
        (["input={lists}/pairs.csv", "fetch_missing=true"], "only `pairmill curate`"),
    ],
)
def test_sources_that_cannot_be_are_refused_before_work(
    lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    pq.write_table(pa.table({"url": ["http://x/"], "caption": ["x"], "tag": [1]}), lists / "ranked.parquet")
    assert main(["build", *words(tmp_path / "out", *(word.format(lists=lists) for word in more))]) == 2
    assert message.format(lists=lists) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def more(url_list: Path, site: Any, tmp_path: Path) -> list[str]:
    """Settings of a build from the list of `dataset` and a further one, against `dataset`."""
    further = tmp_path / "further.csv"
    with open(further, "w", newline="") as file:
        rows = [("image/fresh", "a fresh one"), ("copy/n7", "seven again"), ("gone/other", "gone for good")]
        csv.writer(file).writerows([("url", "caption"), *((f"{site.url}/{path}", text) for path, text in rows)])
    return [f"input=[{url_list},{further}]", "curate.min_side_px=16", "fetch.retries=0"]


def test_what_an_earlier_dataset_has_is_not_fetched_again(
    dataset: Path, site: Any, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = site.num_requests
    assert main(["build", *words(tmp_path / "new", *more, f"against={dataset}")]) == 0
    assert site.num_requests == requests + 3
    _, manifest = read_manifest(str(tmp_path / "new"))
    assert manifest.counts == {
        "duplicate_bytes": 1,  # of a sample of the earlier dataset
        "http_404": 1,
        "in_earlier_dataset": 44 - 2,
        "kept": 1,
        **dict.fromkeys(("missing_url", "unreadable_row"), 1),  # which no download would change
    }
    capsys.readouterr()
    assert main(["build", *words(tmp_path / "new", *more, f"against={dataset}", "curate.dry_run=true")]) == 0
    told = dict(re.findall(r"^  (\w+).* (\d+) +\d+$", capsys.readouterr().out, re.MULTILINE))
    assert (told["in_earlier_dataset"], told["no"]) == ("40", "1")  # no image came of one pair
    twin = next(row for row in record_of(tmp_path / "new") if row["reason"] == "duplicate_bytes")
    assert twin["duplicate_of"] in {row["uid"] for row in samples_of(dataset)}
    assert [row["caption"] for row in samples_of(tmp_path / "new")] == ["a fresh one"]


def test_a_build_that_knows_every_pair_says_that_nothing_is_kept(
    dataset: Path, site: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = tmp_path / "known.csv"
    known.write_text(f"url,caption\n{site.url}/image/n3,picture number 3\n")
    settings = words(tmp_path / "new", f"input={known}", f"against={dataset}")
    assert main(["build", *settings, "curate.dry_run=true"]) == 0
    assert main(["build", *settings]) == 1
    assert "no pair was kept, so there is no dataset to publish: in_earlier_dataset 1;" in capsys.readouterr().err


def test_a_curation_against_a_larger_dataset_tells_of_a_pair_once(
    dataset: Path, site: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan has more ranges than that of the base, so its units have other names."""
    few = tmp_path / "few.csv"
    few.write_text("url,caption\n" + "".join(f"{site.url}/image/few{n},one of few {n}\n" for n in range(9)))
    old, new = tmp_path / "old", tmp_path / "new"
    assert main(["build", *words(old, f"input={few}", "plan.rows_per_range=10")]) == 0
    assert main(["curate", str(old), f"output={new}", f"against={dataset}"]) == 0
    assert counts_of(new) == {"kept": 9}
    capsys.readouterr()
    for row in record_of(new):
        assert main(["explain", str(new), row["uid"]]) == 0
        assert capsys.readouterr().out.count("  result  ") == 1


def test_against_gives_the_same_after_a_kill(
    dataset: Path, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*more, f"against={dataset}"]
    assert main(["build", *words(tmp_path / "one", *settings)]) == 0
    command = [sys.executable, "-P", "-m", "pipeline", "build", *words(tmp_path / "two", *settings)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "two/journal/plan-against").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert main(["build", *words(tmp_path / "two", *settings)]) == 0
    assert published(tmp_path / "one") == published(tmp_path / "two")


def test_an_earlier_dataset_without_its_record_is_refused(
    dataset: Path, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dataset / "shards", tmp_path / "old/shards")
    shutil.copy(dataset / "manifest.json", tmp_path / "old/manifest.json")
    assert main(["build", *words(tmp_path / "new", *more, f"against={tmp_path / 'old'}")]) == 2
    assert "has no record/" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
