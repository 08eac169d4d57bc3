"""The shapes of the networks: named sizes and the keys that override them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from cluster.config import Config, key

Activation = Literal["gelu", "quick_gelu"]
VisionKind = Literal["vit", "internimage", "timm"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Width, depth, heads and the hidden width of the MLP of one transformer, and its two variants."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: Activation = "gelu"
    norm_eps: float = 1e-5


def _shape(width: int, depth: int, heads: int, mlp_width: int = 0) -> Shape:
    return Shape(width=width, depth=depth, heads=heads, mlp_width=mlp_width or 4 * width)


SIZES: dict[str, Shape] = {
    "nano": _shape(192, 2, 3),
    "micro": _shape(256, 6, 4),
    "Ti": _shape(192, 12, 3),
    "S": _shape(384, 12, 6),
    "B": _shape(768, 12, 12),
    "L": _shape(1024, 24, 16),
    "H": _shape(1280, 32, 16),
    "g": _shape(1408, 40, 16, 6144),
    "G": _shape(1664, 48, 16, 8192),
}
"""ViT sizes. Ti to L: Dosovitskiy et al. 2021 and DeiT; H, g, G: Zhai et al. 2022; nano, micro: toys for a CPU."""


@dataclass(frozen=True, kw_only=True)
class ConvShape:
    """An InternImage (Wang et al. 2023, table 1): channels and groups of the first stage double with every stage."""

    channels: int
    depths: tuple[int, int, int, int]
    groups: int
    offset_scale: float = 1.0
    layer_scale: float | None = None
    order: Literal["pre", "post", "both"] = "pre"
    """Where a branch is normalised: its input, its output, or both (H)."""
    offset_kernel: int = 3
    """Side of the depth-wise convolution that offsets and modulations are computed from."""
    blend_centre: bool = False
    """Mix the sampled value with the unsampled one, by a learned share per group (H)."""
    extra_norms: tuple[int, ...] = ()
    """Blocks of the third stage that are followed by one more norm (H)."""


INTERNIMAGE_SIZES: dict[str, ConvShape] = {
    "internimage-nano": ConvShape(channels=16, depths=(1, 1, 2, 1), groups=1, layer_scale=1.0),
    "internimage-T": ConvShape(channels=64, depths=(4, 4, 18, 4), groups=4, layer_scale=1.0),
    "internimage-S": ConvShape(channels=80, depths=(4, 4, 21, 4), groups=5, layer_scale=1e-5, order="post"),
    "internimage-B": ConvShape(channels=112, depths=(4, 4, 21, 4), groups=7, layer_scale=1e-5, order="post"),
    "internimage-L": ConvShape(
        channels=160, depths=(5, 5, 22, 5), groups=10, offset_scale=2.0, layer_scale=1e-5, order="post"
    ),
    "internimage-XL": ConvShape(
        channels=192, depths=(5, 5, 24, 5), groups=12, offset_scale=2.0, layer_scale=1e-5, order="post"
    ),
    "internimage-H": ConvShape(
        channels=320,
        depths=(6, 6, 32, 6),
        groups=10,
        order="both",
        offset_kernel=5,
        blend_centre=True,
        extra_norms=(5, 11, 17, 23, 29),
    ),
}
"""The published sizes; nano: a toy for a CPU."""

INTERNIMAGE_STRIDE = 32
"""Pixels that one cell of the last stage's map covers, in each direction."""

VIT_ONLY = (
    *("width", "depth", "heads", "patch_size", "stem"),
    *("positions", "class_token", "pre_norm", "activation", "norm_eps"),
)


class VisionConfig(Config):
    """The image encoder: a vision transformer, an InternImage, or a model of the timm library."""

    shorthand: ClassVar[str] = "size"

    size: Literal[
        "nano",
        "micro",
        "Ti",
        "S",
        "B",
        "L",
        "H",
        "g",
        "G",
        "internimage-nano",
        "internimage-T",
        "internimage-S",
        "internimage-B",
        "internimage-L",
        "internimage-XL",
        "internimage-H",
    ] = key("B", "named size of the ViT, or an InternImage")
    timm: str = key("", "name of a timm model to use instead; needs pip install pairmill[timm]")
    width: int | None = key(None, "width instead of the named size's", ge=8)
    depth: int | None = key(None, "number of blocks instead of the named size's", ge=1)
    heads: int | None = key(None, "attention heads instead of the named size's", ge=1)
    image_size: int = key(224, "side of the pictures that the network sees", unit="px", ge=8)
    patch_size: int = key(16, "side of a patch", unit="px", ge=2)
    stem: Literal["linear", "conv"] = key("linear", "patch embedding: one linear map, or a stack of 3x3 convolutions")
    pooling: Literal["mean", "class", "max", "map"] = key(
        "mean", "how the patches become one feature (a timm model has its own)"
    )
    positions: Literal["sincos", "learned"] = key("sincos", "position embeddings: MAE's fixed table, or learned")
    class_token: bool = key(False, "a class token also where the pooling does not need it, as MAE has")
    pre_norm: bool = key(False, "a norm before the first block, as CLIP has")
    activation: Activation = key("gelu", "of the MLPs; quick_gelu for OpenAI's weights")
    norm_eps: float = key(1e-5, "added to the variance in norms; 1e-6 in MAE and timm", gt=0)

    @property
    def kind(self) -> VisionKind:
        """Which family the encoder is of."""
        if self.timm:
            return "timm"
        return "internimage" if self.size in INTERNIMAGE_SIZES else "vit"

    @property
    def drops_patches(self) -> bool:
        """Whether the encoder can leave patches out, which masked image modelling saves its time by."""
        return self.kind == "vit"

    @property
    def shape(self) -> Shape:
        """Of a ViT: the named size with the overrides applied."""
        named = SIZES[self.size]
        width = self.width or named.width
        return Shape(
            width=width,
            depth=self.depth or named.depth,
            heads=self.heads or named.heads,
            mlp_width=named.mlp_width if self.width is None else 4 * width,
            activation=self.activation,
            norm_eps=self.norm_eps,
        )

    @property
    def has_class_token(self) -> bool:
        """Whether a class token stands before the patches."""
        return self.class_token or self.pooling == "class"

    @property
    def num_patches(self) -> int:
        """Patches of one picture, or cells of the last map; not known of a timm model."""
        return (self.image_size // (self.patch_size if self.kind == "vit" else INTERNIMAGE_STRIDE)) ** 2

    @model_validator(mode="after")
    def _shapes_fit(self) -> "VisionConfig":
        if self.kind != "vit":
            self._refuse_vit_keys()
            return self
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size={self.patch_size}: stem=conv halves the side, so it has to be a power of two")
        if self.shape.width % self.shape.heads or self.shape.width % 4:
            raise ValueError(f"width={self.shape.width}: has to be a multiple of 4 and of heads={self.shape.heads}")
        return self

    def _refuse_vit_keys(self) -> None:
        name = self.timm or self.size
        for changed in (*VIT_ONLY, *(["pooling"] if self.timm else [])):
            if getattr(self, changed) != type(self).model_fields[changed].default:
                raise ValueError(f"{changed}={getattr(self, changed)}: {name} has no use for this key; leave it out")
        if self.kind == "internimage" and self.pooling == "class":
            raise ValueError(f"pooling=class: {name} has no class token; use mean, max or map")
        if self.kind == "internimage" and self.image_size % INTERNIMAGE_STRIDE:
            raise ValueError(f"image_size={self.image_size} is no multiple of {INTERNIMAGE_STRIDE}, {name}'s stride")


class TextConfig(Config):
    """The text encoder, a transformer over CLIP's byte-pair tokens."""

    shorthand: ClassVar[str] = "preset"

    preset: str = key("", "text encoder of a paper, whose keys the other keys override", affects_result=False)
    width: int = key(512, "width", ge=8)
    depth: int = key(12, "number of blocks", ge=1)
    heads: int = key(8, "attention heads", ge=1)
    context_length: int = key(77, "tokens of a caption, start and end included", unit="tokens", ge=2)
    vocabulary: Literal["full", "compact"] = key("full", "all 49,408 byte pairs, or only those that the captions use")
    attention: Literal["causal", "bidirectional"] = key("causal", "what a token attends to")
    pooling: Literal["end", "mean", "max", "map"] = key("end", "how the tokens become one feature")
    activation: Activation = key("gelu", "of the MLPs; quick_gelu for OpenAI's weights")

    @property
    def shape(self) -> Shape:
        """The transformer's shape."""
        return Shape(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_width=4 * self.width,
            activation=self.activation,
        )

    @model_validator(mode="after")
    def _shapes_fit(self) -> "TextConfig":
        if self.width % self.heads:
            raise ValueError(f"width={self.width}: has to be a multiple of heads={self.heads}")
        return self


class ModelConfig(Config):
    """Both encoders and the space they meet in."""

    shorthand: ClassVar[str] = "preset"

    preset: str = key("", "named model, whose keys the other keys override", affects_result=False)
    vision: VisionConfig = key(VisionConfig(), "the image encoder")
    text: TextConfig = key(TextConfig(), "the text encoder")
    embed_dim: int = key(512, "width of the space that pictures and captions share", ge=2)

    @classmethod
    def expand(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Lay the given keys over those of the presets that they name."""
        from training.models.presets import expand

        return expand(values)
