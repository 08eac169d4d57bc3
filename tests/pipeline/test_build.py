"""The whole build: what it keeps, what it refuses, and that nothing but the input decides its bytes."""

import csv
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest
import webdataset

from cluster.config import parse
from pipeline.__main__ import main
from pipeline.config import BuildConfig
from pipeline.manifest import read_manifest


def published(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset whose bytes are promised."""
    files = [*sorted((folder / "shards").iterdir()), folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_every_input_row_is_accounted_for(dataset: Path, counts: dict[str, int]) -> None:
    _, manifest = read_manifest(str(dataset))
    assert manifest.counts == counts
    assert manifest.num_input_rows == sum(counts.values())
    assert [shard.num_samples for shard in manifest.shards] == [10, 10, 7]
    record = pyarrow.dataset.dataset(dataset / "record").to_table()
    assert sum(record["num_rows"].to_pylist()) == manifest.num_input_rows
    assert len(set(record["uid"].to_pylist())) == record.num_rows


def test_extra_columns_travel_to_the_samples(dataset: Path) -> None:
    _, manifest = read_manifest(str(dataset))
    assert manifest.columns["licence"] == "string"
    assert manifest.columns["rank"] == "string"
    table = pyarrow.dataset.dataset(sorted((dataset / "shards").glob("*.parquet"))).to_table()
    by_url = {row["url"]: row for row in table.to_pylist()}
    for row in by_url.values():
        if "/image/n" in row["url"] and row["caption"].startswith("picture"):
            assert str(row["rank"]) == row["url"].rpartition("n")[2] or row["rank"] == "24"
            assert row["licence"] == "CC0"


def test_people_read_the_dataset_with_their_own_tools(dataset: Path) -> None:
    samples = list(webdataset.WebDataset(f"{dataset}/shards/{{00000..00002}}.tar", shardshuffle=False).decode("rgb8"))
    assert len(samples) == 27
    assert {sample["jpg"].shape for sample in samples} == {(48, 64, 3)}
    names = []
    for path in sorted((dataset / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert len(names) == 3 * 27
    table = pyarrow.dataset.dataset(sorted((dataset / "shards").glob("*.parquet"))).to_table()
    assert table["caption"].to_pylist() == [sample["txt"] for sample in samples]
    assert table["uid"].to_pylist() == [sample["json"]["uid"] for sample in samples]


def test_rows_spread_over_other_files_give_the_same_shards(
    dataset: Path, url_list: Path, words: Any, tmp_path: Path
) -> None:
    lines = url_list.read_text().splitlines(keepends=True)
    (tmp_path / "lists").mkdir()
    for index, part in enumerate((lines[30:], lines[1:30])):
        (tmp_path / "lists" / f"{index}.csv").write_text("".join([lines[0], *part]))
    assert main(["build", *words(tmp_path / "out", f"input={tmp_path / 'lists'}")]) == 0
    mine, theirs = published(tmp_path / "out"), published(dataset)
    assert {name: data for name, data in mine.items() if name.endswith(".tar")}.keys() <= theirs.keys()
    # n20 and "too small" stand twice in the lists: which row's rank travels follows from the order of the files
    uids = [row["uid"] for row in _samples(tmp_path / "out")]
    assert uids == [row["uid"] for row in _samples(dataset)]


def _samples(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (
        pyarrow.dataset.dataset(sorted((folder / "shards").glob("*.parquet"))).to_table().to_pylist()
    )
    return rows


def test_a_finished_build_is_left_alone(
    dataset: Path, site: Any, words: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before, requests = published(dataset), site.num_requests
    assert main(["build", *words(dataset)]) == 0
    out = capsys.readouterr().out
    assert "already done" in out
    assert str(dataset / "report/index.html") in out
    assert published(dataset) == before
    assert site.num_requests == requests


def test_a_finished_build_does_not_need_its_lists_but_refuses_changed_ones(
    url_list: Path, words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = tmp_path / "list.csv"
    shutil.copy(url_list, lists)
    settings = words(tmp_path / "out", f"input={lists}")
    assert main(["build", *settings]) == 0
    lists.write_text(lists.read_text() + "http://127.0.0.1:1/new,new,CC0,1\n")
    assert main(["build", *settings]) == 2
    assert "not those that this run began with" in capsys.readouterr().err
    lists.unlink()
    assert main(["build", *settings]) == 0
    assert "already done" in capsys.readouterr().out


def test_a_finished_build_does_not_need_its_work(
    dataset: Path, words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(dataset, folder)
    shutil.rmtree(folder / "work")
    shutil.rmtree(folder / "report")
    assert main(["build", *words(folder)]) == 0
    assert "already done" in capsys.readouterr().out
    assert published(folder) == published(dataset)


def test_a_stopped_build_goes_on_without_fetching_again(dataset: Path, site: Any, words: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(dataset, folder)
    for path in ("manifest.json", "journal/pack/00001.json", "journal/record", "shards/00001.tar"):
        (shutil.rmtree if (folder / path).is_dir() else Path.unlink)(folder / path)
    requests = site.num_requests
    assert main(["build", *words(folder)]) == 0
    assert published(folder) == published(dataset)
    assert site.num_requests == requests


def test_work_keeps_only_what_markers_name(dataset: Path) -> None:
    markers = [json.loads(path.read_bytes()) for path in (dataset / "journal").glob("*/*.json")]
    named = {output["path"] for marker in markers for output in marker["outputs"]}
    there = {str(path.relative_to(dataset)) for path in (dataset / "work").rglob("*") if path.is_file()}
    assert there == {path for path in named if path.startswith("work/")}


def test_the_manifest_holds_no_output_path_and_all_result_settings(dataset: Path, words: Any) -> None:
    text = (dataset / "manifest.json").read_text()
    assert str(dataset) not in text
    config = json.loads(text)["config"]
    assert config["pack.samples_per_shard"] == 10
    assert "fetch.connections" not in config
    assert parse(BuildConfig, words(dataset)).pack.samples_per_shard == 10


def test_nothing_kept_fails_with_the_reasons(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", *words(tmp_path / "out", "curate.min_side_px=1000")]) == 1
    message = capsys.readouterr().err
    assert "no pair was kept" in message
    assert "image_too_small 36" in message
    assert not (tmp_path / "out/manifest.json").exists()


def test_other_settings_in_the_same_output_are_refused(
    dataset: Path, words: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = published(dataset)
    assert main(["build", *words(dataset, "curate.min_side_px=17")]) == 2
    assert "curate.min_side_px: the run has 16, this request has 17" in capsys.readouterr().err
    assert published(dataset) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["pack.samples_per_shrad=3"], "did you mean pack.samples_per_shard"),
        (["pack.samples_per_shard=many"], "pack.samples_per_shard=many"),
        (["input=nowhere.parquet"], "nowhere.parquet"),
        (["columns.url=link"], "no column link"),
    ],
)
def test_bad_requests_leave_no_trace(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["build", *words(tmp_path / "out", *more)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pairmill build: ")
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_an_empty_list_is_refused(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(tmp_path / "empty.csv", "w", newline="") as file:
        csv.writer(file).writerow(["url", "caption"])
    assert main(["build", *words(tmp_path / "out", f"input={tmp_path / 'empty.csv'}")]) == 2
    assert "no rows" in capsys.readouterr().err


def test_an_object_store_gets_the_same_bytes_as_a_folder(dataset: Path, words: Any) -> None:
    assert main(["build", *words(Path("x"), "output=memory://build-test")]) == 0
    store, _ = read_manifest("memory://build-test")
    assert {name: store.read_bytes(name) for name in published(dataset)} == published(dataset)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "flipped bit in the images": ("fetch/00000-00001.*/images.tar", flip_bit, "is damaged"),
    "flipped bit in the rows": ("fetch/00000-00002.*/rows.parquet", flip_bit, "is damaged"),
    "images are gone": ("fetch/00000-00003.*/images.tar", Path.unlink, "is missing"),
    "flipped bit in the decisions": ("decide/00000-00004.*/kept.npy", flip_bit, "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_work_is_never_packed_and_the_advice_repairs_it(
    dataset: Path, words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pattern, damage, problem = DAMAGES[name]
    folder = tmp_path / "out"
    shutil.copytree(dataset, folder)
    (folder / "manifest.json").unlink()
    for stage in ("pack", "record"):
        shutil.rmtree(folder / "journal" / stage)
    (path,) = (folder / "work").glob(pattern)
    damage(path)
    assert main(["build", *words(folder)]) == 1
    message = capsys.readouterr().err
    assert f"{path} {problem}" in message
    for remove in message.strip().splitlines()[-1].split():
        shutil.rmtree(remove) if Path(remove).is_dir() else Path(remove).unlink(missing_ok=True)
    assert main(["build", *words(folder)]) == 0
    assert published(folder) == published(dataset)


def test_the_same_list_elsewhere_gives_the_same_manifest(
    dataset: Path, url_list: Path, words: Any, tmp_path: Path
) -> None:
    shutil.copy(url_list, tmp_path / url_list.name)
    assert main(["build", *words(tmp_path / "out", f"input={tmp_path / url_list.name}")]) == 0
    assert published(tmp_path / "out") == published(dataset)


def test_the_manifest_has_the_columns_in_their_order(dataset: Path) -> None:
    columns = list(json.loads((dataset / "manifest.json").read_bytes())["columns"])
    assert columns == pyarrow.dataset.dataset(dataset / "shards/00000.parquet").schema.names


@pytest.mark.parametrize("command", ["build", "verify", "explain", "report"])
def test_help_prints_every_key(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: pairmill {command}")
    assert ("pack.samples_per_shard=10000" if command == "build" else "dataset=(required)") in out
