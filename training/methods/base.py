"""What a method is: named losses of a batch, split so that a step can be computed whole or in parts with one result.

Two samples meet only through what `embed` shares (image and text embeddings, say). So a step is

    own = embed(batch);  everyone = own of all ranks and all parts;  losses(batch, own, everyone)

and training/accumulation.py can run it over micro-batches and still get the gradient of the whole batch.

Legend: B samples of a (micro-)batch, G samples that meet, H W rows and columns, E width of the shared space.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from cluster.config import Config, key
from cluster.errors import RequestError
from training.data.tokenizer import Tokenizer
from training.losses.distributed import Gathered, LossSum, Scope, gather, normalise
from training.models.config import ModelConfig

CaptionNeed = Literal["all", "some", "none"]
"""all: every source of a run, as a picture without caption would be contrasted with empty text."""


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


class MethodConfig(Config):
    """Keys that every method has."""

    crop_scale: tuple[float, float] = key((0.5, 1.0), "least and most share of a picture's area that a crop keeps")
    flip: bool = key(False, "mirror half of the pictures")


class Method(nn.Module, ABC):
    """Base of the methods. A subclass builds only the modules that its loss uses, and runs all of them every step.

    Random draws come from training/random.py, keyed by sample: `embed` and `losses` may run more than once a step and
    have to see the same crops and masks each time.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[MethodConfig]]
    drops_patches: ClassVar[bool] = False
    """Whether it shows the image encoder some patches only, which needs a vision transformer."""
    without_captions: ClassVar[str] = ""
    """The setting with which it needs no captions, if there is one."""

    @abstractmethod
    def __init__(self, config: MethodConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()

    @classmethod
    def build(cls, config: Any, model: ModelConfig, tokenizer: Tokenizer, classes: Sequence[str]) -> Self:
        """Return the method with fresh weights. classes: names of the categories in the data, for who needs them."""
        return cls(config, model, tokenizer)

    @classmethod
    def check(cls, config: Any, model: ModelConfig, *, part_size: int, has_labels: bool) -> None:
        """Raise RequestError, naming the key, when a request cannot work. Called before anything is written.

        part_size: samples of one rank that are computed at once. has_labels: the data has categories.
        """

    @classmethod
    def needs_captions(cls, config: Any) -> CaptionNeed:
        """Return which of a run's sources have to have captions."""
        return "all"

    @classmethod
    def has_text_features(cls, config: Any) -> bool:
        """Return whether `encode_text` works."""
        return cls.encode_text is not Method.encode_text

    def borrowed_parts(self) -> Sequence[str]:
        """Return the parts that make sense only with weights of another run: `init` has to load them."""
        return ()

    def embed(self, batch: Batch) -> Embedded:
        """Return what this part's and other samples' losses need. Nothing, when every sample stands alone."""
        return Embedded()

    @abstractmethod
    def losses(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> Sums:
        """Return the sums of this part's samples; runs whatever further passes they need.

        own: what `embed` returned for the same batch. everyone: for each name in `own.shared` and `own.constant`, the
        same of all samples that meet (see `scope`), with gradient, and the row at which this part begins. Takes part
        in no collective.
        """

    def counts(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> dict[str, Tensor]:
        """Return the counts that `losses` will return, for accumulation, where divisors precede the losses.

        Runs `losses`, which is right for any method; one that knows its counts for less should say so. `own.kept` is
        empty in an override's eyes: it is given only to this default.
        """
        return {name: loss.count for name, loss in self.losses(batch, own, everyone).losses.items()}

    @abstractmethod
    def weights(self, step: int) -> dict[str, float]:
        """Return the weight of every named loss at a step. A weight of 0 still leaves its branch in the graph."""

    def scope(self, step: int) -> Scope:
        """Return who meets at a step: samples of all ranks (global) or of each rank alone (local)."""
        return "global"

    def before_step(self, step: int, num_steps: int) -> None:
        """Do what precedes the first forward pass of a step, once a step, on every rank (a momentum encoder moves)."""

    def after_gradients(self) -> None:
        """Do what follows the last backward pass of a step, once a step, on every rank; may be collective."""

    def show(self, batch: Batch) -> Shown | None:
        """Return what a person can look at of a small batch, or None. Called without gradient, by every rank."""
        return None

    def forward(self, batch: Batch, work: Callable[[Batch], Any] | None = None) -> Any:
        """Run `work` on the batch, by default `step`: whatever uses parameters has to happen inside a call of the
        module, because ZeRO-3 fetches them there."""
        return (work or self.step)(batch)

    def step(self, batch: Batch) -> Output:
        """Return the loss of the whole batch at once; collective: every rank calls it in the same order."""
        own = self.embed(batch).detached()
        scope = self.scope(batch.step)
        everyone = {name: gather(x, scope) for name, x in (own.shared | own.constant).items()}
        return combine(self.losses(batch, own, everyone), self.weights(batch.step))

    def parts(self) -> dict[str, nn.Module | nn.Parameter]:
        """Return what the method is made of, by names that mean the same in every method.

        Those inside `towers` (image, text, image_projection, text_projection, log_scale), then the method's own.
        """
        named: dict[str, nn.Module | nn.Parameter] = {}
        for module in (self.get_submodule("towers"), self) if hasattr(self, "towers") else (self,):
            named |= dict(module.named_children())
            named |= dict(module.named_parameters(recurse=False))
        named.pop("towers", None)
        return named

    @abstractmethod
    def encode_image(self, images_BHWC: Tensor) -> Tensor:
        """Return L2-normalised float32 [B, E] of uint8 pictures, without augmentation."""

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Return L2-normalised float32 [B, E] of captions; RequestError when the method has no such features."""
        raise RequestError(
            f"method={self.name} trains no text features to compare pictures with; train some for its image encoder "
            "(method=clip init.checkpoint=RUN init.freeze=image), or export it for a probe (pairmill export)"
        )


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
