"""`pairmill verify OUT --repair`: what is damaged is made again, byte for byte, and nothing else is touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cluster.journal import Journal
from cluster.store import Store
from pipeline.__main__ import main
from pipeline.fetch import FetchStage
from pipeline.pack import PackStage


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    return folder


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1024])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith(("shards/", "manifest.json"))}


def glob(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


# name: (file, what is done to it, what verify says, whether every byte of the folder comes back)
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str, bool]] = {
    "flipped bit in a tar": ("shards/00001.tar", flip_bit, "sha256 differs", True),
    "flipped bit in a table": ("shards/00000.parquet", flip_bit, "sha256 differs", True),
    "deleted shard": ("shards/00002.tar", Path.unlink, "is missing", True),
    "shortened shard": (
        "shards/00001.tar",
        lambda path: path.write_bytes(path.read_bytes()[:-1024]),
        "should have",
        True,
    ),
    "flipped bit in a record": ("record/00003.parquet", flip_bit, "sha256 differs", True),
    "deleted record": ("record/00000.parquet", Path.unlink, "is missing", True),
    "flipped bit in downloaded images": ("work/fetch/00000-00001.*/images.tar", flip_bit, "sha256 differs", True),
    "downloaded images deleted": ("work/fetch/00000-00002.*/images.tar", Path.unlink, "is missing", True),
    "flipped bit in downloaded rows": ("work/fetch/00000-00003.*/rows.parquet", flip_bit, "sha256 differs", False),
    "flipped bit in a marker": ("journal/decide/00000-00002.json", flip_bit, "damaged", False),
    "announcement removed": ("journal/decide.json", Path.unlink, "is missing", False),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_repaired_to_the_same_bytes(
    copy: Path, dataset: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pattern, damage, problem, is_all_back = DAMAGES[name]
    path = glob(copy, pattern)
    damage(path)
    assert main(["verify", str(copy), "--repair"]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert f"{path}: " in out
    assert problem in out
    assert "1 damaged, 0 after the repair" in out
    assert published(copy) == published(dataset)
    if is_all_back:
        assert contents(copy) == contents(dataset)


@pytest.mark.parametrize("kind", ["marker", "output"])
def test_every_stage_is_made_again(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    stages = sorted(path.name for path in (dataset / "journal").iterdir() if path.is_dir())
    assert {"plan-read", "plan-order", "fetch", "decide", "pack", "record"} < set(stages)
    for stage in stages:
        folder = tmp_path / stage
        shutil.copytree(dataset, folder)
        if kind == "marker":
            path = sorted((folder / "journal" / stage).iterdir())[0]
            path.unlink()
        else:
            journal = Journal(Store(str(folder)))
            path = folder / sorted(journal.markers(stage).items())[0][1].outputs[0].path
            flip_bit(path)
        assert main(["verify", str(folder), "--repair"]) == 0, (stage, capsys.readouterr().out)
        assert f"{path}: " in capsys.readouterr().out
        assert published(folder) == published(dataset), stage
        if kind == "output" and (stage, path.name) != ("fetch", "rows.parquet"):
            assert contents(folder) == contents(dataset), stage


def test_flip_deletion_and_a_removed_marker_together(
    copy: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(copy / "shards/00000.tar")
    (copy / "shards/00001.tar").unlink()
    (copy / "journal/fetch/00000-00002.json").unlink()
    assert main(["verify", str(copy), "repair=true"]) == 0
    out = capsys.readouterr().out
    for path, problem in (
        ("shards/00000.tar", "sha256 differs"),
        ("shards/00001.tar", "is missing"),
        ("journal/fetch/00000-00002.json", "the unit's marker is missing"),
    ):
        assert f"{copy / path}: {problem}" in out
    assert published(copy) == published(dataset)


def test_images_of_whole_shards_are_not_downloaded_again(copy: Path, dataset: Path, site: Any) -> None:
    """A fetch unit that is lost as a whole: only duplicates and what rules dropped are asked for."""
    shutil.rmtree(glob(copy, "work/fetch/00000-00001.*"))
    (copy / "journal/fetch/00000-00001.json").unlink()
    kept = pq.read_table(copy / "record/00001.parquet").filter(pc.field("status") == "kept").num_rows
    assert kept > 2
    before = site.num_requests
    assert main(["verify", str(copy), "--repair"]) == 0
    assert site.num_requests - before <= 7 - kept
    assert published(copy) == published(dataset)


def remake_fetch(copy: Path, unit: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """What removing a marker of fetch by hand and building again comes to: other files, a new marker."""
    journal = Journal(Store(str(copy)))
    old = journal.marker("fetch", unit)
    assert old is not None
    with journal.attempt("fetch", unit) as output:
        shutil.copy(copy / old.path_of("images.tar"), output.path("images.tar"))
        pq.write_table(change(pq.read_table(copy / old.path_of("rows.parquet"))), output.path("rows.parquet"))
        output.counts |= old.counts
        journal.commit("fetch", unit, output, inputs=old.inputs, replace=True)


def with_column(name: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(name)
        column = [value if old is not None else None for old in table[name].to_pylist()]
        return table.set_column(index, name, pa.array(column, table.schema.field(name).type))

    return change


def test_what_was_made_from_another_unit_is_named_and_made_again(
    copy: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remake_fetch(copy, "00000-00003", with_column("seconds", 77.0))
    assert main(["verify", str(copy)]) == 1
    out = capsys.readouterr().out
    for stage in ("decide", "record"):
        marker = copy / "journal" / stage / "00000-00003.json"
        assert f"{marker}: was made from another fetch/00000-00003/rows.parquet" in out
    assert f"{copy}/journal/pack/" in out
    assert main(["verify", str(copy), "--repair"]) == 0
    assert published(copy) == published(dataset)
    record = pq.read_table(copy / "record/00003.parquet")
    assert {*record["seconds"].drop_null().to_pylist()} == {77.0}


def test_other_images_are_never_packed_into_a_published_dataset(
    copy: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remake_fetch(copy, "00000-00003", with_column("sha256", "ab" * 32))
    before = contents(copy)
    assert main(["verify", str(copy), "--repair"]) == 1
    out = capsys.readouterr().out
    assert "not repaired: stage pack, unit" in out
    assert "would have other bytes than manifest.json says" in out
    assert published(copy) == published(dataset)
    for name in (name for name in before if name.startswith(("journal/", "record/"))):
        assert contents(copy)[name] == before[name], name


def test_images_that_the_web_has_no_more_are_told_and_nothing_is_changed(
    copy: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = FetchStage.fetch_rows

    def without_images(self: FetchStage, planned: pa.Table, tar: Any) -> list[dict[str, Any]]:
        return [{"status": "dropped", "reason": "http_404"} for _ in gone(self, planned, tar)]

    monkeypatch.setattr(FetchStage, "fetch_rows", without_images)
    unit = next(name for name, shard in shards_of(copy).items() if 1 in shard)
    flip_bit(copy / "shards/00001.tar")
    flip_bit(glob(copy, f"work/fetch/{unit}.*/images.tar"))
    flip_bit(copy / "shards/00000.tar")
    before = contents(copy)
    assert main(["verify", str(copy), "--repair"]) == 1
    out = capsys.readouterr().out
    assert f"not repaired: stage fetch, unit {unit}: " in out
    assert "pairs are not to be had as they were (http_404" in out
    after = contents(copy)
    assert {name for name in before if after[name] != before[name]} <= {"shards/00000.tar"}


def shards_of(copy: Path) -> dict[str, set[int]]:
    """Fetch unit -> shards that its samples are in."""
    return {
        f"00000-{path.stem}": {*pq.read_table(path)["shard"].drop_null().to_pylist()}
        for path in sorted((copy / "record").iterdir())
    }


def test_without_work_nothing_is_tried(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "work")
    (copy / "shards/00001.tar").unlink()
    before = contents(copy)
    assert main(["verify", str(copy), "--repair"]) == 1
    assert "work/ was removed" in capsys.readouterr().out
    assert contents(copy) == before


def test_journals_without_inputs_are_checked_and_repaired_as_far_as_they_tell(copy: Path, dataset: Path) -> None:
    for path in copy.glob("journal/**/*.json"):
        plain = json.loads(path.read_bytes())
        path.write_text(json.dumps({name: value for name, value in plain.items() if name not in LATER_KEYS}))
    assert main(["verify", str(copy)]) == 0
    (copy / "journal/decide/00000-00001.json").unlink()
    flip_bit(copy / "shards/00000.tar")
    assert main(["verify", str(copy), "--repair"]) == 0
    assert published(copy) == published(dataset)


LATER_KEYS = ("inputs", "check", "units")


def test_a_stopped_repair_goes_on(copy: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "journal/decide/00000-00001.json").unlink()
    (copy / "shards/00001.tar").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(PackStage, "run", stop)
        assert main(["verify", str(copy), "--repair"]) == 130
    assert main(["verify", str(copy), "--repair"]) == 0
    assert published(copy) == published(dataset)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_dataset_made_of_another_is_made_whole_and_the_other_not_touched(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    assert main(["curate", str(dataset), f"output={new}", "curate.min_side_px=0", "pack.samples_per_shard=7"]) == 0
    assert main(["verify", str(new)]) == 0
    whole, base = published(new), contents(dataset)
    for pattern in ("journal/decide/00000-00001.json", "journal/fetch/00000-00002.json", "journal/revisit/*3.json"):
        glob(new, pattern).unlink()
    flip_bit(new / "shards/00001.tar")
    assert main(["verify", str(new), "--repair"]) == 0, capsys.readouterr().out
    assert "4 damaged, 0 after the repair" in capsys.readouterr().out
    assert published(new) == whole
    assert contents(dataset) == base
