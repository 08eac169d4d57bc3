"""What goes into a method and comes out of it: a batch, embeddings, sums, and what becomes of them.

Legend: B samples of a (micro-)batch, G samples that meet, H W rows and columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from training.losses.distributed import LossSum, normalise


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of one step, or a part of it."""

    images: Tensor
    """uint8 [B, H, W, 3], RGB, on the device."""
    captions: list[str]
    """B captions."""
    sample_ids: Tensor
    """int64 [B]."""
    epoch: Tensor
    """int64 [B]: of each sample, as a batch may straddle two epochs."""
    step: int
    """Optimizer steps applied before this one."""
    seed: int
    """Of the run."""
    labels: Tensor | None = None
    """int64 [B]: category of each sample, -1 where it has none. None: the data has no categories."""

    def split(self, num_parts: int) -> "list[Batch]":
        """Cut into consecutive parts of equal size."""
        size, rest = divmod(len(self.captions), num_parts)
        if rest or not size:
            raise ValueError(f"a batch of {len(self.captions)} cannot be cut into {num_parts} equal parts")

        def cut(value: Any, part: slice) -> Any:
            return value[part] if isinstance(value, (Tensor, list)) else value

        slices = [slice(first, first + size) for first in range(0, len(self.captions), size)]
        return [Batch(**{f.name: cut(getattr(self, f.name), part) for f in fields(self)}) for part in slices]


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """What `embed` leaves for the losses. Every tensor has B rows."""

    shared: dict[str, Tensor] = field(default_factory=dict)
    """What the losses of other samples need, in the graph; gathered over ranks and parts, so keep it small."""
    constant: dict[str, Tensor] = field(default_factory=dict)
    """What they need that has no graph; gathered as well, under names of its own."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """What only this part's own losses need, as targets: handed on detached, and never held for two parts at once."""

    def detached(self) -> "Embedded":
        """The same without the graph of `kept`."""
        return replace(self, kept={name: x.detach() for name, x in self.kept.items()})


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What `losses` returns: sums over the (micro-)batch with the number of their terms."""

    losses: dict[str, LossSum]
    """Every named loss, before its weight; the same names in the same order on every rank."""
    metrics: dict[str, LossSum] = field(default_factory=dict)
    """What else is worth a curve: the mean over all terms of all ranks is recorded (see `mean_of`)."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a method says about a batch."""

    loss: Tensor
    """Scalar float32, scaled so that averaging gradients over ranks gives the objective's gradient."""
    losses: dict[str, Tensor]
    """Every named loss before its weight: the value over all ranks, detached."""
    metrics: dict[str, Tensor]
    """What else is worth a curve: values over all ranks, detached scalars."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a person can look at: n examples of a batch."""

    pictures: dict[str, Tensor]
    """uint8 [n, H, W, 3] by column title (picture, masked view, reconstruction, ...)."""
    captions: dict[str, list[str]]
    """n texts by column title (caption, generated, ...)."""


def mean_of(x: Tensor) -> LossSum:
    """Return a metric: its mean over all elements of all ranks is what is recorded."""
    x = x.detach().float()
    return LossSum(x.sum(), torch.full((), x.numel(), device=x.device))


def combine(sums: Sums, weights: Mapping[str, float]) -> Output:
    """Return the weighted sum of the losses with the values of losses and metrics; one collective."""
    normalised = normalise({**_prefixed("loss", sums.losses), **_prefixed("metric", sums.metrics)})
    return Output(
        loss=weighted({name: normalised[f"loss/{name}"].loss for name in sums.losses}, weights),
        losses={name: normalised[f"loss/{name}"].value for name in sums.losses},
        metrics={name: normalised[f"metric/{name}"].value for name in sums.metrics},
    )


def weighted(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the weighted sum of normalised losses."""
    assert losses.keys() == weights.keys(), f"losses {sorted(losses)}, weights {sorted(weights)}"
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


def _prefixed(prefix: str, sums: Mapping[str, LossSum]) -> dict[str, LossSum]:
    return {f"{prefix}/{name}": loss for name, loss in sums.items()}
