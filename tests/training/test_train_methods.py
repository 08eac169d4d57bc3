"""The generative methods and SLIP through `pairmill train` and `pairmill eval`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import parse
from cluster.errors import RequestError
from training.config import EvalConfig
from training.evaluate.command import run_eval

Train = Callable[..., Any]
DECODER = "decoder={width: 32, depth: 1, heads: 2}"


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics/rank0.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "words", "losses"),
    [
        ("mae", [f"mae.{DECODER}"], {"reconstruction"}),
        ("m3ae", [f"m3ae.{DECODER}"], {"image", "text"}),
        ("m3ae", [f"m3ae.{DECODER}", "m3ae.encoder=separate"], {"image", "text"}),
        ("mae_clip", [f"mae_clip.{DECODER}"], {"contrastive", "image", "text"}),
        ("slip", ["slip.ssl_hidden=64", "slip.ssl_dim=16"], {"contrastive", "ssl"}),
        ("rils", ["rils.target=prototypes", "rils.num_prototypes=16"], {"contrastive", "reconstruction"}),
        ("rils", ["rils.target=pixels"], {"contrastive", "reconstruction"}),
    ],
    ids=["mae", "m3ae", "m3ae-separate", "mae_clip", "slip", "rils-prototypes", "rils-pixels"],
)
def test_a_run_ends_with_lower_losses_than_it_began_with(
    method: str, words: list[str], losses: set[str], train_tiny: Train, tmp_path: Path
) -> None:
    train_tiny(tmp_path / "run", f"method={method}", "train.num_steps=16", "checkpoint.every_steps=16", *words)
    lines = lines_of(tmp_path / "run")
    assert {name.removeprefix("loss/") for name in lines[0] if name.startswith("loss/")} == losses
    for name in ("loss", *(f"loss/{name}" for name in losses)):
        if name == "loss/reconstruction" and "rils.target=prototypes" in words:
            continue  # its pictures change: the set C begins empty
        assert sum(line[name] for line in lines[-4:]) < sum(line[name] for line in lines[:4]), name


def test_zero_shot_of_a_method_without_texts_is_refused_before_any_work(train_tiny: Train, tmp_path: Path) -> None:
    train_tiny(tmp_path / "mae", "method=mae", f"mae.{DECODER}", "train.num_steps=2")
    with pytest.raises(RequestError, match=r"method=mae trains no text features .* init\.freeze=image"):
        run_eval(parse(EvalConfig, [f"checkpoint={tmp_path / 'mae'}", "class_column=concept"]))
    assert not (tmp_path / "mae/eval").exists()


def test_an_attention_pooling_that_nothing_would_train_is_refused_before_any_work(
    train_tiny: Train, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"model\.vision\.pooling=map: the loss of method=mae"):
        train_tiny(tmp_path / "run", "method=mae", "model.vision.pooling=map")
    assert not (tmp_path / "run").exists()


def test_a_picture_of_one_patch_leaves_nothing_to_hide(train_tiny: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"patch_size=32: method=rils hides patches, and .* 32 px is a single one"):
        train_tiny(tmp_path / "run", "method=rils", "model.vision.image_size=32", "model.vision.patch_size=32")


def test_an_unknown_pooling_is_refused_with_the_known_ones(train_tiny: Train, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"model\.vision\.pooling=gap.*'mean', 'class', 'max' or 'map'"):
        train_tiny(tmp_path / "run", "model.vision.pooling=gap")


@pytest.mark.parametrize("word", ["slip.crop_scale=[0.9,0.5]", "slip.ssl_crop_scale=[0,1]", "mae.crop_scale=[0.5,2]"])
def test_a_crop_that_no_picture_has_is_refused(train_tiny: Train, tmp_path: Path, word: str) -> None:
    with pytest.raises(RequestError, match=r"crop_scale=\[.*least and most share of the area"):
        train_tiny(tmp_path / "run", f"method={word.partition('.')[0]}", word)
