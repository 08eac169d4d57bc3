"""Balance of a sum of losses by the length of each one's gradient at the features that all of them share.

A tap stands between the shared features and one term. Forward it does nothing; backward it adds up the squares of the
gradient that passes. Once a step the ranks add their sums, and the next step's weights follow from the norms so far.

Legend: K terms.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.losses.distributed import all_reduce_sum

MOMENTUM = 0.9
"""Of the average of the norms over steps."""
LARGEST = 10.0
"""A term's weight is changed by at most this factor, or its inverse."""


class Balance(nn.Module):
    """Gradient norms of K terms; the average is saved with the checkpoint."""

    norms: Tensor
    squares: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("norms", torch.zeros(len(names)))
        self.register_buffer("squares", torch.zeros(len(names)), persistent=False)

    def tap(self, name: str, features: Tensor, weight: float) -> Tensor:
        """Return the features for one term. weight: what multiplies the term, taken out of the norm again."""
        if weight == 0:
            return features
        place = self.names.index(name)
        tapped: Tensor = _Tap.apply(features, self.squares[place : place + 1], weight)  # type: ignore[no-untyped-call]  # torch's own
        return tapped

    def scales(self) -> dict[str, float]:
        """Return the factor of each term's weight: mean norm / its norm. 1 for terms whose norm is not known yet."""
        known_K = self.norms > 0
        if not bool(known_K.any()):
            return dict.fromkeys(self.names, 1.0)
        mean = self.norms[known_K].mean()
        scale_K = torch.where(known_K, mean / self.norms.clamp(min=1e-30), 1.0).clamp(1 / LARGEST, LARGEST)
        return dict(zip(self.names, scale_K.tolist(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Collective: take in the step's norms. A term without a gradient in this step keeps its average."""
        new_K = all_reduce_sum(self.squares).sqrt()
        moved_K = torch.where(self.norms > 0, self.norms.lerp(new_K, 1 - MOMENTUM), new_K)
        self.norms.copy_(torch.where(new_K > 0, moved_K, self.norms))
        self.squares.zero_()


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, square_1: Tensor, weight: float) -> Tensor:
        ctx.square_1, ctx.weight = square_1, weight
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.square_1.add_((gradients[0].float() / ctx.weight).square().sum())
        return gradients[0], None, None
