"""Models of ours and of other libraries as curation asks them: the features that they give anyway, or a refusal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cluster.config import parse
from cluster.errors import RequestError
from pipeline.models.apply import Applied
from pipeline.models.spec import Model
from training.command import TrainResult
from training.data.image import to_square
from training.evaluate.model import load_model
from training.models.timm_encoder import import_timm
from training.scoring import CheckpointModel, OpenClipModel, TimmModel
from training.weights.export import ExportConfig, run_export

TEXTS = ["a red disc", "a blue ring"]
# float32 sums of another batch
CLOSE = {"rtol": 0, "atol": 2e-3}
OPEN_CLIP_LIKE = (
    "model.vision.pooling=class",
    "model.vision.class_token=true",
    "model.vision.pre_norm=true",
    "model.vision.positions=learned",
    "model.text.vocabulary=full",
    "train.num_steps=1",
    "optim.warmup_steps=0",
)


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (height, 40, 3), np.uint8) for height in (32, 40, 60)]


def test_a_checkpoint_gives_the_features_of_its_evaluation(finished_run: Path, pictures: list[Any]) -> None:
    model = CheckpointModel(threads=1, run=str(finished_run))
    trained = load_model(str(finished_run))
    assert model.dimension == 32

    expected = trained.encode_images(torch.from_numpy(to_square(pictures[1], 32))[None], 1)
    found = model.embed(pictures)
    assert found.shape == (3, 32)
    assert np.allclose(found[1], expected[0], **CLOSE)
    assert np.allclose(model.embed_texts(TEXTS), trained.encode_texts(TEXTS, 2), **CLOSE)


def test_a_checkpoint_is_identified_by_its_weights(finished_run: Path) -> None:
    newest = CheckpointModel.identity(run=str(finished_run))
    assert newest == CheckpointModel.identity(run=f"{finished_run}/checkpoints/step-00000009")
    assert newest != CheckpointModel.identity(run=f"{finished_run}/checkpoints/step-00000003")
    assert CheckpointModel.has_texts(run=str(finished_run))
    with pytest.raises(RequestError, match="holds no pairmill run"):
        CheckpointModel.identity(run="/no/such/run")


def test_open_clip_compares_pictures_with_texts(
    train_tiny: Callable[..., TrainResult], tmp_path: Path, pictures: list[Any]
) -> None:
    run = tmp_path / "run"
    train_tiny(run, *OPEN_CLIP_LIKE)
    words = [f"checkpoint={run}", "format=open_clip", f"output={tmp_path / 'theirs'}"]
    run_export(parse(ExportConfig, words))
    name = f"local-dir:{tmp_path / 'theirs'}"
    model, ours = OpenClipModel(threads=1, name=name), CheckpointModel(threads=1, run=str(run))
    texts = model.embed_texts(TEXTS)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    assert np.allclose(texts, ours.embed_texts(TEXTS), rtol=0, atol=2e-2)  # ours is in bfloat16, as it was trained
    assert model.embed(pictures).shape == (3, ours.dimension)
    before = OpenClipModel.identity(name=name)
    weights = tmp_path / "theirs" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert OpenClipModel.identity(name=name) != before


def test_timm_embeds_without_its_classifier(tmp_path: Path, pictures: list[Any]) -> None:
    timm = import_timm()
    torch.manual_seed(0)
    theirs = timm.create_model("resnet10t", pretrained=False)
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    model = TimmModel(threads=1, name="resnet10t", weights=str(tmp_path / "weights.safetensors"))
    found = model.embed(pictures)
    assert found.shape == (3, model.dimension) == (3, 512)
    assert np.isfinite(found).all()
    assert np.abs(found[0] - found[1]).max() > 0


@pytest.mark.parametrize(
    ("model", "parameters", "said"),
    [
        (TimmModel, {"name": "resnet10t"}, "without weights its outputs mean nothing; give timm:resnet10t:FILE"),
        (TimmModel, {"name": "resnet10t", "weights": "/no/such.pt"}, "/no/such.pt: no such file of weights"),
        (TimmModel, {"name": "nonsense"}, "timm has no model nonsense"),
        (OpenClipModel, {"name": "nonsense", "weights": "x.pt"}, "open_clip has no model nonsense"),
        (OpenClipModel, {"name": "local-dir:/no/such"}, "no such folder, or it holds no file"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(model: Any, parameters: dict[str, str], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        model.identity(**parameters)
    assert said in str(refused.value)


def test_curation_scores_pairs_by_a_checkpoint(finished_run: Path, pictures: list[Any]) -> None:
    model = Model.of("curate.image_text_model", f"pairmill:{finished_run}", "score_pairs")
    scores = Applied(model=model, ability="score_pairs", threads=1)(pictures[:2], TEXTS)
    trained = load_model(str(finished_run))
    images = trained.encode_images(torch.from_numpy(np.stack([to_square(each, 32) for each in pictures[:2]])), 2)
    cosines = (images * trained.encode_texts(TEXTS, 2)).sum(dim=1)
    assert np.allclose(scores[:, 0], cosines, **CLOSE)
