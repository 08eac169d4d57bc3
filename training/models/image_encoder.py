"""What every image encoder is: pictures in, a row of tokens out, and one feature from the tokens.

Legend: B batch, C colours, S side of the picture, N patches, V visible patches, L tokens, D width.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from training.models.config import VisionConfig


class ImageEncoder(nn.Module, ABC):
    """Base of the image encoders. "Patches" are a convolutional network's cells of the last map, too."""

    width: int
    """Of a token."""
    pooled_width: int
    """Of the feature that `pool` returns."""
    grid: int
    """Patches along a side: N = grid * grid."""
    drops_patches: bool
    """Whether `forward` can leave patches out; where not, it takes no keep_BV."""

    @abstractmethod
    def forward(self, pixels_BCSS: Tensor, keep_BV: Tensor | None = None) -> Tensor:
        """Return tokens [B, L, D]. keep_BV: indices of the patches to encode; the others are not seen at all."""

    def patches(self, tokens_BLD: Tensor) -> Tensor:
        """Return the patch tokens [B, N, D], row-major, of what `forward` returned."""
        return tokens_BLD

    @abstractmethod
    def pool(self, tokens_BLD: Tensor) -> Tensor:
        """Return one feature a picture, [B, pooled_width], of what `forward` returned."""


def build_image_encoder(config: VisionConfig) -> ImageEncoder:
    """Build the encoder that a configuration describes, with fresh weights."""
    if config.kind == "timm":
        from training.models.timm_encoder import TimmEncoder

        return TimmEncoder(config)
    if config.kind == "internimage":
        from training.models.internimage import InternImage

        return InternImage(config)
    from training.models.vit import VisionTransformer

    return VisionTransformer(config)


def refuse_keep(name: str, keep_BV: Tensor | None) -> None:
    """Raise ValueError when patches are to be left out by an encoder that cannot."""
    if keep_BV is not None:
        raise ValueError(f"{name} sees whole pictures only; patches cannot be left out")
