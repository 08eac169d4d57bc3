"""Batches: the right samples, the same for any number of ranks, threads and restarts, with bad images replaced."""

import datetime as dt
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.errors import RequestError, RunError
from training.data.dataset import Dataset, sample_id
from training.data.image import BadImageError, decode_square
from training.data.loader import HostBatch, ImageReader, Loader
from training.data.select import matching_rows, parse_conditions

DatasetMaker = Callable[..., Path]


def read_batches(
    folder: Path | str, *, num_steps: int = 3, batch_size: int = 12, side: int = 32, cache_bytes: int = 0, **more: Any
) -> list[HostBatch]:
    settings = {"seed": 0, "start_step": 0} | more
    reader = ImageReader(Dataset(str(folder)), side, cache_bytes)
    with Loader(reader, batch_size=batch_size, num_steps=num_steps, **settings) as loader:
        return list(loader)


def test_batch_holds_the_pictures_and_captions_of_its_samples(dataset: Path) -> None:
    (batch,) = read_batches(dataset, num_steps=1, side=40)
    samples = {sample.uid: sample for sample in map(Dataset(str(dataset)).sample, range(96))}
    for place, uid in enumerate(batch.uids):
        sample = samples[uid]
        with tarfile.open(dataset / f"shards/{sample.shard:05}.tar") as tar:
            member = tar.extractfile(f"{sample.key}.jpg")
            assert member is not None
            np.testing.assert_array_equal(batch.images[place].numpy(), decode_square(member.read(), "jpg", 40))
        assert batch.captions[place] == sample.caption
        assert int(batch.sample_ids[place]) == sample_id(uid) == int(uid, 16) >> 65
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (12, 40, 40, 3)


@pytest.mark.parametrize("options", [{"workers": 3}, {"prefetch": 5}, {"cache_bytes": 10**6}])
def test_threads_and_caches_change_nothing(dataset: Path, options: dict[str, int]) -> None:
    expected = read_batches(dataset, num_steps=12)
    for batch, same in zip(read_batches(dataset, num_steps=12, **options), expected, strict=True):
        assert batch.uids == same.uids
        assert torch.equal(batch.images, same.images)


def test_resumed_loader_goes_on_where_it_was(dataset: Path) -> None:
    expected = read_batches(dataset, num_steps=11)[9:]
    resumed = read_batches(dataset, start_step=9, num_steps=11)
    assert [batch.uids for batch in resumed] == [batch.uids for batch in expected]
    assert [batch.epoch.tolist() for batch in resumed] == [batch.epoch.tolist() for batch in expected]
    assert [batch.step for batch in resumed] == [9, 10]


def test_ranks_together_read_the_global_batch(dataset: Path) -> None:
    whole = read_batches(dataset, num_steps=2)
    parts = [read_batches(dataset, num_steps=2, rank=rank, num_ranks=3) for rank in range(3)]
    for step in range(2):
        assert [uid for part in parts for uid in part[step].uids] == whole[step].uids


def test_select_keeps_matching_rows_only(dataset: Path) -> None:
    whole = Dataset(str(dataset))
    styles = np.array(whole.column("style"))
    for conditions, expected in [
        (["style!=held-out"], styles != "held-out"),
        (["style=plain|noisy"], styles != "held-out"),
        (["style = plain", "number>=16"], (styles == "plain") & (np.arange(96) >= 16)),
        (["number<3"], np.arange(96) < 3),
    ]:
        chosen = Dataset(str(dataset), select=conditions)
        assert chosen.column("number") == np.flatnonzero(expected).tolist()
        assert [chosen.sample(row).uid for row in range(len(chosen))] == [
            whole.sample(int(row)).uid for row in np.flatnonzero(expected)
        ]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("styl=plain", "did you mean style"),
        ("style", "not a condition"),
        ("number>=many", "reference_select=number>=many: column number holds int64, not comparable with 'many'"),
        ("number=1.5", "int64"),
    ],
)
def test_wrong_select_is_refused(dataset: Path, condition: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Dataset(str(dataset), select=[condition], select_key="reference_select")


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("text=a=b", [0]),
        (r"text=c\|d", [1]),
        (r"text=a=b|c\|d", [0, 1]),
        ("text!=a=b", [1, 2, 3]),  # null passes !=
        ("text=", [3]),
        ("share>=0.5", [0, 3]),
        ("share=0.25", [1]),
        ("flag=true", [0, 3]),
        ("flag!=true", [1, 2]),
        ("two words=x", [0]),
        ("day>=2024-02-01", [1]),
    ],
)
def test_conditions_on_every_kind_of_value(condition: str, rows: list[int]) -> None:
    table = pa.table(
        {
            "text": ["a=b", "c|d", None, ""],
            "share": [0.5, 0.25, None, 1e9],
            "flag": [True, False, None, True],
            "two words": ["x", "y", None, None],
            "day": pa.array([dt.date(2024, 1, 1), dt.date(2024, 2, 1), None, None]),
        }
    )
    columns = {field.name: str(field.type) for field in table.schema}
    assert matching_rows(table, parse_conditions([condition], columns, "select")).tolist() == rows


@pytest.mark.parametrize("condition", ["nothing=1", "several=1", "several<1"])
def test_column_that_cannot_be_compared_is_refused(condition: str) -> None:
    table = pa.table({"nothing": pa.nulls(2), "several": [[1], [2]]})
    columns = {field.name: str(field.type) for field in table.schema}
    conditions = parse_conditions([condition], columns, "select")
    with pytest.raises(RequestError, match="not comparable with '1'"):
        matching_rows(table, conditions)


def test_dataset_on_another_store_reads_the_same(dataset: Path) -> None:
    from cluster.store import Store

    remote = Store("memory://loader-test")
    for path in dataset.rglob("*.*"):
        remote.write_bytes(str(path.relative_to(dataset)), path.read_bytes())
    local = read_batches(dataset)
    for batch, same in zip(read_batches("memory://loader-test"), local, strict=True):
        assert torch.equal(batch.images, same.images)


def damage(folder: Path, rows: list[int]) -> Path:
    """A copy of a dataset in which the images of some rows are zeros."""
    copy = folder.with_name("damaged")
    shutil.copytree(folder, copy)
    opened = Dataset(str(copy))
    for row in rows:
        sample = opened.sample(row)
        with open(copy / opened.manifest.shards[sample.shard].tar.path, "r+b") as tar:
            tar.seek(sample.image_offset)
            tar.write(bytes(sample.image_size))
    return copy


def test_bad_image_is_replaced_by_the_next_good_one_and_counted(make_dataset: DatasetMaker) -> None:
    good = make_dataset()
    damaged = damage(good, rows=[5, 6])
    expected = read_batches(good, num_steps=8)
    seventh = Dataset(str(good)).sample(7).uid
    fifth_and_sixth = {Dataset(str(good)).sample(row).uid for row in (5, 6)}
    reader = ImageReader(Dataset(str(damaged)), 32, cache_bytes=0)
    with Loader(reader, seed=0, batch_size=12, start_step=0, num_steps=8) as loader:
        batches = list(loader)
    for batch, same in zip(batches, expected, strict=True):
        assert batch.uids == [seventh if uid in fifth_and_sixth else uid for uid in same.uids]
    assert sum(batch.num_replaced for batch in batches) == 2
    assert list(reader.bad) == ["shards/00000.tar 000000005", "shards/00000.tar 000000006"]


def test_shard_of_nothing_but_bad_images_ends_the_run(make_dataset: DatasetMaker) -> None:
    damaged = damage(make_dataset(), rows=list(range(96)))
    with pytest.raises(RunError, match="cannot be decoded; run `pairmill verify"):
        read_batches(damaged)


def test_missing_shard_is_named(make_dataset: DatasetMaker) -> None:
    folder = make_dataset()
    (folder / "shards/00001.tar").unlink()
    with pytest.raises(RunError, match=r"shards/00001\.tar: this shard is missing"):
        read_batches(folder, num_steps=8)


def test_parquet_that_disagrees_with_the_manifest_is_refused(make_dataset: DatasetMaker) -> None:
    folder = make_dataset()
    shutil.copy(folder / "shards/00002.parquet", folder / "shards/00000.parquet")
    with pytest.raises(RunError, match="has 16 rows, the manifest says 40"):
        read_batches(folder, num_steps=8)


def test_stopping_early_ends_the_threads(dataset: Path) -> None:
    import threading

    with Loader(
        ImageReader(Dataset(str(dataset)), 32, 0), seed=0, batch_size=12, start_step=0, num_steps=1000, workers=2
    ) as loader:
        next(iter(loader))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("loader", "decode"))]


def encoded(image: np.ndarray[Any, Any], extension: str) -> bytes:
    return bytes(cv2.imencode(extension, image)[1])


def test_wide_picture_is_cut_to_its_centre() -> None:
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = (0, 0, 255)  # red, as OpenCV stores it
    np.testing.assert_array_equal(decode_square(encoded(image, ".png"), "png", 20), np.full((20, 20, 3), (255, 0, 0)))
    np.testing.assert_array_equal(decode_square(encoded(image, ".png"), "png", 10), np.full((10, 10, 3), (255, 0, 0)))


def test_transparent_grey_and_16_bit_pictures_decode() -> None:
    clear = np.zeros((8, 8, 4), np.uint8)
    assert decode_square(encoded(clear, ".png"), "png", 8).min() == 255
    grey = np.full((8, 8), 77, np.uint8)
    assert (decode_square(encoded(grey, ".png"), "png", 8) == 77).all()
    deep = np.full((8, 8, 3), 65535, np.uint16)
    assert (decode_square(encoded(deep, ".png"), "png", 8) == 255).all()


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_bytes_that_are_no_image_are_bad(image_format: str) -> None:
    for data in (b"", b"<html>", bytes(1000)):
        with pytest.raises(BadImageError):
            decode_square(data, image_format, 8)


def test_large_jpeg_is_reduced_to_the_same_picture() -> None:
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), (400, 400), interpolation=cv2.INTER_CUBIC)
    jpeg = encoded(smooth, ".jpg")
    exact = cv2.resize(cv2.cvtColor(smooth, cv2.COLOR_BGR2RGB), (50, 50), interpolation=cv2.INTER_AREA)
    # JPEG at quality 95 and the decoder's own reduction both cost a little; a wrong crop or colour order costs 30.
    assert np.abs(decode_square(jpeg, "jpg", 50).astype(int) - exact).mean() < 2
