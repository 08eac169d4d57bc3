"""Cosine similarity and its temperature, in float32 whatever the towers run in.

Legend: A B rows, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MAX_SCALE = 100.0


def unit(x_BD: Tensor) -> Tensor:
    """Return x / ||x|| along the last axis, float32 also under autocast."""
    with torch.autocast(x_BD.device.type, enabled=False):
        return functional.normalize(x_BD.float(), dim=-1)


def product(a_AD: Tensor, b_BD: Tensor) -> Tensor:
    """Return a @ b^T [..., A, B] in float32 also under autocast: bfloat16 logits of scale 100 are off by up to 0.25."""
    with torch.autocast(a_AD.device.type, enabled=False):
        return a_AD.float() @ b_BD.float().T


def scale(log_scale: Tensor) -> Tensor:
    """Return 1 / sigma of RILS eq. 5: exp(log_scale), at most 100, float32.

    Clamped here and not in the parameter, whose sharded float32 master a clamp of the forward copy would not reach.
    """
    clamped: Tensor = _ClampMax.apply(log_scale.float().reshape(()), math.log(MAX_SCALE))  # type: ignore[no-untyped-call]  # torch's own
    return clamped.exp()


class _ClampMax(torch.autograd.Function):
    """Clamp from above whose gradient is dropped only where it points further out: what overshot can come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, maximum: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.maximum = maximum
        return x.clamp(max=maximum)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        leaves = (x >= ctx.maximum) & (gradients[0] < 0)
        return gradients[0].masked_fill(leaves, 0), None
