"""Any timm model is an image encoder, and a machine without timm says what to install."""

import builtins
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import RequestError
from cluster.store import Store
from training.command import TrainResult
from training.models.config import ModelConfig, TextConfig, VisionConfig
from training.models.image_encoder import build_image_encoder
from training.models.timm_encoder import import_timm

# NCHW maps, a token row with a class token, NHWC maps, and a head wider than the map.
MODELS = ["resnet10t", "vit_tiny_patch16_224", "mambaout_femto", "mobilenetv3_small_050"]
WORDS = ["model.vision.width=null", "model.vision.depth=null", "model.vision.heads=null", "model.vision.patch_size=16"]


@pytest.fixture(scope="module", autouse=True)
def timm() -> Any:
    return import_timm()


@pytest.mark.parametrize("name", MODELS)
def test_a_timm_model_gives_its_own_feature_and_patches(name: str) -> None:
    torch.manual_seed(0)
    side = 64
    encoder = build_image_encoder(VisionConfig(timm=name, image_size=side)).eval()
    pixels = torch.randn(2, 3, side, side)
    model: Any = encoder.model
    with torch.no_grad():
        tokens = encoder(pixels)
        patches = encoder.patches(tokens)
        assert torch.equal(encoder.pool(tokens), type(model).forward(model, pixels))
        assert patches.shape == (2, encoder.grid**2, encoder.width)
        # Row-major: what changes in the upper half of the picture changes the first half of the rows most.
        upper = pixels.clone()
        upper[:, :, : side // 2] = 0
        moved = (encoder.patches(encoder(upper)) - patches).abs().sum(-1).view(2, encoder.grid, encoder.grid)
    if not name.startswith("vit"):
        assert (moved[:, 0].sum() > moved[:, -1].sum()).all()


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_weights_of_a_timm_classifier_are_taken_without_it(timm: Any, tmp_path: Path, name: str) -> None:
    from training.weights.read import check_fit, read_weights

    save_file(timm.create_model(name).state_dict(), tmp_path / "model.safetensors")
    model = ModelConfig(vision=VisionConfig(timm=name))
    weights = read_weights(str(tmp_path), model)
    own = build_image_encoder(model.vision).state_dict()
    check_fit(weights, {f"image.{key}": value for key, value in own.items()}, name)


def test_activations_are_computed_again_where_the_model_can() -> None:
    from training.engine import checkpoint_activations

    encoder = build_image_encoder(VisionConfig(timm="vit_tiny_patch16_224", image_size=32))
    pixels = torch.randn(2, 3, 32, 32)
    gradients, calls = [], []
    encoder.get_submodule("model.blocks.5").register_forward_pre_hook(lambda *_: calls.append(1))
    for enabled in (False, True):
        checkpoint_activations(encoder, enabled)
        encoder.zero_grad()
        encoder.pool(encoder(pixels)).square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert len(calls) == 3, "once, then forth and again"
    torch.testing.assert_close(gradients[0], gradients[1])
    with pytest.raises(RequestError, match="activation_checkpointing=true: timm's pit_ti_224 cannot"):
        checkpoint_activations(build_image_encoder(VisionConfig(timm="pit_ti_224", image_size=224)), True)


def test_a_frozen_encoder_does_not_count_batches(tmp_path: Path) -> None:
    from training.config import InitConfig
    from training.data.tokenizer import Tokenizer
    from training.initial import initialise
    from training.methods import ClipConfig, build_method

    text = TextConfig(width=16, depth=1, heads=2, context_length=8)
    model = ModelConfig(vision=VisionConfig(timm="resnet10t", image_size=32), text=text, embed_dim=16)
    method = build_method("clip", ClipConfig(), model, Tokenizer())
    initialise(method, Store(str(tmp_path)), InitConfig(freeze=["image"]))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.get_submodule("towers.image")(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert method.get_submodule("towers.text").training


def test_a_run_with_a_timm_encoder_trains_and_is_exported_to_timm(
    timm: Any, train_tiny: Callable[..., TrainResult], tmp_path: Path
) -> None:
    from cluster.config import parse
    from training.evaluate.model import load_model
    from training.weights.export import ExportConfig, run_export

    run, out = tmp_path / "run", tmp_path / "out"
    train_tiny(run, *WORDS, "model.vision.timm=vit_tiny_patch16_224", "model.vision.image_size=32",
               "train.num_steps=2", "optim.warmup_steps=0", "train.zero_stage=3")  # fmt: skip
    run_export(parse(ExportConfig, [f"checkpoint={run}", "format=timm", f"output={out}"]))
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True, img_size=32).eval()
    image: Any = load_model(str(run)).method.get_submodule("towers.image")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels), image.pool(image(pixels)), rtol=1e-4, atol=1e-5)


def test_decay_spares_what_timm_would_spare(timm: Any) -> None:
    from training.engine import decays

    encoder = build_image_encoder(VisionConfig(timm="vit_tiny_patch16_224", image_size=32))
    model: Any = encoder.model
    spared = {name for name, parameter in model.named_parameters() if not decays(name, parameter)}
    one_dimensional = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    assert spared == one_dimensional | (model.no_weight_decay() & dict(model.named_parameters()).keys())


def test_an_unknown_model_is_refused_with_near_names(train_tiny: Callable[..., TrainResult], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"model.vision.timm=resnet81: .* near: resnet"):
        train_tiny(tmp_path / "run", *WORDS, "model.vision.timm=resnet81")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["mae", "mug", "rils"])
def test_a_method_that_leaves_patches_out_names_the_methods_that_do_not(
    train_tiny: Callable[..., TrainResult], tmp_path: Path, method: str
) -> None:
    words = [*WORDS, "model.vision.size=internimage-nano", "model.vision.image_size=64", f"method={method}"]
    with pytest.raises(RequestError, match=f"method={method}: leaves patches out.*clip, m3i, siglip, slip"):
        train_tiny(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["clip", "slip", "m3i"])
def test_the_other_methods_train_an_internimage(
    train_tiny: Callable[..., TrainResult], tmp_path: Path, method: str
) -> None:
    small = {
        "slip": ["slip.ssl_hidden=32", "slip.ssl_dim=8"],
        "m3i": ["m3i.predictor.width=16", "m3i.predictor.heads=2"],
    }
    side = 64 if method == "m3i" else 32
    words = [*WORDS, "model.vision.size=internimage-nano", f"model.vision.image_size={side}", f"method={method}"]
    result = train_tiny(
        tmp_path / "run", *words, *small.get(method, []), "train.num_steps=2", "optim.warmup_steps=0",
        f"train.zero_stage={0 if method == 'slip' else 3}", "train.activation_checkpointing=true",
    )  # fmt: skip
    assert result.outcome == "done"


def test_without_timm_a_request_for_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] in ("timm", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return builtins.__import__(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(
        RequestError, match=r"timm cannot be imported \(No module named .*pip install 'pairmill\[timm\]'"
    ):
        build_image_encoder(VisionConfig(timm="resnet18"))
