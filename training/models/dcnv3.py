"""Deformable convolution v3 (Wang et al. 2023, InternImage, eq. 2): every pixel samples K x K places that it chooses.

    y(p0) = sum_g sum_k m_gk(p0) w_g x_g(p0 + s (p_k + dp_gk(p0)))

with g over groups of channels, k over the points p_k of a regular K x K grid, dp the learned offsets in pixels, s the
offset scale, and m the modulation, a softmax over k; w_g is the input projection's part of the group. Places between
pixels are interpolated bilinearly; outside of the picture is 0.

The plain form here runs wherever torch does. Where the authors' operator is installed (module DCNv3) and the tensors
are on a GPU, it computes the sum instead.

Legend: B batch, H W rows and columns, D channels, G groups, C channels of a group, K side of the grid, P = K * K points
in the operator's order: column by column.
"""

import importlib
import math
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

KERNEL = 3
NORM_EPS = 1e-6


def aggregate(x_BHWD: Tensor, offset_BHWGP2: Tensor, modulation_BHWGP: Tensor, scale: float) -> Tensor:
    """Return the sum over points, [B, H, W, D]. Offsets are (column, row), in pixels, before the scale.

    In float32 whatever the inputs are: bf16 cannot tell a place from the next pixel's.
    """
    inputs = (x_BHWD.float(), offset_BHWGP2.float(), modulation_BHWGP.float())
    if x_BHWD.device.type == "cuda" and operator() is not None:
        y_BHWD: Tensor = _Operator.apply(*inputs, scale)  # type: ignore[no-untyped-call]
        return y_BHWD
    return aggregate_plainly(*inputs, scale)


def aggregate_plainly(x_BHWD: Tensor, offset_BHWGP2: Tensor, modulation_BHWGP: Tensor, scale: float) -> Tensor:
    """The sum over points, by grid_sample."""
    height, width = x_BHWD.shape[1:3]
    groups, points = modulation_BHWGP.shape[-2:]
    row_H, column_W = (torch.arange(n, device=x_BHWD.device, dtype=x_BHWD.dtype) for n in (height, width))
    row_HW, column_HW = torch.meshgrid(row_H, column_W, indexing="ij")
    own_HW112 = torch.stack([column_HW, row_HW], dim=-1)[:, :, None, None]
    place_BHWGP2 = own_HW112 + scale * (regular_points(x_BHWD) + offset_BHWGP2)
    # grid_sample's range is -1 .. 1 from edge to edge, pixel centres lie half a pixel inside.
    size_2 = x_BHWD.new_tensor([width, height])
    grid_BHWGP2 = (2 * place_BHWGP2 + 1) / size_2 - 1
    grid_NLP2 = grid_BHWGP2.movedim(3, 1).reshape(-1, height * width, points, 2)
    x_NCHW = x_BHWD.permute(0, 3, 1, 2).reshape(len(x_BHWD) * groups, -1, height, width)
    sampled_NCLP = functional.grid_sample(x_NCHW, grid_NLP2, padding_mode="zeros", align_corners=False)
    weight_N1LP = modulation_BHWGP.movedim(3, 1).reshape(-1, 1, height * width, points)
    y_NCL = (sampled_NCLP * weight_N1LP).sum(-1)
    return y_NCL.view(-1, x_BHWD.shape[3], height, width).permute(0, 2, 3, 1)


def regular_points(like: Tensor) -> Tensor:
    """Return p_k: (column, row) of the K x K grid around a pixel, [P, 2], column by column."""
    step_K = torch.arange(KERNEL, device=like.device, dtype=like.dtype) - KERNEL // 2
    return torch.cartesian_prod(step_K, step_K)


@cache
def operator() -> Any:
    """The authors' compiled module, or None."""
    try:
        return importlib.import_module("DCNv3")
    except ImportError:
        return None


class _Operator(torch.autograd.Function):
    """The authors' operator; `im2col_step` pictures at a time, which has to divide the batch."""

    @staticmethod
    def forward(ctx: Any, x_BHWD: Tensor, offset_BHWGP2: Tensor, modulation_BHWGP: Tensor, scale: float) -> Tensor:
        inputs = (x_BHWD.contiguous(), offset_BHWGP2.flatten(3).contiguous(), modulation_BHWGP.flatten(3).contiguous())
        ctx.save_for_backward(*inputs)
        ctx.shapes = offset_BHWGP2.shape, modulation_BHWGP.shape
        groups = modulation_BHWGP.shape[3]
        once, same = (1, 1), (KERNEL // 2, KERNEL // 2)
        ctx.geometry = (KERNEL, KERNEL, *once, *same, *once, groups, x_BHWD.shape[3] // groups, scale)
        ctx.step = x_BHWD.shape[0] if x_BHWD.shape[0] <= 256 else math.gcd(x_BHWD.shape[0], 256)
        y_BHWD: Tensor = operator().dcnv3_forward(*inputs, *ctx.geometry, ctx.step, *_keep_centre())
        return y_BHWD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHWD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, offset, modulation = operator().dcnv3_backward(
            *ctx.saved_tensors, *ctx.geometry, gradient_BHWD.contiguous(), ctx.step, *_keep_centre()
        )
        return x, offset.view(ctx.shapes[0]), modulation.view(ctx.shapes[1]), None


@cache
def _keep_centre() -> tuple[int, ...]:
    """The operator's last argument since version 1.1: 0, do not leave the centre point out."""
    try:
        return () if version("DCNv3") == "1.0" else (0,)
    except PackageNotFoundError:
        return (0,)


class DeformableConv(nn.Module):
    """DCNv3 with its projections; offsets and modulations come from a depth-wise convolution of the input."""

    def __init__(
        self, channels: int, groups: int, *, offset_scale: float, offset_kernel: int, blend_centre: bool
    ) -> None:
        super().__init__()
        self.groups, self.offset_scale = groups, offset_scale
        self.look = nn.Conv2d(channels, channels, offset_kernel, padding=offset_kernel // 2, groups=channels)
        self.look_norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.offset = nn.Linear(channels, groups * KERNEL**2 * 2)
        self.modulation = nn.Linear(channels, groups * KERNEL**2)
        self.enter = nn.Linear(channels, channels)
        self.leave = nn.Linear(channels, channels)
        self.blend = nn.Linear(channels, groups) if blend_centre else None
        for linear in (self.offset, self.modulation, self.blend):
            if linear is not None:
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        for linear in (self.enter, self.leave):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """Return [B, H, W, D]."""
        value_BHWD = self.enter(x_BHWD)
        seen_BHWD = self.look(x_BHWD.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        seen_BHWD = functional.gelu(self.look_norm(seen_BHWD))
        offset_BHWGP2 = self.offset(seen_BHWD).unflatten(-1, (self.groups, -1, 2))
        modulation_BHWGP = self.modulation(seen_BHWD).unflatten(-1, (self.groups, -1)).float().softmax(-1)
        y_BHWD = aggregate(value_BHWD, offset_BHWGP2, modulation_BHWGP, self.offset_scale).to(value_BHWD.dtype)
        if self.blend is not None:
            share_BHWG1 = self.blend(seen_BHWD).sigmoid()[..., None]
            share_BHWD = share_BHWG1.expand(*share_BHWG1.shape[:-1], y_BHWD.shape[-1] // self.groups).flatten(3)
            y_BHWD = y_BHWD * (1 - share_BHWD) + value_BHWD * share_BHWD
        result_BHWD: Tensor = self.leave(y_BHWD)
        return result_BHWD
