"""Training goes on from other weights: parts are taken, frozen ones keep every bit, and what does not fit is named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.errors import RequestError
from cluster.store import Store
from training.checkpoint import WEIGHTS_FILE, newest_valid
from training.command import TrainResult
from training.initial import INITIAL_FILE, by_part, is_within
from training.metrics import read_lines

Train = Callable[..., TrainResult]
MAE_DECODER = ["mae.decoder.width=16", "mae.decoder.depth=1", "mae.decoder.heads=2"]
SHORT = ["train.num_steps=2", "optim.warmup_steps=0"]


def weights_of(run: Path) -> dict[str, Tensor]:
    """By part, of the newest checkpoint."""
    info = newest_valid(Store(str(run)))
    assert info is not None
    return by_part(torch.load(run / info.folder / WEIGHTS_FILE, weights_only=True))


def part(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    found = {key: value for key, value in weights.items() if is_within(key, name)}
    assert found
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(Store(str(run)))]


@pytest.fixture(scope="module")
def mae_run(train_tiny: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masked image modelling, the first of two stages; read only."""
    folder = tmp_path_factory.mktemp("runs") / "mae"
    train_tiny(folder, "method=mae", *MAE_DECODER, *SHORT)
    return folder


@pytest.mark.parametrize(
    "words", [["train.zero_stage=0"], ["train.zero_stage=2", "train.accumulation=2"], ["train.zero_stage=3"]]
)
def test_lit_keeps_the_image_encoder_bit_for_bit_and_trains_the_rest(
    train_tiny: Train, mae_run: Path, tmp_path: Path, words: list[str]
) -> None:
    lit = [f"init.checkpoint={mae_run}", "init.parts=image", "init.freeze=image", "optim.weight_decay=0.5", *SHORT]
    train_tiny(tmp_path / "lit", *lit, *words)
    train_tiny(tmp_path / "one-more", *lit, *words, "train.num_steps=3")
    trained, longer = weights_of(tmp_path / "lit"), weights_of(tmp_path / "one-more")
    assert same(part(trained, "image"), part(weights_of(mae_run), "image"))
    assert same(part(longer, "image"), part(trained, "image"))
    for name in ("text", "image_projection", "text_projection", "log_scale"):
        assert not same(part(longer, name), part(trained, name))


def test_frozen_parts_have_no_optimizer_state(train_tiny: Train, mae_run: Path, tmp_path: Path, one_rank: None) -> None:
    from cluster.config import parse
    from training.config import TrainConfig
    from training.data.tokenizer import Tokenizer
    from training.engine import adamw
    from training.initial import initialise
    from training.methods import build_method

    run = tmp_path / "lit"
    result = train_tiny(run, f"init.checkpoint={mae_run}", "init.parts=image", "init.freeze=[image, text]", *SHORT)
    config = parse(TrainConfig, ["data.dataset=x", "output=y"]).model_copy(update=dict(result.plan.config))
    tokenizer = Tokenizer.from_json((run / "tokenizer.json").read_text())
    method = build_method("clip", config.clip, config.model, tokenizer)
    initialise(method, Store(str(run)), config.init)
    sizes = [p.numel() for group in adamw(method, config.optim, fused=False).param_groups for p in group["params"]]
    towers: Any = method.get_submodule("towers")
    assert sum(sizes) == towers.image_projection.weight.numel() + towers.text_projection.weight.numel() + 1


def test_mim_then_clip_begins_with_the_encoder_that_mim_made_and_changes_it(
    train_tiny: Train, mae_run: Path, tmp_path: Path
) -> None:
    train_tiny(tmp_path / "clip", f"init.checkpoint={mae_run}", *SHORT)
    initial = part(by_part(load(tmp_path / "clip")), "image")
    assert same(initial, part(weights_of(mae_run), "image"))
    assert not same(part(weights_of(tmp_path / "clip"), "image"), initial)


def test_clip_then_mim_learns_from_the_frozen_teacher(train_tiny: Train, finished_run: Path, tmp_path: Path) -> None:
    words = ["method=mae", "mae.target=features", *MAE_DECODER, *SHORT]
    with pytest.raises(RequestError, match=r"part teacher has to come from another run; set .*image->teacher"):
        train_tiny(tmp_path / "mim", *words)
    train_tiny(tmp_path / "mim", *words, f"init.checkpoint={finished_run}", "init.parts=image->teacher")
    teacher = part(weights_of(tmp_path / "mim"), "teacher")
    clip = part(weights_of(finished_run), "image")
    assert same({name.replace("teacher", "image", 1): value for name, value in teacher.items()}, clip)


def test_a_resumed_run_needs_neither_the_other_run_nor_luck(train_tiny: Train, mae_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(mae_run, source)
    words = [f"init.checkpoint={source}", "init.freeze=image", "checkpoint.every_steps=2", "train.num_steps=5"]
    train_tiny(tmp_path / "whole", *words)
    train_tiny(tmp_path / "resumed", *words)
    for damaged in sorted((tmp_path / "resumed" / "checkpoints").glob("*/weights.pt")):
        damaged.write_bytes(b"")  # so that it starts from step 0 again
    (tmp_path / "resumed" / "result.json").unlink()
    shutil.rmtree(source)
    train_tiny(tmp_path / "resumed", *words)
    assert losses_of(tmp_path / "resumed") == losses_of(tmp_path / "whole")
    assert same(weights_of(tmp_path / "resumed"), weights_of(tmp_path / "whole"))


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_run_with_frozen_parts_goes_on_exactly(
    train_tiny: Train, mae_run: Path, tmp_path: Path, zero_stage: int
) -> None:
    run = tmp_path / "run"
    words = [f"init.checkpoint={mae_run}", "init.freeze=image", f"train.zero_stage={zero_stage}"]
    words += ["checkpoint.every_steps=2", "train.num_steps=4"]
    train_tiny(run, *words)
    whole, losses = weights_of(run), losses_of(run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    assert newest_valid(Store(str(run))).step == 2  # type: ignore[union-attr]
    train_tiny(run, *words)
    assert losses_of(run) == losses
    assert same(weights_of(run), whole)


def test_words_keep_their_vectors_between_different_vocabularies(
    train_tiny: Train, finished_run: Path, make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    from training.data.tokenizer import Tokenizer

    other = ["model.text.vocabulary=full", f"init.checkpoint={finished_run}", "init.parts=text", "init.freeze=text"]
    train_tiny(tmp_path / "full", *other, *SHORT)
    known = Tokenizer.from_json((finished_run / "tokenizer.json").read_text())
    rows, compact = weights_of(tmp_path / "full")["text.tokens.weight"], weights_of(finished_run)["text.tokens.weight"]
    full = Tokenizer(context_length=known.context_length)
    caption = ["a red disc"]
    end = int((full(caption) == full.end_of_text_id).int().argmax())
    assert torch.equal(rows[full(caption)[0, : end + 1]], compact[known(caption)[0, : end + 1]])


def test_weights_of_a_library_are_a_start_as_well(train_tiny: Train, finished_run: Path, tmp_path: Path) -> None:
    from training.__main__ import main

    assert main(["export", str(finished_run), "format=timm", f"output={tmp_path / 'vit'}"]) == 0
    train_tiny(tmp_path / "run", f"init.weights={tmp_path / 'vit'}", "init.freeze=image", *SHORT)
    trained, began = part(weights_of(tmp_path / "run"), "image"), part(weights_of(finished_run), "image")
    assert same(trained, began)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init.checkpoint=MAE", "init.parts=imaeg"], "has no part imaeg; did you mean image?"),
        (["init.checkpoint=MAE", "init.parts=decoder"], "init.parts=decoder: the method has no part decoder"),
        (["init.checkpoint=MAE", "model.vision.depth=3"], "missing: image.blocks.layers.2"),
        (["init.checkpoint=MAE", "model.vision.pooling=map"], "missing: image.pooling"),
        (["init.checkpoint=MAE", "model.vision.width=32"], "other shapes: image"),
        (["init.freeze=imaje"], "init.freeze=imaje: the method has no such part; did you mean image?"),
        (["init.freeze=[image,text,image_projection,text_projection,log_scale]"], "nothing is left to train"),
        (["init.checkpoint=/nowhere"], "holds no pairmill run"),
        (["init.weights=/nowhere.pt"], "no such file"),
        (["init.parts=image"], "taken from where"),
        (["init.weights=x", "init.checkpoint=y"], "take one"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_anything_is_written(
    train_tiny: Train, mae_run: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        train_tiny(tmp_path / "run", *(word.replace("MAE", str(mae_run)) for word in words))
    assert not (tmp_path / "run").exists()


def test_one_methods_run_does_not_go_on_as_another(train_tiny: Train, mae_run: Path) -> None:
    with pytest.raises(RequestError, match=r"is a run of method mae, .* init.checkpoint=.* to start from its weights"):
        train_tiny(mae_run, "method=clip")


def load(run: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(run / INITIAL_FILE)
