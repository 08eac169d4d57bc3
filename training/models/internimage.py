"""InternImage (Wang et al. 2023): a convolutional network of transformer-like blocks around DCNv3.

Legend: B batch, C colours, S side of the picture, H W rows and columns of a map, D channels, N cells of the last map.
"""

import torch
from torch import Tensor, nn

from training.models.blocks import run
from training.models.config import INTERNIMAGE_SIZES, INTERNIMAGE_STRIDE, ConvShape, VisionConfig
from training.models.dcnv3 import NORM_EPS, DeformableConv
from training.models.image_encoder import ImageEncoder, refuse_keep
from training.models.pooling import Pooling

MLP_RATIO = 4
POOLING_HEAD_WIDTH = 64


class InternImage(ImageEncoder):
    """Four stages with 4, 8, 16 and 32 pixels a cell; tokens are the cells of the last map."""

    drops_patches = False

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        shape = INTERNIMAGE_SIZES[config.size]
        self.name = config.size
        self.width = self.pooled_width = shape.channels * 8
        self.grid = config.image_size // INTERNIMAGE_STRIDE
        half = shape.channels // 2
        self.stem = nn.Sequential(
            Downsample(3, half, bias=True), nn.GELU(), Downsample(half, shape.channels, bias=True)
        )
        self.stages = nn.ModuleList(Stage(shape, index) for index in range(4))
        self.downs = nn.ModuleList(Downsample(shape.channels << i, shape.channels << (i + 1)) for i in range(3))
        self.pooling = Pooling(config.pooling, self.width, max(1, self.width // POOLING_HEAD_WIDTH))
        self.stages.apply(_initialise)

    def forward(self, pixels_BCSS: Tensor, keep_BV: Tensor | None = None) -> Tensor:
        """Return tokens [B, N, D]."""
        refuse_keep(self.name, keep_BV)
        x_BHWD: Tensor = self.stem(pixels_BCSS.to(next(self.parameters()).dtype).permute(0, 2, 3, 1))
        for index, stage in enumerate(self.stages):
            x_BHWD = stage(x_BHWD if index == 0 else self.downs[index - 1](x_BHWD))
        return x_BHWD.flatten(1, 2)

    def pool(self, tokens_BLD: Tensor) -> Tensor:
        """Return one feature a picture, [B, D]."""
        feature_BD: Tensor = self.pooling(tokens_BLD)
        return feature_BD


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 and a norm."""

    def __init__(self, inner: int, outer: int, *, bias: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=bias)
        self.norm = nn.LayerNorm(outer, eps=NORM_EPS)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """Return [B, H / 2, W / 2, outer]."""
        y_BHWD: Tensor = self.norm(self.convolution(x_BHWD.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return y_BHWD


class Stage(nn.Module):
    """Blocks of one resolution; H puts further norms between blocks."""

    activation_checkpointing = False
    """Whether the backward pass computes a block's activations again instead of keeping them."""

    def __init__(self, shape: ConvShape, index: int) -> None:
        super().__init__()
        channels = shape.channels << index
        self.blocks = nn.ModuleList(Block(shape, channels, shape.groups << index) for _ in range(shape.depths[index]))
        extra = shape.extra_norms if index == 2 else ()
        self.extra_norms = nn.ModuleDict({str(block): nn.LayerNorm(channels, eps=NORM_EPS) for block in extra})
        self.norm = None if shape.order == "post" else nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """Return the same shape."""
        for number, block in enumerate(self.blocks):
            x_BHWD = run(block, x_BHWD, again=self.activation_checkpointing)
            if str(number) in self.extra_norms:
                x_BHWD = self.extra_norms[str(number)](x_BHWD)
        return x_BHWD if self.norm is None else self.norm(x_BHWD)


class Block(nn.Module):
    """x + g f(norm(x)) with f = DCNv3, then the same with an MLP; large sizes normalise f's output instead, or too."""

    def __init__(self, shape: ConvShape, channels: int, groups: int) -> None:
        super().__init__()
        convolution = DeformableConv(
            channels,
            groups,
            offset_scale=shape.offset_scale,
            offset_kernel=shape.offset_kernel,
            blend_centre=shape.blend_centre,
        )
        hidden = MLP_RATIO * channels
        mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))
        self.branches = nn.ModuleList(Branch(shape, channels, inner) for inner in (convolution, mlp))

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """Return the same shape."""
        for branch in self.branches:
            x_BHWD = x_BHWD + branch(x_BHWD)
        return x_BHWD


class Branch(nn.Module):
    """What a block adds."""

    def __init__(self, shape: ConvShape, channels: int, inner: nn.Module) -> None:
        super().__init__()
        self.before = nn.Identity() if shape.order == "post" else nn.LayerNorm(channels, eps=NORM_EPS)
        self.inner = inner
        self.after = nn.Identity() if shape.order == "pre" else nn.LayerNorm(channels, eps=NORM_EPS)
        self.gain = None if shape.layer_scale is None else nn.Parameter(torch.full((channels,), shape.layer_scale))

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """Return the same shape."""
        y_BHWD: Tensor = self.after(self.inner(self.before(x_BHWD)))
        return y_BHWD if self.gain is None else y_BHWD * self.gain


def _initialise(module: nn.Module) -> None:
    """The MLPs' weights; DeformableConv has drawn its own."""
    if isinstance(module, Branch) and isinstance(module.inner, nn.Sequential):
        for linear in module.inner:
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
