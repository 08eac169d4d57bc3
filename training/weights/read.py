"""Reading weights that another library, or this one, has written: what they are, and whether they fit."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from cluster.errors import RequestError
from cluster.store import Store
from training.checkpoint import local_copy
from training.models.config import ModelConfig
from training.weights.convert import Weights, from_theirs, names_of
from training.weights.names import Dialect

WEIGHT_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
WRAPPERS = ("model", "state_dict", "module")
LEFT_OUT = ("head.", "decoder_", "mask_token", "logit_bias")
"""What begins so belongs to no encoder: classifiers, MAE's decoder, SigLIP's bias."""
SHOWN = 6


def read_file(path: str) -> Weights:
    """Return the tensors of a .safetensors, .pt, .pth or .bin file, or of the one in a folder, by their names there.

    path: local or a URL. Files of torch are read without running code from them. Raises RequestError when there is
    nothing to read.
    """
    try:
        found = _find(path)
    except (ValueError, ImportError) as error:  # a protocol unknown, or one whose library is not installed
        raise RequestError(f"init.weights={path}: {error}") from error
    with local_copy(*found) as file:
        try:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file

                return load_file(file)
            loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, pickle, zip and safetensors each have their own
            said = " ".join(str(error).split())[:200]
            raise RequestError(f"init.weights={path}: not readable as plain weights: {said}") from error
    return _unwrapped(loaded, path)


def _find(path: str) -> tuple[Store, str]:
    """The folder and the name of a file of weights."""
    folder = Store(path)
    for name in WEIGHT_FILES:
        if folder.exists(name):
            return folder, name
    parent, _, name = path.rstrip("/").rpartition("/")
    store = Store(parent or ("/" if path.startswith("/") else "."))
    if any(entry.path.startswith(f"{name}/") for entry in store.find(name)):
        raise RequestError(f"init.weights={path}: none of {', '.join(WEIGHT_FILES)} in this folder")
    if not store.exists(name):
        raise RequestError(f"init.weights={path}: no such file")
    return store, name


def _unwrapped(loaded: Any, path: str) -> Weights:
    if isinstance(loaded, dict):
        loaded = next((loaded[name] for name in WRAPPERS if _is_state(loaded.get(name))), loaded)
    if not _is_state(loaded):
        raise RequestError(f"init.weights={path}: holds no dictionary of tensors")
    named = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return {name.removeprefix("module."): value for name, value in named.items()}


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(name, str) and isinstance(inner, Tensor) for name, inner in value.items()
    )


def dialect_of(names: Collection[str]) -> Dialect:
    """Return whose names these are. Raises RequestError when they are nobody's."""
    if "visual.conv1.weight" in names or "token_embedding.weight" in names:
        return "open_clip"
    if any(name.startswith(("vision_model.", "text_model.")) for name in names):
        return "huggingface"
    if "patch_embed.proj.weight" in names:
        return "timm"  # and MAE's
    if any(name.startswith(("image.", "text.")) for name in names):
        return "pairmill"
    shown = ", ".join(sorted(names)[:SHOWN])
    raise RequestError(
        f"init.weights: the names in the file ({shown}, ...) are neither those of a vision transformer in timm, MAE, "
        "open_clip or transformers, nor those that pairmill export writes"
    )


def read_weights(path: str, model: ModelConfig) -> Weights:
    """Return a file's weights under our names, by part; RequestError when they are of another kind of network."""
    if model.vision.kind == "timm":
        return _of_timm(read_file(path), model.vision.timm)
    theirs = read_file(path)
    dialect = dialect_of(theirs)
    if model.vision.kind != "vit" and dialect != "pairmill":
        raise RequestError(f"init.weights={path}: weights of a vision transformer; the model is {model.vision.size}")
    if dialect != "pairmill":
        known = names_of(dialect, model)
        extra = [n for n in theirs if n not in known and not n.startswith(LEFT_OUT) and not n.endswith("position_ids")]
        if extra:
            raise RequestError(
                f"init.weights={path} ({dialect} names): has {_list(extra)}, for which this model has no place"
                f"{_hint(extra)}"
            )
    return from_theirs(dialect, theirs, model)


def _of_timm(theirs: Weights, name: str) -> Weights:
    """A timm model's weights without its classifier, under timm's names or those that pairmill export writes."""
    from training.models.timm_encoder import classifier_prefixes

    if any(key.startswith("image.model.") for key in theirs):
        return {key: value.float() for key, value in theirs.items()}
    left_out = classifier_prefixes(name)
    return {f"image.model.{key}": value.float() for key, value in theirs.items() if not key.startswith(left_out)}


def _hint(extra: list[str]) -> str:
    """Which setting would make a place, where one would."""
    said = " ".join(extra)
    for mark, setting in (
        ("cls_token", "model.vision.class_token=true"),
        ("ln_pre", "model.vision.pre_norm=true"),
        ("norm_pre", "model.vision.pre_norm=true"),
        ("pre_layrnorm", "model.vision.pre_norm=true"),
        ("blocks.", "model.vision.size or depth"),
        ("layers.", "model.vision.size or depth"),
    ):
        if mark in said:
            return f"; set {setting}"
    return ""


def check_fit(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Raise RequestError unless `weights` has every tensor of `wanted`, of the same shape, and no others."""
    problems = []
    if missing := [name for name in wanted if name not in weights]:
        problems.append(f"missing: {_list(missing)}")
    if extra := [name for name in weights if name not in wanted]:
        problems.append(f"not in this model: {_list(extra)}")
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, the model's is {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if shapes:
        problems.append(f"other shapes: {_list(shapes, '; ')}")
    if problems:
        raise RequestError(f"{where}: does not fit the model: {'; '.join(problems)}")


def _list(names: list[str], separator: str = ", ") -> str:
    rest = f"{separator}... ({len(names)} in all)" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + rest


def nearest(name: str, known: Collection[str]) -> str:
    """A hint at what was meant."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
