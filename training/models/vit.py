"""The vision transformer: patches, fixed positions, pre-norm blocks; whole pictures or visible patches only.

Legend: B batch, C colours, S side of the picture, G side of the patch grid, P side of a patch, N patches, V visible
patches, L tokens, D width.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from training.models.blocks import Blocks, take_tokens
from training.models.config import VisionConfig
from training.models.image_encoder import ImageEncoder
from training.models.pooling import Pooling
from training.models.positions import sincos_2d


class VisionTransformer(ImageEncoder):
    """Image encoder (Dosovitskiy et al. 2021), with MAE's fixed sine-cosine positions or learned ones.

    The class token's position is part of the token. With `pre_norm`, tokens are normalised before the first block too.
    """

    positions: Tensor
    drops_patches = True

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        shape = config.shape
        self.width = self.pooled_width = shape.width
        self.patch_size = config.patch_size
        self.grid = config.image_size // config.patch_size
        stem = ConvStem if config.stem == "conv" else LinearStem
        self.stem = stem(shape.width, config.patch_size)
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.randn(self.grid**2, shape.width) * 0.02)
        else:
            self.register_buffer("positions", sincos_2d(self.grid, shape.width), persistent=False)
        self.class_token = nn.Parameter(torch.randn(shape.width) * 0.02) if config.has_class_token else None
        self.pre_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps) if config.pre_norm else None
        self.blocks = Blocks(shape)
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.pooling = Pooling(config.pooling, shape.width, shape.heads)

    def forward(
        self, pixels_BCSS: Tensor, keep_BV: Tensor | None = None, beside: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Return normalised tokens [B, L, D]: the class token if there is one, then the patches (eq. 1 of RILS).

        keep_BV: indices of the patches to encode; the others are not seen at all. None encodes all of them.
        beside: tokens [B, K, D] of something else, which come last and are encoded jointly (M3AE's words), and bool
        [B, K]: True where one may be seen.
        """
        x_BLD = self._embed(pixels_BCSS, keep_BV)
        keys_BL = None
        if beside is not None:
            keys_BL = torch.cat([beside[1].new_ones(x_BLD.shape[:2]), beside[1]], dim=1)
            x_BLD = torch.cat([x_BLD, beside[0].to(x_BLD.dtype)], dim=1)
        y_BLD: Tensor = self.norm(self.blocks(x_BLD, keys_BL=keys_BL))
        return y_BLD

    def _embed(self, pixels_BCSS: Tensor, keep_BV: Tensor | None) -> Tensor:
        if keep_BV is not None and self.stem.looks_beyond_its_patch:
            pixels_BCSS = hide_patches(pixels_BCSS, keep_BV, self.grid)
        x_BLD = self.stem(pixels_BCSS.to(self.stem.dtype))
        x_BLD = x_BLD + self.positions.to(x_BLD.dtype)
        if keep_BV is not None:
            x_BLD = take_tokens(x_BLD, keep_BV)
        if self.class_token is not None:
            x_BLD = torch.cat([self.class_token.to(x_BLD.dtype).expand(len(x_BLD), 1, -1), x_BLD], dim=1)
        embedded_BLD: Tensor = x_BLD if self.pre_norm is None else self.pre_norm(x_BLD)
        return embedded_BLD

    def patches(self, tokens_BLD: Tensor) -> Tensor:
        """Return the patch tokens [B, N, D] of what `forward` returned."""
        return tokens_BLD if self.class_token is None else tokens_BLD[:, 1:]

    def pool(self, tokens_BLD: Tensor) -> Tensor:
        """Return one feature a picture, [B, D]; of the patches alone, unless it is the class token."""
        feature_BD: Tensor = self.pooling(tokens_BLD if self.pooling.name == "class" else self.patches(tokens_BLD))
        return feature_BD


class LinearStem(nn.Module):
    """Non-overlapping patches, one linear map each."""

    looks_beyond_its_patch = False

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.projection.weight.view(width, -1))
        nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]  # bias is optional in Conv2d, present here

    @property
    def dtype(self) -> torch.dtype:
        """The type that the pixels have to be given in."""
        return self.projection.weight.dtype

    def forward(self, pixels_BCSS: Tensor) -> Tensor:
        """Return [B, N, D], patches in row-major order."""
        y_BND: Tensor = self.projection(pixels_BCSS).flatten(2).transpose(1, 2)
        return y_BND


class ConvStem(nn.Module):
    """Early convolutions (Xiao et al. 2021): 3x3 convolutions of stride 2, doubling in width, then a 1x1 one.

    Group normalisation with one group stands for their batch normalisation: a sample's feature must not depend on
    which other samples share its batch or its rank.
    """

    looks_beyond_its_patch = True

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        num_halvings = patch_size.bit_length() - 1
        widths = [3, *(max(16, width >> (num_halvings - 1 - i)) for i in range(num_halvings))]
        layers: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, outer), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], width, 1))

    @property
    def dtype(self) -> torch.dtype:
        """The type that the pixels have to be given in."""
        return next(self.parameters()).dtype

    def forward(self, pixels_BCSS: Tensor) -> Tensor:
        """Return [B, N, D], patches in row-major order."""
        y_BND: Tensor = self.layers(pixels_BCSS).flatten(2).transpose(1, 2)
        return y_BND


def hide_patches(pixels_BCSS: Tensor, keep_BV: Tensor, grid: int) -> Tensor:
    """Zero (mean grey, after normalisation) every pixel outside the kept patches.

    Convolutions overlap patches: without this a visible token would carry pixels that the decoder has to predict.
    """
    visible_BN = torch.zeros(len(keep_BV), grid * grid, dtype=pixels_BCSS.dtype, device=pixels_BCSS.device)
    visible_BN.scatter_(1, keep_BV, 1)
    patch = pixels_BCSS.shape[-1] // grid
    visible_BSS = visible_BN.view(-1, grid, grid).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return pixels_BCSS * visible_BSS[:, None]
