"""What a method is: a module that turns a batch into one loss, and pictures and captions into comparable features.

Legend: B batch, H W rows and columns, C colours, E width of the shared space.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from cluster.config import Config, key
from training.data.tokenizer import Tokenizer
from training.losses.distributed import NormalisedLoss
from training.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of one step."""

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


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a method says about a batch."""

    loss: Tensor
    """Scalar float32, scaled so that averaging gradients over ranks gives the objective's gradient."""
    losses: dict[str, Tensor]
    """Every named loss before its weight: the value over all ranks, detached."""
    metrics: dict[str, Tensor]
    """What else is worth a curve, detached scalars."""


class MethodConfig(Config):
    """Keys that every method has."""

    crop_scale: tuple[float, float] = key((0.5, 1.0), "least and most share of a picture's area that a crop keeps")
    flip: bool = key(False, "mirror half of the pictures")


class Method(nn.Module, ABC):
    """Base of the methods. A subclass builds only the modules that its loss uses, and runs all of them every step."""

    name: ClassVar[str]
    config_type: ClassVar[type[MethodConfig]]

    @abstractmethod
    def __init__(self, config: MethodConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """Return the loss of the batch; collective: every rank calls it in the same order."""

    @abstractmethod
    def encode_image(self, images_BHWC: Tensor) -> Tensor:
        """Return L2-normalised float32 [B, E] of uint8 pictures, without augmentation."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Return L2-normalised float32 [B, E] of captions."""


def combine(losses: dict[str, NormalisedLoss], weights: dict[str, float], metrics: dict[str, Tensor]) -> Output:
    """Return the weighted sum of the losses with their values. A weight of 0 still leaves its branch in the graph."""
    total = sum((weights[name] * loss.loss for name, loss in losses.items()), start=_zero_like(losses))
    values = {name: loss.value for name, loss in losses.items()}
    return Output(loss=total, losses=values, metrics={name: x.detach() for name, x in metrics.items()})


def _zero_like(losses: dict[str, NormalisedLoss]) -> Tensor:
    return next(iter(losses.values())).value.new_zeros(())
