"""Images of evaluation sets are found, by whatever the set is made of, and leave the dataset with what they matched."""

import io
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import validate
from cluster.errors import RequestError, RunError
from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.store import Store
from pipeline.__main__ import main
from pipeline.config import BuildConfig
from pipeline.contamination.hash_index import HashIndex
from pipeline.contamination.match import most_like
from pipeline.contamination.sets import EvaluationSets
from pipeline.curation.context import Context
from pipeline.models.measure import measure
from pipeline.rules.measured import Measured
from pipeline.selection import read_checked
from pipeline.signals import perceptual_hashes

HERE = Path(__file__).parent
HASH_TYPE = pa.uint64()


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(HERE))
    yield
    sys.modules.pop("plugin_models", None)


def draw(seed: int) -> Any:
    """A picture with structure; nothing mirrors it but its own mirror image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return cv2.resize(coarse, (96, 96), interpolation=cv2.INTER_CUBIC)


def encode(pixels: Any, suffix: str = ".png") -> bytes:
    return bytes(cv2.imencode(suffix, pixels)[1])


def flip_bits(value: int, *bits: int) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


@pytest.mark.parametrize("reach", [0, 3, 7, 15])
def test_the_index_finds_the_nearest_hash_exactly(reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.contamination.hash_index.MAX_COMPARED", 50)
    random = np.random.default_rng(0)
    references = random.integers(0, 2**64, 200, np.uint64)
    references[50] = references[10]
    changes = [random.choice(64, random.integers(0, reach + 4), replace=False) for _ in range(100)]
    planted = [flip_bits(int(references[n]), *map(int, bits)) for n, bits in enumerate(changes)]
    queries = np.array([*planted, *random.integers(0, 2**64, 50, np.uint64)], np.uint64)
    distances, numbers = HashIndex(references, reach).nearest(queries)
    every = np.bitwise_count(queries[:, None] ^ references).astype(np.int64)
    expected = every.min(axis=1)
    assert distances.tolist() == np.where(expected <= reach, expected, -1).tolist()
    assert numbers.tolist() == np.where(expected <= reach, every.argmin(axis=1), -1).tolist()
    assert (distances >= 0).any()
    assert (distances < 0).any()


def test_an_index_of_nothing_and_of_equal_hashes() -> None:
    assert HashIndex(np.empty(0, np.uint64), 3).nearest(np.zeros(2, np.uint64))[0].tolist() == [-1, -1]
    same = HashIndex(np.zeros(5_000, np.uint64), 3).nearest(np.array([1, 2**64 - 1], np.uint64))
    assert [values.tolist() for values in same] == [[1, -1], [0, -1]]


def test_the_most_alike_embedding_is_found_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.contamination.match.REFERENCES_AT_ONCE", 2)
    monkeypatch.setattr("pipeline.contamination.match.QUERIES_AT_ONCE", 3)
    references = np.eye(4, 3, dtype=np.float16)
    references[3] = np.nan
    queries = np.array([[0, 0, 1], [0.6, 0.8, 0], [np.nan] * 3, [-0.6, -0.64, -0.48]], np.float32)
    cosines, numbers = most_like(queries, references)
    assert numbers.tolist() == [2, 1, -1, 2]
    assert cosines[[0, 1, 3]] == pytest.approx([1, 0.8, -0.48])
    assert np.isnan(cosines[2])
    assert [len(values) for values in most_like(queries[:0], references)] == [0, 0]


Sets = Callable[..., Any]


def folder_of_images(path: Path) -> Path:
    path.mkdir()
    for seed in range(3):
        (path / f"{seed}.png").write_bytes(encode(draw(seed)))
    (path / "notes.txt").write_text("not an image")
    (path / "broken.jpg").write_bytes(b"nor is this")
    return path


def folder_of_text(path: Path) -> Path:
    path.mkdir()
    (path / "notes.txt").write_text("not an image")
    return path


def tar_of_images(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for seed in range(3):
            data = encode(draw(seed))
            for name, content in ((f"{seed}.png", data), (f"{seed}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def table_of_hashes(path: Path, kind: pa.DataType = HASH_TYPE, rows: int = 3) -> Path:
    hashes = [perceptual_hashes(draw(seed))[0] for seed in range(rows)]
    values = pa.array(hashes if kind == HASH_TYPE else [f"{value:016x}" for value in hashes], kind)
    names = [f"{seed}.png" for seed in range(rows)]
    pq.write_table(pa.table({"name": pa.array(names, pa.string()), "phash": values}), path)
    return path


def compare(store: Store, fetched: Sequence[Marker], **curate: Any) -> tuple[Measured, ...]:
    plain = {"input": ["x"], "output": store.url, "curate": curate, "image": {"size": 96}}
    if "evaluation_similarity" in curate:
        plain["dedup"] = {"semantic_model": "plugin_models:MeanColour"}

    def run(stage: Any) -> dict[str, Marker]:
        return run_stage(stage, Journal(store), InlineExecutor(), Progress())

    context = Context(config=validate(BuildConfig, plain), store=store, run_stage=run)
    return measure(context, {marker.unit: marker for marker in fetched})


def fetched_unit(store: Store, pictures: Sequence[Any], with_hashes: bool = True) -> Marker:
    """A fetch unit of these pictures, and a row that was dropped."""
    journal = Journal(store)
    with journal.attempt("fetch", "00000-00000") as output:
        rows, at = [{"uid": "f" * 32, "status": "dropped", "num_rows": 1, "caption": "none"}], 0
        with open(output.path("images.tar"), "wb") as images:
            for number, pixels in enumerate(pictures):
                data = encode(pixels)
                images.write(data)
                hashes = perceptual_hashes(pixels) if with_hashes else (None, None)
                place = {"image_offset": at, "image_size": len(data), "width": 96, "height": 96}
                row = {"uid": f"{number:032x}", "status": "ok", "num_rows": 1, "caption": f"picture {number}"}
                rows.append({**row, **place, "phash": hashes[0], "phash_mirror": hashes[1]})
                at += len(data)
        names = dict.fromkeys(name for row in reversed(rows) for name in row)
        kinds = {"uid": pa.string(), "status": pa.string(), "caption": pa.string()}
        hash_kinds = {"phash": pa.uint64(), "phash_mirror": pa.uint64()}
        schema = pa.schema([(name, (kinds | hash_kinds).get(name, pa.int64())) for name in names])
        pq.write_table(pa.Table.from_pylist(rows, schema), output.path("rows.parquet"))
        return journal.commit("fetch", "00000-00000", output)


def scores_of(store: Store, measured: Measured) -> list[tuple[Any, ...]]:
    rows = read_checked(store, measured.files[0]).to_pylist()
    return [(row["row"], None if np.isnan(row["score"]) else round(row["score"], 3), row["detail"]) for row in rows]


@pytest.mark.parametrize("make", [folder_of_images, tar_of_images, table_of_hashes])
def test_images_are_matched_as_they_are_and_mirrored(make: Any, store: Store, tmp_path: Path) -> None:
    held_out = make(
        tmp_path / f"val{'.tar' if make is tar_of_images else '.parquet' if make is table_of_hashes else ''}"
    )
    fetched = fetched_unit(store, [draw(1), np.ascontiguousarray(draw(2)[:, ::-1]), draw(9)])
    (measured,) = compare(store, [fetched], evaluation_sets=[{"name": "val", "path": str(held_out)}])
    assert scores_of(store, measured) == [(1, 0.0, "val: 1.png"), (2, 0.0, "val: 2.png, mirrored"), (3, None, None)]


def test_images_without_hashes_are_hashed_from_their_pixels(store: Store, tmp_path: Path) -> None:
    held_out = folder_of_images(tmp_path / "val")
    fetched = fetched_unit(store, [draw(1), draw(9)], with_hashes=False)
    (measured,) = compare(store, [fetched], evaluation_sets=[str(held_out)])
    assert scores_of(store, measured) == [(1, 0.0, "val: 1.png"), (2, None, None)]


def test_another_threshold_reads_no_set_again(store: Store, tmp_path: Path) -> None:
    held_out = folder_of_images(tmp_path / "val")
    fetched = fetched_unit(store, [draw(1)])
    first, second = (
        compare(store, [fetched], evaluation_sets=[str(held_out)], evaluation_distance=bits) for bits in (0, 7)
    )
    assert first == second
    (farther,) = compare(store, [fetched], evaluation_sets=[str(held_out)], evaluation_distance=15)
    assert farther.files != first[0].files  # what is stored was not looked for so far away
    (held_out / "3.png").write_bytes(encode(draw(3)))
    assert compare(store, [fetched], evaluation_sets=[str(held_out)]) != first


def test_embeddings_find_what_hashes_do_not(store: Store, tmp_path: Path) -> None:
    held_out = folder_of_images(tmp_path / "val")
    turned = np.ascontiguousarray(np.rot90(draw(1)))
    fetched = fetched_unit(store, [turned])
    distance, similarity = compare(store, [fetched], evaluation_sets=[str(held_out)], evaluation_similarity=0.9)
    assert scores_of(store, distance) == [(1, None, None)]
    assert scores_of(store, similarity) == [(1, 1.0, "val: 1.png")]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path, "no such file or folder, or it is empty"),
        (lambda path: path.mkdir() or path, "no such file or folder, or it is empty"),
        (lambda path: folder_of_text(path), "holds neither images, nor tars"),
        (lambda path: table_of_hashes(path.with_suffix(".parquet"), rows=0), "is empty"),
        (
            lambda path: table_of_hashes(path.with_suffix(".parquet"), pa.string()),
            "phash is string; it has to be uint64",
        ),
        (
            lambda path: pq.write_table(pa.table({"a": [1]}), f"{path}.parquet") or f"{path}.parquet",
            "has no column phash",
        ),
        (lambda path: {"name": "x", "paths": "y"}, "unknown paths"),
        (lambda path: {"name": "x"}, "names no path"),
    ],
)
def test_a_set_of_no_use_is_refused_before_any_work(make: Any, said: str, tmp_path: Path) -> None:
    made = make(tmp_path / "set")
    with pytest.raises(RequestError) as refused:
        EvaluationSets.of([made if isinstance(made, dict) else str(made)], by_hash=True, by_embedding=False)
    assert str(refused.value).startswith("curate.evaluation_sets: ")
    assert said in str(refused.value)


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        folder_of_images(tmp_path / name / "val")
    with pytest.raises(RequestError, match="two sets are called val; give names"):
        EvaluationSets.of([f"{tmp_path}/{name}/val" for name in "ab"], by_hash=True, by_embedding=False)


def test_a_set_of_which_nothing_can_be_read_ends_the_run(store: Store, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(RunError, match="none of the images of val can be read"):
        compare(store, [fetched_unit(store, [draw(1)])], evaluation_sets=[str(tmp_path / "val")])


def test_a_set_without_what_it_is_compared_by_ends_the_run(store: Store, tmp_path: Path) -> None:
    nothing = pa.table({"phash": pa.nulls(2, pa.uint64()), "embedding": pa.nulls(2, pa.list_(pa.float32()))})
    pq.write_table(nothing, tmp_path / "val.parquet")
    fetched, asked = [fetched_unit(store, [draw(1)])], {"evaluation_sets": [str(tmp_path / "val.parquet")]}
    with pytest.raises(RunError, match=r"val.parquet: no image has a hash"):
        compare(store, fetched, **asked)
    with pytest.raises(RunError, match=r"val.parquet: no image has an embedding"):
        compare(store, fetched, **asked, evaluation_distance=None, evaluation_similarity=0.9)


def test_a_dataset_of_which_some_hashes_are_missing_is_read(dataset: Path, store: Store, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "old")
    row, image = first_image(dataset)
    for path in sorted((tmp_path / "old/shards").glob("*.parquet")):
        table = pq.read_table(path)
        hashes = [
            None if uid == row["uid"] else value
            for uid, value in zip(*(table[n].to_pylist() for n in ("uid", "phash")), strict=True)
        ]
        place = table.schema.get_field_index("phash")
        pq.write_table(table.set_column(place, "phash", pa.array(hashes, pa.uint64())), path)
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
    (measured,) = compare(store, [fetched_unit(store, [pixels])], evaluation_sets=[str(tmp_path / "old")])
    ((_, bits, detail),) = scores_of(store, measured)
    assert (bits <= 3, detail) == (True, f"old: {row['key']}.jpg")


def first_image(dataset: Path) -> tuple[dict[str, Any], bytes]:
    """The first sample of a dataset, and its stored image."""
    row = pq.read_table(dataset / "shards" / "00000.parquet").to_pylist()[0]
    return row, (dataset / "shards" / "00000.tar").read_bytes()[row["image_offset"] :][: row["image_size"]]


@pytest.mark.parametrize("more", [{}, {"evaluation_similarity": 0.5}])
def test_a_dataset_is_a_set_by_the_hashes_that_it_has(dataset: Path, store: Store, more: dict[str, Any]) -> None:
    row, image = first_image(dataset)
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
    measured = compare(
        store, [fetched_unit(store, [pixels])], evaluation_sets=[{"name": "old", "path": str(dataset)}], **more
    )
    ((_, bits, detail),) = scores_of(store, measured[0])
    assert detail == f"old: {row['key']}.jpg"
    assert bits == (perceptual_hashes(pixels)[0] ^ row["phash"]).bit_count()
    if more:
        assert scores_of(store, measured[1]) == [(1, 1.0, f"old: {row['key']}.jpg")]


def test_a_build_leaves_out_what_an_evaluation_set_holds(dataset: Path, words: Any, tmp_path: Path) -> None:
    row, image = first_image(dataset)
    (tmp_path / "held-out").mkdir()
    (tmp_path / "held-out" / "it.jpg").write_bytes(image)
    settings = [f"curate.evaluation_sets={tmp_path / 'held-out'}", "curate.evaluation_distance=4"]
    out = tmp_path / "out"
    assert main(["build", *words(out, *settings)]) == 0
    records = [row for path in sorted((out / "record").glob("*")) for row in pq.read_table(path).to_pylist()]
    dropped = [row for row in records if row["reason"] == "evaluation_set"]
    # The list has the same bytes under several URLs, and it depends on the server's port which pair comes first.
    assert {pair["uid"] for pair in dropped} == {pair["uid"] for pair in records if pair["sha256"] == row["sha256"]}
    assert row["uid"] in {pair["uid"] for pair in dropped}
    for pair in dropped:
        assert (pair["rule"], pair["detail"]) == ("curate.evaluation_distance", "held-out: it.jpg")
        assert pair["score"] <= pair["threshold"] == 4
