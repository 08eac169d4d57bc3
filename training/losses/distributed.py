"""Losses over all ranks: gathering with gradient, and one normalisation for sums that ranks hold in parts.

Data-parallel training averages gradients over W ranks. The objective of a run is sum / count over all ranks, so each
rank back-propagates W * (its own sum) / (count of all ranks): the average is then the objective's gradient exactly,
whatever W is and however the samples are spread. Without a process group the world is one rank.

Legend: B samples of this rank, G samples of all ranks, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist

Scope = Literal["global", "local"]


@dataclass(frozen=True)
class LossSum:
    """What a loss returns: this rank's sum (with gradient) and how many terms it has (without)."""

    sum: Tensor
    count: Tensor


@dataclass(frozen=True)
class NormalisedLoss:
    """loss: to back-propagate, scaled for gradient averaging. value: the mean over all ranks, detached."""

    loss: Tensor
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Features of all ranks."""

    features: Tensor
    """[G, D], in rank order."""
    offset: int
    """The row at which this rank's begin."""


def world_size() -> int:
    """Ranks that share the objective."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank's number."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(features_BD: Tensor, scope: Scope = "global") -> Gathered:
    """Collect features from all ranks, with gradient; every rank has to hold the same number of rows.

    The backward pass sums what all ranks' losses ask of a row and hands it to the rank that computed the row, so the
    gradient is that of one process holding the whole batch. scope `local` keeps each rank to itself.
    """
    if scope == "local" or world_size() == 1:
        return Gathered(features=features_BD, offset=0)
    features_GD: Tensor = _GatherWithGradient.apply(features_BD)  # type: ignore[no-untyped-call]  # torch's own
    return Gathered(features=features_GD, offset=rank() * len(features_BD))


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum over ranks, detached."""
    total = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def normalise(losses: Mapping[str, LossSum]) -> dict[str, NormalisedLoss]:
    """Divide every sum by its count over all ranks, in one collective; a loss that no rank has terms for is 0.

    Every rank has to call this with the same names in the same order.
    """
    local = torch.stack([x.detach().double() for loss in losses.values() for x in (loss.sum, loss.count)])
    result = {}
    for (name, loss), (total, count) in zip(losses.items(), all_reduce_sum(local).view(-1, 2), strict=True):
        result[name] = NormalisedLoss(divide(loss, count), (total / count.clamp(min=1)).float())
    return result


def divide(loss: LossSum, count: Tensor) -> Tensor:
    """Return the loss to back-propagate: W * (this rank's sum) / (count of all ranks)."""
    return loss.sum * (world_size() / count.clamp(min=1).to(loss.sum.dtype))


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor) -> Tensor:
        x_BD = x_BD.contiguous()
        gathered_GD = x_BD.new_empty(world_size() * x_BD.shape[0], *x_BD.shape[1:])
        dist.all_gather(list(gathered_GD.chunk(world_size())), x_BD)
        return gathered_GD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """all_reduce and a slice, as gloo has no reduce_scatter; G x D is small beside activations."""
        gradient_GD = gradients[0].contiguous().clone()
        dist.all_reduce(gradient_GD)
        return gradient_GD.chunk(world_size())[rank()]
