"""The shapes of the networks: named sizes and the keys that override them."""

from dataclasses import dataclass
from typing import Literal

from pydantic import model_validator

from cluster.config import Config, key


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Width, depth, heads and the hidden width of the MLP of one transformer."""

    width: int
    depth: int
    heads: int
    mlp_width: int


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


class VisionConfig(Config):
    """The image encoder, a vision transformer."""

    size: Literal["nano", "micro", "Ti", "S", "B", "L", "H", "g", "G"] = key("B", "named size of the ViT")
    width: int | None = key(None, "width instead of the named size's", ge=8)
    depth: int | None = key(None, "number of blocks instead of the named size's", ge=1)
    heads: int | None = key(None, "attention heads instead of the named size's", ge=1)
    image_size: int = key(224, "side of the pictures that the network sees", unit="px", ge=8)
    patch_size: int = key(16, "side of a patch", unit="px", ge=2)
    stem: Literal["linear", "conv"] = key("linear", "patch embedding: one linear map, or a stack of 3x3 convolutions")
    pooling: Literal["mean", "class", "max", "map"] = key("mean", "how the patches become one feature")

    @property
    def shape(self) -> Shape:
        """The named size with the overrides applied."""
        named = SIZES[self.size]
        width = self.width or named.width
        mlp_width = named.mlp_width if self.width is None else 4 * width
        return Shape(width=width, depth=self.depth or named.depth, heads=self.heads or named.heads, mlp_width=mlp_width)

    @property
    def num_patches(self) -> int:
        """Patches of one picture."""
        return (self.image_size // self.patch_size) ** 2

    @model_validator(mode="after")
    def _shapes_fit(self) -> "VisionConfig":
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size={self.patch_size}: stem=conv halves the side, so it has to be a power of two")
        if self.shape.width % self.shape.heads or self.shape.width % 4:
            raise ValueError(f"width={self.shape.width}: has to be a multiple of 4 and of heads={self.shape.heads}")
        return self


class TextConfig(Config):
    """The text encoder, a transformer over CLIP's byte-pair tokens."""

    width: int = key(512, "width", ge=8)
    depth: int = key(12, "number of blocks", ge=1)
    heads: int = key(8, "attention heads", ge=1)
    context_length: int = key(77, "tokens of a caption, start and end included", unit="tokens", ge=2)
    vocabulary: Literal["full", "compact"] = key("full", "all 49,408 byte pairs, or only those that the captions use")
    attention: Literal["causal", "bidirectional"] = key("causal", "what a token attends to")
    pooling: Literal["end", "mean", "max", "map"] = key("end", "how the tokens become one feature")

    @property
    def shape(self) -> Shape:
        """The transformer's shape."""
        return Shape(width=self.width, depth=self.depth, heads=self.heads, mlp_width=4 * self.width)

    @model_validator(mode="after")
    def _shapes_fit(self) -> "TextConfig":
        if self.width % self.heads:
            raise ValueError(f"width={self.width}: has to be a multiple of heads={self.heads}")
        return self


class ModelConfig(Config):
    """Both encoders and the space they meet in."""

    vision: VisionConfig = key(VisionConfig(), "the image encoder")
    text: TextConfig = key(TextConfig(), "the text encoder")
    embed_dim: int = key(512, "width of the space that pictures and captions share", ge=2)
