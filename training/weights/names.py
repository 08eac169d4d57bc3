"""What a weight is called in timm, MAE's repository, open_clip and transformers, and how it is laid out there.

Every dialect is a list of pairs (our name, their names), so one table serves both directions, and what is missing or
left over is known by name. Our names are those of a method's parts: image.*, text.*, image_projection.weight,
text_projection.weight, log_scale.

Two things are laid out differently and go through `image.table`, a name of neither side: position embeddings with the
class token's first, as the others store them. Ours has no position for the class token (it is part of the token) and a
bias in the patch embedding, which theirs may lack; both are sums, so nothing is lost either way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from training.models.config import ModelConfig

Dialect = Literal["timm", "mae", "open_clip", "huggingface", "pairmill"]
TABLE, BIAS, TOKEN, POSITIONS = "image.table", "image.stem.projection.bias", "image.class_token", "image.positions"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One weight. Several of theirs are stacked along the first dimension to make ours."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    leading: int = 0
    """Dimensions of size 1 that theirs has in front."""


def pairs(dialect: Dialect, model: ModelConfig) -> list[Pair]:
    """Return every weight of the parts that the dialect knows, for a model of this shape."""
    if dialect in ("timm", "mae"):
        return list(_timm(model))
    return list(_open_clip(model) if dialect == "open_clip" else _huggingface(model))


def folds_bias(dialect: Dialect, model: ModelConfig) -> bool:
    """Whether their patch embedding has no bias, so that ours has to go into the positions."""
    return dialect in ("open_clip", "huggingface") or model.vision.pre_norm


def _timm(model: ModelConfig) -> Iterator[Pair]:
    if model.vision.has_class_token:
        yield Pair(ours=TOKEN, theirs=("cls_token",), leading=2)
    yield Pair(ours=TABLE, theirs=("pos_embed",), leading=1)
    yield Pair(ours="image.stem.projection.weight", theirs=("patch_embed.proj.weight",))
    if not folds_bias("timm", model):
        yield Pair(ours=BIAS, theirs=("patch_embed.proj.bias",))
    if model.vision.pre_norm:
        yield from _both("image.pre_norm", "norm_pre")
    yield from _both("image.norm", "norm")
    for n in range(model.vision.shape.depth):
        ours, theirs = f"image.blocks.layers.{n}", f"blocks.{n}"
        yield from _both(f"{ours}.attention.qkv", f"{theirs}.attn.qkv")
        yield from _both(f"{ours}.attention.out", f"{theirs}.attn.proj")
        yield from _both(f"{ours}.norm1", f"{theirs}.norm1")
        yield from _both(f"{ours}.norm2", f"{theirs}.norm2")
        yield from _both(f"{ours}.mlp.0", f"{theirs}.mlp.fc1")
        yield from _both(f"{ours}.mlp.2", f"{theirs}.mlp.fc2")


def _open_clip(model: ModelConfig) -> Iterator[Pair]:
    yield Pair(ours=TOKEN, theirs=("visual.class_embedding",))
    yield Pair(ours=TABLE, theirs=("visual.positional_embedding",))
    yield Pair(ours="image.stem.projection.weight", theirs=("visual.conv1.weight",))
    if model.vision.pre_norm:
        yield from _both("image.pre_norm", "visual.ln_pre")
    yield from _both("image.norm", "visual.ln_post")
    yield Pair(ours="image_projection.weight", theirs=("visual.proj",), transposed=True)
    yield Pair(ours="text.tokens.weight", theirs=("token_embedding.weight",))
    yield Pair(ours="text.positions", theirs=("positional_embedding",))
    yield from _both("text.norm", "ln_final")
    yield Pair(ours="text_projection.weight", theirs=("text_projection",), transposed=True)
    yield Pair(ours="log_scale", theirs=("logit_scale",))
    for part, prefix, depth in _towers(model, "visual.transformer", "transformer"):
        for n in range(depth):
            ours, theirs = f"{part}.blocks.layers.{n}", f"{prefix}.resblocks.{n}"
            for kind in ("weight", "bias"):
                yield Pair(ours=f"{ours}.attention.qkv.{kind}", theirs=(f"{theirs}.attn.in_proj_{kind}",))
            yield from _both(f"{ours}.attention.out", f"{theirs}.attn.out_proj")
            yield from _both(f"{ours}.norm1", f"{theirs}.ln_1")
            yield from _both(f"{ours}.norm2", f"{theirs}.ln_2")
            yield from _both(f"{ours}.mlp.0", f"{theirs}.mlp.c_fc")
            yield from _both(f"{ours}.mlp.2", f"{theirs}.mlp.c_proj")


def _huggingface(model: ModelConfig) -> Iterator[Pair]:
    yield Pair(ours=TOKEN, theirs=("vision_model.embeddings.class_embedding",))
    yield Pair(ours=TABLE, theirs=("vision_model.embeddings.position_embedding.weight",))
    yield Pair(ours="image.stem.projection.weight", theirs=("vision_model.embeddings.patch_embedding.weight",))
    yield from _both("image.pre_norm", "vision_model.pre_layrnorm")  # their spelling
    yield from _both("image.norm", "vision_model.post_layernorm")
    yield Pair(ours="image_projection.weight", theirs=("visual_projection.weight",))
    yield Pair(ours="text.tokens.weight", theirs=("text_model.embeddings.token_embedding.weight",))
    yield Pair(ours="text.positions", theirs=("text_model.embeddings.position_embedding.weight",))
    yield from _both("text.norm", "text_model.final_layer_norm")
    yield Pair(ours="text_projection.weight", theirs=("text_projection.weight",))
    yield Pair(ours="log_scale", theirs=("logit_scale",))
    for part, prefix, depth in _towers(model, "vision_model.encoder", "text_model.encoder"):
        for n in range(depth):
            ours, theirs = f"{part}.blocks.layers.{n}", f"{prefix}.layers.{n}"
            for kind in ("weight", "bias"):
                split = tuple(f"{theirs}.self_attn.{x}_proj.{kind}" for x in "qkv")
                yield Pair(ours=f"{ours}.attention.qkv.{kind}", theirs=split)
            yield from _both(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
            yield from _both(f"{ours}.norm1", f"{theirs}.layer_norm1")
            yield from _both(f"{ours}.norm2", f"{theirs}.layer_norm2")
            yield from _both(f"{ours}.mlp.0", f"{theirs}.mlp.fc1")
            yield from _both(f"{ours}.mlp.2", f"{theirs}.mlp.fc2")


def _towers(model: ModelConfig, vision: str, text: str) -> list[tuple[str, str, int]]:
    return [("image", vision, model.vision.shape.depth), ("text", text, model.text.depth)]


def _both(ours: str, theirs: str) -> Iterator[Pair]:
    for kind in ("weight", "bias"):
        yield Pair(ours=f"{ours}.{kind}", theirs=(f"{theirs}.{kind}",))
