"""Weights mean the same to us and to timm, open_clip, transformers and MAE, in both directions: features are equal."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.config import parse
from cluster.errors import RequestError
from training.__main__ import main
from training.command import TrainResult
from training.data.tokenizer import Tokenizer
from training.evaluate.model import TrainedModel, load_model
from training.initial import parts_of, take_parts
from training.models.config import ModelConfig
from training.models.timm_encoder import import_timm
from training.models.towers import Towers
from training.weights.convert import from_theirs, to_theirs
from training.weights.export import ExportConfig, run_export
from training.weights.names import Dialect
from training.weights.read import read_weights

# float32 sums in another order, through two blocks.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
WIDTH, DEPTH, HEADS, SIDE, PATCH, CONTEXT, SHARED = 32, 2, 2, 32, 8, 16, 24
CLIP_LIKE = ["vision.pooling=class", "vision.pre_norm=true", "vision.positions=learned"]
TEXTS = ["a red cat", "two dogs and an unheard-of zebra"]


@pytest.fixture(scope="module")
def libraries() -> Any:
    """The libraries themselves; importing timm first makes torchvision importable beside a CPU build of torch."""
    timm = import_timm()
    import open_clip
    import transformers

    return SimpleNamespace(timm=timm, open_clip=open_clip, transformers=transformers)


def shaken(module: nn.Module) -> Any:
    """The module in evaluation mode, every weight moved a little, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval()


def model(*words: str) -> ModelConfig:
    """A small model, as tall as those of the libraries below."""
    sizes = f"width={WIDTH} depth={DEPTH} heads={HEADS}".split()
    vision = [f"vision.{word}" for word in (*sizes, f"image_size={SIDE}", f"patch_size={PATCH}")]
    text = [f"text.{word}" for word in (*sizes, f"context_length={CONTEXT}")]
    return parse(ModelConfig, [*vision, *text, f"embed_dim={SHARED}", *words])


def towers(config: ModelConfig, seed: int = 0) -> Towers:
    torch.manual_seed(seed)
    end = Tokenizer().end_of_text_id
    built: Towers = shaken(Towers(config, vocabulary_size=end + 1, end_of_text_id=end))
    return built


def filled(path: Path, config: ModelConfig, *parts: str) -> Towers:
    """Our towers with the weights of a file, which has to have all of the parts."""
    built = towers(config, seed=7)
    taken = take_parts(read_weights(str(path), config), built.state_dict(), parts, str(path))
    built.load_state_dict(taken, strict=not parts)
    return built


def pixels() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def clip_ids() -> Tensor:
    return Tokenizer(context_length=CONTEXT)(TEXTS)


def timm_vit(libraries: Any, **keys: Any) -> Any:
    shape = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return shaken(libraries.timm.models.VisionTransformer(num_classes=0, **(shape | keys)))


def open_clip_model(libraries: Any, **keys: Any) -> Any:
    vision = {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH, "image_size": SIDE}
    text = {"layers": DEPTH, "width": WIDTH, "heads": HEADS, "context_length": CONTEXT}
    return shaken(libraries.open_clip.model.CLIP(SHARED, vision_cfg=vision, text_cfg=text, **keys))


def hugging_face_model(libraries: Any) -> Any:
    shape = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    shape |= {"intermediate_size": 4 * WIDTH}
    config = libraries.transformers.CLIPConfig(
        vision_config=shape | {"image_size": SIDE, "patch_size": PATCH},
        text_config=shape | {"max_position_embeddings": CONTEXT, "eos_token_id": 49_407},
        projection_dim=SHARED,
    )
    return shaken(libraries.transformers.CLIPModel(config))


def hugging_face_features(network: Any) -> tuple[Tensor, Tensor]:
    """Of our pictures and texts; newer releases wrap the feature."""
    image, text = network.get_image_features(pixels()), network.get_text_features(clip_ids())
    return getattr(image, "pooler_output", image), getattr(text, "pooler_output", text)


def mae_positions(grid: int, width: int) -> np.ndarray[Any, Any]:
    """The table of MAE's paper code, from its description: half of the width for the column, then half for the row."""
    frequency = 1 / 10_000 ** (np.arange(width // 4) / (width / 4))
    table = np.zeros((1 + grid * grid, width))
    for row in range(grid):
        for column in range(grid):
            halves = [np.concatenate([np.sin(p * frequency), np.cos(p * frequency)]) for p in (column, row)]
            table[1 + row * grid + column] = np.concatenate(halves)
    return table


@torch.no_grad()
def test_weights_of_a_timm_vit_give_timms_feature(libraries: Any, tmp_path: Path) -> None:
    theirs = timm_vit(libraries)
    save_file(theirs.state_dict() | {"head.weight": torch.ones(3)}, tmp_path / "vit.safetensors")
    config = model("vision.pooling=class", "vision.positions=learned", "vision.norm_eps=1e-6")
    ours = filled(tmp_path / "vit.safetensors", config, "image").image
    torch.testing.assert_close(ours.pool(ours(pixels())), theirs(pixels()), **CLOSE)


@torch.no_grad()
def test_weights_of_mae_give_its_patches_with_our_fixed_positions(libraries: Any, tmp_path: Path) -> None:
    theirs = timm_vit(libraries)
    theirs.pos_embed.copy_(torch.from_numpy(mae_positions(SIDE // PATCH, WIDTH))[None])
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, WIDTH)}
    arguments = argparse.Namespace(epochs=800)
    torch.save({"model": theirs.state_dict() | decoder, "epoch": 3}, tmp_path / "mae.pth")
    ours = filled(tmp_path / "mae.pth", model("vision.class_token=true", "vision.norm_eps=1e-6"), "image").image
    torch.testing.assert_close(ours(pixels()), theirs.forward_features(pixels()), **CLOSE)
    torch.save({"model": theirs.state_dict(), "args": arguments}, tmp_path / "code.pth")
    with pytest.raises(RequestError, match="not readable as plain weights"):
        read_weights(str(tmp_path / "code.pth"), model())


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_weights_of_open_clip_give_its_features(libraries: Any, tmp_path: Path, activation: str) -> None:
    theirs = open_clip_model(libraries, quick_gelu=activation == "quick_gelu")
    torch.save({"state_dict": {f"module.{n}": v for n, v in theirs.state_dict().items()}}, tmp_path / "epoch.pt")
    ours = filled(
        tmp_path / "epoch.pt", model(*CLIP_LIKE, f"vision.activation={activation}", f"text.activation={activation}")
    )
    torch.testing.assert_close(ours.embed_pooled(ours.image(pixels())), theirs.encode_image(pixels()), **CLOSE)
    torch.testing.assert_close(ours.embed_text(clip_ids()), theirs.encode_text(clip_ids()), **CLOSE)
    assert torch.equal(ours.log_scale, theirs.logit_scale)


@torch.no_grad()
def test_weights_of_transformers_give_its_features(libraries: Any, tmp_path: Path) -> None:
    theirs = hugging_face_model(libraries)
    theirs.save_pretrained(tmp_path)
    config = model(*CLIP_LIKE, "vision.activation=quick_gelu", "text.activation=quick_gelu")
    ours = filled(tmp_path, config)
    image, text = hugging_face_features(theirs)
    torch.testing.assert_close(ours.embed_pooled(ours.image(pixels())), image, **CLOSE)
    torch.testing.assert_close(ours.embed_text(clip_ids()), text, **CLOSE)


@pytest.mark.parametrize("dialect", ["timm", "mae", "open_clip", "huggingface"])
def test_out_and_in_again_is_what_it_was(dialect: Dialect) -> None:
    config = model(*CLIP_LIKE) if dialect in ("open_clip", "huggingface") else model("vision.class_token=true")
    ours = dict(towers(config).state_dict())
    again = from_theirs(dialect, to_theirs(dialect, ours, config, Tokenizer(context_length=CONTEXT)), config)
    wanted = {name: value for name, value in ours.items() if name.partition(".")[0] in parts_of(again)}
    assert again.keys() == wanted.keys()
    if "image.stem.projection.bias" in wanted and dialect in ("open_clip", "huggingface"):
        # Their patch embedding has no bias: it is in the positions now, which are added to the same patches.
        bias = wanted["image.stem.projection.bias"]
        wanted["image.positions"] = wanted["image.positions"] + bias
        wanted["image.stem.projection.bias"] = torch.zeros_like(bias)
    for name, value in wanted.items():
        torch.testing.assert_close(again[name], value, msg=name)


@pytest.fixture(scope="module")
def clip_run(train_tiny: Callable[..., TrainResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP run that every format can hold, with a compact vocabulary."""
    folder = tmp_path_factory.mktemp("runs") / "clip"
    train_tiny(folder, "train.num_steps=2", "optim.warmup_steps=1", *(f"model.{word}" for word in CLIP_LIKE))
    return folder


@pytest.fixture(scope="module")
def trained(clip_run: Path) -> TrainedModel:
    return load_model(str(clip_run))


def export(run: Path, dialect: str, output: Path | str) -> Path | str:
    run_export(parse(ExportConfig, [f"checkpoint={run}", f"format={dialect}", f"output={output}"]))
    return output


@torch.no_grad()
def our_features(trained: TrainedModel) -> tuple[Tensor, Tensor]:
    built: Any = trained.method
    image = built.towers.embed_pooled(built.towers.image(pixels()))
    return image, built.towers.embed_text(built.tokenizer(TEXTS))


@torch.no_grad()
def test_timm_loads_the_folder_and_computes_our_feature(
    libraries: Any, clip_run: Path, trained: TrainedModel, tmp_path: Path
) -> None:
    folder = export(clip_run, "timm", tmp_path / "out")
    theirs = libraries.timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image: Any = trained.method.get_submodule("towers.image")
    torch.testing.assert_close(theirs(pixels()), image.pool(image(pixels())), **CLOSE)


@pytest.mark.parametrize(
    "words",
    [
        ["vision.pooling=mean"],
        ["vision.pooling=max", "vision.class_token=true", "vision.norm_eps=1e-6"],
        ["vision.pooling=mean", "vision.pre_norm=true", "vision.activation=quick_gelu"],
    ],
)
@torch.no_grad()
def test_every_vit_that_timm_can_express_computes_our_feature(libraries: Any, tmp_path: Path, words: list[str]) -> None:
    from training.weights import settings

    config = model(*words)
    ours = towers(config)
    settings.check("timm", config, ["image"])
    (tmp_path / "config.json").write_text(json.dumps(settings.timm(config)))
    save_file(to_theirs("timm", ours.state_dict(), config, Tokenizer()), tmp_path / "model.safetensors")
    theirs = libraries.timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(theirs(pixels()), ours.image.pool(ours.image(pixels())), **CLOSE)


@torch.no_grad()
def test_open_clip_loads_the_folder_and_computes_our_features(
    libraries: Any, clip_run: Path, trained: TrainedModel, tmp_path: Path
) -> None:
    folder = export(clip_run, "open_clip", tmp_path / "out")
    theirs = libraries.open_clip.create_model(f"local-dir:{folder}").eval()
    ids = libraries.open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)  # CLIP's whole vocabulary
    image, text = our_features(trained)
    torch.testing.assert_close(theirs.encode_image(pixels()), image, **CLOSE)
    torch.testing.assert_close(theirs.encode_text(ids), text, **CLOSE)


@torch.no_grad()
def test_transformers_loads_the_folder_and_computes_our_features(
    libraries: Any, clip_run: Path, trained: TrainedModel, tmp_path: Path
) -> None:
    folder = export(clip_run, "huggingface", tmp_path / "out")
    image, text = our_features(trained)
    theirs = hugging_face_features(libraries.transformers.CLIPModel.from_pretrained(folder).eval())
    torch.testing.assert_close(theirs[0], image, **CLOSE)
    torch.testing.assert_close(theirs[1], text, **CLOSE)


def test_transformers_prepares_pictures_as_evaluation_does(libraries: Any, clip_run: Path, tmp_path: Path) -> None:
    from PIL import Image

    from training.data.transforms import evaluation_view

    folder = export(clip_run, "huggingface", tmp_path / "out")
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).repeat(12, 0).repeat(12, 1)[:, :80]
    prepare = libraries.transformers.CLIPImageProcessor.from_pretrained(folder)
    theirs = prepare(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    # They crop after resizing, at a whole pixel, and Pillow rounds to whole numbers.
    assert (theirs - evaluation_view(torch.from_numpy(picture)[None], SIDE)).abs().mean() < 0.06


def test_an_export_goes_to_an_object_store_and_comes_back(clip_run: Path, trained: TrainedModel) -> None:
    export(clip_run, "pairmill", "memory://exported/clip")
    read = read_weights("memory://exported/clip", trained.config.model)
    assert torch.equal(read["image.norm.weight"], trained.method.state_dict()["towers.image.norm.weight"])
    one_file = read_weights("memory://exported/clip/model.safetensors", trained.config.model)
    assert one_file.keys() == read.keys()


def test_an_export_with_our_names_is_read_again(clip_run: Path, trained: TrainedModel, tmp_path: Path) -> None:
    folder = Path(export(clip_run, "pairmill", tmp_path / "out"))
    stored = load_file(folder / "model.safetensors")
    read = read_weights(str(folder), trained.config.model)
    assert read.keys() == stored.keys()
    assert torch.equal(read["image.norm.weight"], trained.method.state_dict()["towers.image.norm.weight"])
    assert (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("words", "dialect", "message"),
    [
        (["model.vision.pooling=map"], "timm", "model.vision.pooling=map"),
        ([], "open_clip", "model.vision.class_token=false"),
        (["model.vision.pooling=class"], "huggingface", "model.vision.pre_norm=false"),
        (["model.vision.stem=conv"], "mae", "model.vision.stem=conv"),
    ],
)
def test_a_format_that_cannot_hold_a_model_says_which_keys_stand_against_it(
    words: list[str], dialect: str, message: str, train_tiny: Callable[..., TrainResult], tmp_path: Path
) -> None:
    train_tiny(tmp_path / "run", "train.num_steps=1", "optim.warmup_steps=0", *words)
    with pytest.raises(RequestError, match=message):
        export(tmp_path / "run", dialect, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote_and_refuses_a_full_folder(
    clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(clip_run), "format=mae", f"output={tmp_path / 'out'}"]
    refused = main(words)  # pre_norm
    assert refused == 2
    words[2] = "format=timm"
    assert main(words) == 0
    assert "export timm: step 2," in capsys.readouterr().out
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*words, "output=foo://out"]) == 2
    assert "output=foo://out: cannot open this location" in capsys.readouterr().err


def test_files_that_do_not_fit_are_refused_with_the_names(libraries: Any, tmp_path: Path) -> None:
    state = timm_vit(libraries).state_dict()
    fits = model("vision.pooling=class", "vision.positions=learned")
    lacking = {name: value for name, value in state.items() if not name.startswith("blocks.1.mlp")}
    cases = {
        "lacking": (lacking, fits, "missing: image.blocks.layers.1.mlp.0.weight"),
        "deeper": (
            timm_vit(libraries, depth=3).state_dict(),
            fits,
            "has blocks.2.attn.proj.bias.* set model.vision.size",
        ),
        "token": (state, model("vision.positions=learned"), "has cls_token.* set model.vision.class_token=true"),
        "wide": (timm_vit(libraries, embed_dim=64).state_dict(), fits, r"is \(64,.*the model's is \(32"),
        "places": (state, model("vision.class_token=true"), "set model.vision.positions=learned"),
        "other": ({"layer1.0.conv1.weight": torch.ones(1)}, fits, "neither those of a vision transformer"),
        "shapeless": (state | {"pos_embed": torch.ones(5)}, fits, r"pos_embed is \(5,\), which is none of its kind"),
    }
    for name, (weights, config, message) in cases.items():
        save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / f"{name}.safetensors")
        with pytest.raises(RequestError, match=message):
            filled(tmp_path / f"{name}.safetensors", config, "image")
    with pytest.raises(RequestError, match="no such file"):
        read_weights(str(tmp_path / "nothing.pt"), fits)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(RequestError, match=r"none of model.safetensors, .* in this folder"):
        read_weights(str(tmp_path / "empty"), fits)
    torch.save({0: torch.ones(1)}, tmp_path / "numbered.pt")
    with pytest.raises(RequestError, match="holds no dictionary of tensors"):
        read_weights(str(tmp_path / "numbered.pt"), fits)
    with pytest.raises(RequestError, match=r"foo://a/b.pt: Protocol not known: foo"):
        read_weights("foo://a/b.pt", fits)
    (tmp_path / "page.pt").write_bytes(b"<html>404</html>")
    with pytest.raises(RequestError, match="not readable as plain weights"):
        read_weights(str(tmp_path / "page.pt"), fits)
