"""Verify names what is damaged and what to do. That repair does it: test_mend.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.store import Store
from pipeline.__main__ import main
from pipeline.manifest import read_manifest
from pipeline.verify import verify


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    return folder


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_whole_dataset_is_said_to_be_whole(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(dataset), "decode=null"]) == 0
    assert "whole: 27 samples in 3 shards" in capsys.readouterr().out


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "flipped bit in a tar": ("shards/00001.tar", flip_bit, "sha256 differs"),
    "flipped bit in a parquet": ("shards/00000.parquet", flip_bit, "sha256 differs"),
    "deleted shard": ("shards/00002.tar", Path.unlink, "is missing"),
    "shortened shard": ("shards/00001.tar", lambda path: path.write_bytes(path.read_bytes()[:-1024]), "should have"),
    "flipped bit in the record": ("record/00003.parquet", flip_bit, "sha256 differs"),
    "deleted record": ("record/00000.parquet", Path.unlink, "is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_nothing_is_written_without_repair(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path, damage, problem = DAMAGES[name]
    damage(copy / path)
    before = contents(copy)
    assert main(["verify", str(copy)]) == 1
    out = capsys.readouterr().out
    assert f"{copy / path}: " in out
    assert problem in out
    assert "1 damaged" in out
    assert f"`pairmill verify {copy} --repair` makes them again" in out
    assert contents(copy) == before


def test_without_work_nobody_is_told_to_remove_what_cannot_be_made_again(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "work")
    assert main(["verify", str(copy)]) == 0
    (copy / "shards/00001.tar").unlink()
    assert main(["verify", str(copy)]) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "put back copies of the damaged files, or build into a new output" in last
    assert "remove these" not in last


def test_a_shard_that_the_manifest_does_not_know_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(copy / "shards/00000.tar", copy / "shards/00003.tar")
    assert main(["verify", str(copy)]) == 1
    out = capsys.readouterr().out
    assert f"{copy}/shards/00003.tar: is not in manifest.json" in out


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> list[str]:
    plain = json.loads((folder / "manifest.json").read_bytes())
    change(plain)
    (folder / "manifest.json").write_text(json.dumps(plain))
    store, manifest = read_manifest(str(folder))
    found = [f"{damage.path}: {damage.problem}" for damage in verify(store, manifest, decode=None)]
    return [each for each in found if "vouches for other bytes" not in each]


def test_counts_that_do_not_add_up_are_named(copy: Path) -> None:
    (problem,) = edit_manifest(copy, lambda plain: plain["counts"].update(http_404=99))
    assert problem.startswith("manifest.json: the counts sum to")


def test_offsets_that_do_not_lead_to_the_images_are_named(copy: Path) -> None:
    path = copy / "shards/00000.parquet"
    table = pq.read_table(path)
    offsets = table["image_offset"].to_pylist()
    index = table.schema.get_field_index("image_offset")
    pq.write_table(table.set_column(index, "image_offset", [[offsets[1], *offsets[1:]]]), path)
    problems = _as_the_manifest_says(copy, "00000.parquet")
    assert len(problems) == 1
    assert "the parquet says otherwise" in problems[0]


def test_images_that_do_not_decode_are_named(copy: Path) -> None:
    path = copy / "shards/00000.tar"
    row = pq.read_table(copy / "shards/00000.parquet").to_pylist()[4]
    data = bytearray(path.read_bytes())
    data[row["image_offset"] : row["image_offset"] + row["image_size"]] = bytes(row["image_size"])
    path.write_bytes(data)
    (problem,) = _as_the_manifest_says(copy, "00000.tar")
    assert f"{row['key']}: the image does not decode to 64x48" in problem


def test_what_is_no_tar_is_named(copy: Path) -> None:
    (copy / "shards/00001.tar").write_bytes(b"no tar" * 1000)
    (problem,) = _as_the_manifest_says(copy, "00001.tar")
    assert problem.startswith("shards/00001.tar: not readable as tar")


def _as_the_manifest_says(folder: Path, name: str) -> list[str]:
    """What verify finds when the manifest itself has the hash of the file as it is now."""
    from cluster.journal import file_sha256

    path = folder / "shards" / name
    index, kind = int(name[:5]), "tar" if name.endswith("tar") else "parquet"

    def change(plain: dict[str, Any]) -> None:
        plain["shards"][index][kind].update(sha256=file_sha256(path), size_bytes=path.stat().st_size)

    return edit_manifest(folder, change)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no finished dataset here"), (b"{", "not a readable manifest"), (b'{"version": 1}', "not a readable")],
)
def test_what_is_no_dataset_is_a_bad_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    assert main(["verify", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_datasets_on_other_stores_are_checked_too(copy: Path) -> None:
    there = Store("memory://verify-test")
    here = Store(str(copy))
    for entry in here.find():
        there.write_bytes(entry.path, here.read_bytes(entry.path))
    there.write_bytes("shards/00001.tar", b"short")
    store, manifest = read_manifest("memory://verify-test")
    assert [damage.path for damage in verify(store, manifest)] == ["shards/00001.tar"]
