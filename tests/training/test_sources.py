"""Categories and several datasets: labels are right, shares are kept, and a batch is a function of seed and step."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.config import parse
from cluster.errors import RequestError
from training.config import TrainConfig, plan_training
from training.data.labels import NO_LABEL, class_names, label_ids
from training.data.loader import HostBatch, ImageReader, Loader
from training.data.sources import Mixture, SourceConfig, classes_of, open_sources, shares
from training.evaluate.model import load_model

DatasetMaker = Callable[..., Path]


def source(folder: Path, **keys: Any) -> SourceConfig:
    return SourceConfig.model_validate({"dataset": str(folder)} | keys)


@pytest.fixture
def two(make_dataset: DatasetMaker) -> list[SourceConfig]:
    """60 samples with captions, and 24 others with a category."""
    return [
        source(make_dataset("pairs", num_samples=60), weight=2),
        source(make_dataset("classes", num_samples=24), caption_column="", label_column="concept", weight=1),
    ]


def read(sources: list[SourceConfig], num_steps: int, **more: Any) -> list[HostBatch]:
    reader = ImageReader(open_sources(sources, classes_of(sources)), 32, cache_bytes=0)
    settings = {"seed": 3, "start_step": 0, "batch_size": 12} | more
    with Loader(reader, num_steps=num_steps, **settings) as loader:
        return list(loader)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["dog", "cat", None, "", "cat"], ("cat", "dog")),
        ([10, 9, -1, None], ("-1", "9", "10")),
        (["10", "9", "ten"], ("9", "10", "ten")),
        ([True, False], ("False", "True")),
    ],
)
def test_classes_are_the_distinct_values_in_order(values: list[Any], expected: tuple[str, ...]) -> None:
    assert class_names(values) == expected
    ids = label_ids(pa.array(values), expected).tolist()
    assert ids == [NO_LABEL if value in (None, "") else expected.index(str(value)) for value in values]


def test_labels_name_the_class_of_each_sample(make_dataset: DatasetMaker) -> None:
    folder = make_dataset("data")
    classes = classes_of([source(folder, label_column="concept")])
    assert len(classes) == 16
    dataset = open_sources([source(folder, label_column="concept", select=["style!=held-out"])], classes)
    for row in (0, 7, 63):
        sample = dataset.sample(row)
        assert classes[sample.label] == sample.caption.removeprefix("a ")
    numbers = classes_of([source(folder, label_column="number", select=["number<11"])])
    assert numbers == tuple(str(number) for number in range(11))


@pytest.mark.parametrize(
    ("weights", "size", "expected"),
    [((2, 1), 12, [8, 4]), ((1, 1, 1), 8, [3, 3, 2]), ((427, 15), 64, [62, 2]), ((0.1, 0.2, 0.7), 10, [1, 2, 7])],
)
def test_shares_of_a_batch_are_the_weights_rounded_to_its_size(
    weights: tuple[float, ...], size: int, expected: list[int]
) -> None:
    assert shares(weights, size) == expected


def test_a_batch_mixes_captions_from_one_source_and_categories_from_another(two: list[SourceConfig]) -> None:
    for batch in read(two, 5):
        labelled = batch.labels >= 0
        assert labelled.tolist() == [False] * 8 + [True] * 4
        assert [bool(caption) for caption in batch.captions] == [True] * 8 + [False] * 4
        assert batch.images.shape == (12, 32, 32, 3)


def test_every_source_is_read_in_epochs_of_its_own(two: list[SourceConfig]) -> None:
    batches = read(two, 15)  # 120 of 60, twice, and 60 of 24, two and a half times
    uids = [Counter(uid for batch in batches for uid in batch.uids[part]) for part in (slice(8), slice(8, 12))]
    assert set(uids[0].values()) == {2}
    assert len(uids[0]) == 60
    assert sorted(set(uids[1].values())) == [2, 3]
    assert len(uids[1]) == 24
    assert [batches[step].epoch.tolist() for step in (0, 14)] == [[0] * 12, [1] * 8 + [2] * 4]


def test_resumed_and_split_reading_sees_the_same_batches(two: list[SourceConfig]) -> None:
    expected = read(two, 7)
    resumed = read(two, 7, start_step=4)
    assert [batch.uids for batch in resumed] == [batch.uids for batch in expected[4:]]
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(resumed, expected[4:], strict=True))
    parts = [read(two, 2, rank=rank, num_ranks=3) for rank in range(3)]
    for step in range(2):
        assert [uid for part in parts for uid in part[step].uids] == expected[step].uids


def test_a_bad_image_is_replaced_from_its_own_source(two: list[SourceConfig]) -> None:
    mixture = open_sources(two)
    assert isinstance(mixture, Mixture)
    assert len(mixture) == 84
    assert [mixture.next_row(row) for row in (0, 59, 60, 83)] == [1, 0, 61, 60]
    assert mixture.dataset_of(mixture.sample(60)) is mixture.datasets[1]
    assert mixture.sample(60).uid == mixture.datasets[1].sample(0).uid
    with pytest.raises(IndexError, match="row 84 of 84"):
        mixture.sample(84)
    assert mixture.captions() == mixture.datasets[0].captions()


def test_the_same_examples_are_shown_to_every_rank(two: list[SourceConfig]) -> None:
    def examples(**more: Any) -> HostBatch:
        reader = ImageReader(open_sources(two, classes_of(two)), 32, cache_bytes=0)
        with Loader(reader, seed=3, batch_size=12, start_step=0, num_steps=1, **more) as loader:
            return loader.examples(6)

    shown = examples()
    assert (shown.labels >= 0).tolist() == [False] * 4 + [True] * 2
    assert examples(rank=1, num_ranks=2).uids == shown.uids


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.label_column=concpt"], "label_column=concpt: the dataset has no column concpt; did you mean concept"),
        (["data.label_column=concept", "data.select=number<1"], "train.batch_size"),
        (["data.label_column=style", "data.select=style=plain"], "only the class plain"),
        (["method=m3i", "m3i.category=true"], r"m3i.category=true: .*data.label_column"),
        (["data.caption_column="], "data.caption_column: method=clip needs captions"),
        (
            ["data.weight=1", "data.extra=[{dataset: DATA, caption_column: '', weight: 1}]"],
            r"data.extra\[0\].caption_column: method=clip needs captions",
        ),
        (["data.caption_column=", "method=m3i"], "or set m3i.text=false"),
        (["data.extra=[{dataset: /nowhere}]"], "/nowhere: no finished dataset here"),
        (["data.extra=[{dataset: DATA, wieght: 1}]"], r"data.extra.0.wieght"),
        (["data.extra=[{dataset: DATA, weight: 1}]"], "data.weight: give one to"),
        (["data.weight=1000", "data.extra=[{dataset: DATA, weight: 1}]"], r"data.extra\[0\].dataset: weight 1 of 1001"),
        (["data.extra=[{dataset: DATA, select: [style=no]}]"], r"data.extra\[0\].dataset: no sample"),
    ],
)  # fmt: skip
def test_a_wrong_source_is_refused(dataset: Path, words: list[str], message: str) -> None:
    given = [word.replace("DATA", str(dataset)) for word in words]
    with pytest.raises(RequestError, match=message):
        plan_training(parse(TrainConfig, [f"data.dataset={dataset}", "output=x", "train.batch_size=16", *given]))


def test_label_column_of_fractions_is_refused(tmp_path: Path, make_dataset: DatasetMaker) -> None:
    folder = make_dataset("data", num_samples=20)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["columns"]["number"] = "double"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RequestError, match=r"data\.label_column=number: column number holds double"):
        open_sources([source(folder, label_column="number")])


def test_m3i_trains_on_categories_and_captions_of_two_sources(
    dataset: Path, train_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    extra = f"data.extra=[{{dataset: {dataset}, caption_column: '', label_column: concept, weight: 1}}]"
    words = ["method=m3i", "data.weight=1", extra, "m3i.predictor.width=32", "m3i.predictor.heads=2", "optim.lr=3e-3"]
    train_tiny(tmp_path / "run", *words, "train.num_steps=24", "checkpoint.every_steps=24")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics/rank0.jsonl").read_text().splitlines()]
    terms = ["intra", "inter", "category", "text"]
    first, last = (
        {term: np.mean([line[f"loss/{term}"] for line in part]) for term in terms} for part in (lines[:5], lines[-5:])
    )
    assert all(last[term] < first[term] for term in terms)
    model = load_model(str(tmp_path / "run"))
    assert model.method.category.out_features == 16  # type: ignore[union-attr]
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step-*/classes.json")
    assert json.loads(checkpoint.read_text()) == list(classes_of([source(dataset, label_column="concept")]))
