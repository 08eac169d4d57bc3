"""Datasets as lists: what pairmill and img2dataset have written comes in with its images, and nothing is downloaded."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from pipeline.__main__ import main
from pipeline.manifest import read_manifest
from pipeline.verify import verify
from tests.pipeline.conftest import jpeg

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
pytestmark = pytest.mark.filterwarnings("ignore:.*imghdr.*", "ignore:always_apply.*")
NUM_IMAGES = 12
FORMATS = ("webdataset", "parquet", "files")

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def outputs(site: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of img2dataset's own downloader, one folder a format: two shards, an image that fails in each."""
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import FilesSampleWriter, ParquetSampleWriter, WebDatasetSampleWriter

    folder = tmp_path_factory.mktemp("img2dataset")
    rows = [(f"{site.url}/image/i{number}", f"image number {number}", number) for number in range(NUM_IMAGES)]
    rows += [(f"{site.url}/gone/g{number}", f"gone {number}", number) for number in range(2)]
    writers = dict(zip(FORMATS, (WebDatasetSampleWriter, ParquetSampleWriter, FilesSampleWriter), strict=True))
    for name, writer in writers.items():
        (folder / name).mkdir()
        resizer = Resizer(image_size=32, resize_mode="keep_ratio", resize_only_if_bigger=True)
        download = Downloader(
            writer, resizer, 2, True, True, str(folder / name), ["caption", "url", "number"], 5, 10, 5,
            None if name == "files" else "sha256", None, "jpg", 0, None, None,
        )  # fmt: skip
        for shard in range(2):
            urls, captions, ranks = zip(*rows[shard::2], strict=True)
            table = pa.table({"caption": captions, "url": urls, "number": ranks})
            pyarrow.feather.write_feather(table, folder / "shard.feather", compression="uncompressed")
            assert download((shard, str(folder / "shard.feather")))[0]
    return folder


def build(output: Path, *words: str) -> int:
    settings = ["ray.address=inline", "plan.rows_per_unit=5", "pack.samples_per_shard=5", "image.size=32"]
    return main(["build", f"output={output}", *settings, *words])


def samples_of(folder: Path) -> list[dict[str, Any]]:
    tables = pyarrow.dataset.dataset(sorted((folder / "shards").glob("*.parquet"))).to_table()
    rows: list[dict[str, Any]] = tables.to_pylist()
    for row in rows:
        with open(folder / f"shards/{int(row['key'][:5]):05}.tar", "rb") as tar:
            tar.seek(row["image_offset"])
            row["data"] = tar.read(row["image_size"])
    return rows


def published(folder: Path) -> dict[str, bytes]:
    files = [*sorted((folder / "shards").iterdir()), folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def record_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(folder / "record").to_table().to_pylist()
    return rows


@pytest.mark.parametrize("name", FORMATS)
def test_an_output_of_img2dataset_comes_in_with_its_images(
    name: str, outputs: Path, site: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = site.num_requests
    assert build(tmp_path / "out", f"input={outputs / name}") == 0
    assert site.num_requests == requests
    store, manifest = read_manifest(str(tmp_path / "out"))
    assert manifest.counts == {"import_failed": 2, "kept": NUM_IMAGES}
    assert verify(store, manifest, decode=None) == []
    samples = samples_of(tmp_path / "out")
    assert sorted(sample["number"] for sample in samples) == list(range(NUM_IMAGES))
    stored = {row["url"]: row for row in img2dataset_rows(outputs / name)}
    for sample in samples:
        assert sample["data"] == stored[sample["url"]]["data"]  # as it was stored: it fits the settings
        assert (sample["width"], sample["height"]) == (43, 32)
        assert (sample["original_width"], sample["original_height"]) == (64, 48)
        assert sample["hash_of_stored"] is (name == "files")
        if name != "files":
            assert sample["sha256"] == stored[sample["url"]]["sha256"]
    failed = [row for row in record_of(tmp_path / "out") if row["reason"] == "import_failed"]
    assert "404" in failed[0]["detail"]
    assert main(["explain", str(tmp_path / "out"), samples[0]["url"]]) == 0
    assert "import      from" in capsys.readouterr().out


def img2dataset_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of an output of img2dataset that succeeded, with their images."""
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(sorted(folder.glob("*.parquet"))).to_table().to_pylist()
    rows = [row for row in rows if row["status"] == "success"]
    members: dict[str, bytes] = {path.stem: path.read_bytes() for path in folder.glob("*/*.jpg")}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member) for member in tar if member.name.endswith(".jpg")}
            members |= {name[:-4]: file.read() for name, file in files.items() if file is not None}
    return [row | {"data": row.get("jpg") or members[row["key"]]} for row in rows]


def test_images_that_do_not_fit_the_settings_are_processed_like_downloads(outputs: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "out", f"input={outputs / 'webdataset'}", "image.size=16", "image.format=png") == 0
    for sample in samples_of(tmp_path / "out"):
        pixels = cv2.imdecode(np.frombuffer(sample["data"], np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        assert pixels.shape == (16, 22, 3)
        assert (sample["image_format"], sample["original_width"]) == ("png", 64)


def test_merged_datasets_and_lists_keep_one_of_each_pair(
    dataset: Path, outputs: Path, words: Any, site: Any, tmp_path: Path, far_workers: Any
) -> None:
    """Two datasets and a URL list: what some dataset has is not downloaded, and duplicates are found across."""
    lists = tmp_path / "more.csv"
    pairs = [
        ("image/i3", "image number 3"),
        ("gone/g1", "gone 1"),
        ("image/i4", "four again"),
        ("image/new", "new one"),
    ]
    lists.write_text("url,caption\n" + "".join(f"{site.url}/{path},{caption}\n" for path, caption in pairs))
    requests = site.num_requests
    inputs = f"input=[{dataset},{outputs / 'webdataset'},{lists}]"
    more = ["fetch.allow_private_addresses=true", "fetch.retries=0", inputs]
    assert build(tmp_path / "one", *more) == 0
    assert site.num_requests == requests + 3  # not i3: the import has it; g1 is tried, as the import had failed
    store, manifest = read_manifest(str(tmp_path / "one"))
    assert manifest.counts == {
        "duplicate_bytes": 1,  # i4 under two captions
        "import_failed": 1,
        "kept": 27 + NUM_IMAGES + 1,
        "repeated_pair": 1,
        "http_404": 2,  # g1 in the list stands for the row of the import too
    }
    assert verify(store, manifest) == []
    far_workers()
    assert build(tmp_path / "two", *more) == 0
    assert published(tmp_path / "one") == published(tmp_path / "two")


def test_a_dataset_that_is_imported_keeps_its_hashes_and_bytes(dataset: Path, tmp_path: Path) -> None:
    command = ["build", f"input={dataset}", f"output={tmp_path / 'out'}", "plan.rows_per_unit=4", "ray.address=inline"]
    killed = subprocess.Popen(
        [sys.executable, "-P", "-m", "pipeline", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out/journal/fetch").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out/manifest.json").exists()
    assert main(command) == 0
    before, after = ({row["uid"]: row for row in samples_of(folder)} for folder in (dataset, tmp_path / "out"))
    assert before.keys() == after.keys()
    for uid, row in after.items():
        for name in ("data", "sha256", "caption", "url", "licence", "rank", "original_width"):
            assert row[name] == before[uid][name], name
    assert "hash_of_stored" not in read_manifest(str(tmp_path / "out"))[1].columns


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def shard(folder: Path, **columns: list[Any]) -> Path:
    """A tar of four images and img2dataset's table of them."""
    folder.mkdir()
    write_tar(folder / "00000.tar", {f"k{number}.jpg": jpeg(f"t{number}") for number in range(4)})
    table = {
        "url": [f"http://x/{number}" for number in range(4)],
        "caption": [f"caption {number}" for number in range(4)],
        "key": [f"k{number}" for number in range(4)],
        "status": ["success"] * 4,
    }
    pq.write_table(
        pa.table({name: values for name, values in (table | columns).items() if values}), folder / "00000.parquet"
    )
    return folder


def test_a_tar_that_breaks_off_and_members_without_a_row_are_counted(tmp_path: Path) -> None:
    folder = shard(tmp_path / "in", key=["k0", "k1", "k3", "gone"])
    data = (folder / "00000.tar").read_bytes()
    with tarfile.open(folder / "00000.tar") as tar:
        last = tar.getmember("k3.jpg")
    (folder / "00000.tar").write_bytes(data[: last.offset_data + last.size // 2])
    assert build(tmp_path / "out", f"input={folder}") == 0
    _, manifest = read_manifest(str(tmp_path / "out"))
    assert manifest.counts == {"import_missing": 2, "import_unlisted": 1, "kept": 2}
    details = {row["reason"]: row["detail"] for row in record_of(tmp_path / "out") if row["reason"]}
    assert details["import_unlisted"].startswith("k2 of ")


def test_a_tar_without_a_table_gives_its_captions_and_addresses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {"a.jpg": jpeg("a"), "a.txt": b"a cat", "a.json": json.dumps({"url": "http://x/a"}).encode()}
    members |= {"b.jpg": jpeg("b"), "b.txt": b"a dog", "c.jpg": jpeg("c"), "c.txt": b"a dog", "d.txt": b"no picture"}
    write_tar(tmp_path / "in.tar", members)
    assert build(tmp_path / "out", f"input={tmp_path / 'in.tar'}", "image.size=48") == 0
    rows = samples_of(tmp_path / "out")
    assert sorted((row["caption"], row["url"]) for row in rows if row["url"]) == [("a cat", "http://x/a")]
    assert [row["caption"] for row in rows if not row["url"]] == ["a dog", "a dog"]  # two pictures, not one pair
    assert {row["data"] for row in rows} == {jpeg("a"), jpeg("b"), jpeg("c")}
    assert read_manifest(str(tmp_path / "out"))[1].counts == {"import_missing": 1, "kept": 3}


def test_tars_of_several_folders_are_named_by_a_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        write_tar(tmp_path / "in" / name / "0.tar", {f"{name}.jpg": jpeg(name)})
    assert build(tmp_path / "out", f"input={tmp_path}/in/*/*.tar") == 0
    assert read_manifest(str(tmp_path / "out"))[1].counts == {"kept": 2}
    for pattern in ("in/*/1*.tar", "in/*.tar", "out/*.tar"):
        assert build(tmp_path / "none", f"input={tmp_path}/{pattern}") == 2
        assert f"input={tmp_path}/{pattern}: no such tar" in capsys.readouterr().err


def test_text_that_is_none_spoils_no_other_sample(tmp_path: Path) -> None:
    members = {name: jpeg(ascii(name)) for name in ("a.jpg", "b.jpg", "c.jpg", "bad\udcff.jpg", "bad\udcfe.jpg")}
    members |= {"a.json": b'{"url": "http://x/\\ud800", "caption": "half a pair: \\udc00"}'}
    members |= {"b.json": b"[" * 200_000, "c.txt": b"\xff\xfe", "d\udcff.txt": b"no picture"}
    write_tar(tmp_path / "in.tar", members)
    assert build(tmp_path / "out", f"input={tmp_path / 'in.tar'}") == 0
    assert read_manifest(str(tmp_path / "out"))[1].counts == {"import_missing": 1, "kept": 5}
    assert {row["caption"] for row in samples_of(tmp_path / "out")} == {"half a pair: \\udc00", "\ufffd\ufffd", ""}


def test_images_without_an_address_are_no_repeated_pair(tmp_path: Path) -> None:
    folder = shard(tmp_path / "in", url=["", " ", "", "http://x/3 "], caption=["the same"] * 4)
    hashes = ["columns.hash=md5", "fetch.verify_hash=md5"]  # which an import need not have
    assert build(tmp_path / "out", f"input={folder}", *hashes) == 0
    assert read_manifest(str(tmp_path / "out"))[1].counts == {"kept": 4}


def test_tables_with_bytes_that_are_no_text_come_in_repaired(tmp_path: Path) -> None:
    folder = shard(tmp_path / "in")
    table = pq.read_table(folder / "00000.parquet")
    broken = pa.array([b"one \xff", b"two", b"three", b"four"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(table.set_column(1, "caption", broken).append_column("note", broken), folder / "00000.parquet")
    assert build(tmp_path / "out", f"input={folder}") == 0
    assert {(row["caption"], row["note"]) for row in samples_of(tmp_path / "out")} == {
        (text, text) for text in ("one \ufffd", "two", "three", "four")
    }


def test_an_image_larger_than_downloads_may_be_is_not_read(tmp_path: Path) -> None:
    members = {"a.jpg": jpeg("a"), "b.jpg": jpeg("b"), "large.jpg": jpeg("c") + bytes(2**20)}
    write_tar(tmp_path / "in.tar", members)
    assert build(tmp_path / "out", f"input={tmp_path / 'in.tar'}", "fetch.max_bytes=1000000") == 0
    assert read_manifest(str(tmp_path / "out"))[1].counts == {"kept": 2, "too_large": 1}
    (row,) = (row for row in record_of(tmp_path / "out") if row["reason"])
    assert "fetch.max_bytes is 1,000,000" in row["detail"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"url": []}, "00000.parquet: no column url"),
        ({"key": []}, "00000.parquet: no column key"),
        ({"key": [1, 2, 3, 4]}, "00000.parquet: column key holds int64, not text"),
        ({"caption": [1.5, 2, 3, 4]}, "00000.parquet: column caption holds double, not text"),
        ({"original_width": ["1"] * 4}, "00000.parquet: column original_width holds string, not whole numbers"),
    ],
)
def test_tables_without_what_is_needed_are_refused_by_file_and_column(
    columns: dict[str, list[Any]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(tmp_path / "out", f"input={shard(tmp_path / 'in', **columns)}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_dataset_and_one_with_a_cut_shard_are_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/run.json").write_text("{}")
    assert build(tmp_path / "out", f"input={tmp_path / 'begun'}") == 2
    assert "without a finished dataset" in capsys.readouterr().err
    (tmp_path / "cut/shards").mkdir(parents=True)
    (tmp_path / "cut/manifest.json").write_bytes((dataset / "manifest.json").read_bytes())
    for path in (dataset / "shards").iterdir():
        (tmp_path / "cut/shards" / path.name).write_bytes(path.read_bytes()[:-1])
    assert build(tmp_path / "out", f"input={tmp_path / 'cut'}") == 2
    assert "pairmill verify" in capsys.readouterr().err
