"""What a method is: named losses of a batch, split so that a step can be computed whole or in parts with one result.

Two samples meet only through what `embed` shares (image and text embeddings, say). So a step is

    own = embed(batch);  everyone = own of all ranks and all parts;  losses(batch, own, everyone)

and training/accumulation.py can run it over micro-batches and still get the gradient of the whole batch.

Legend: B samples of a (micro-)batch, G samples that meet, H W rows and columns of a picture, C its colours, E width of
the shared space.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator
from torch import Tensor, nn

from cluster.config import Config, key
from cluster.errors import RequestError
from training.data.tokenizer import Tokenizer
from training.losses.distributed import Gathered, Scope, gather
from training.methods.values import Batch, Embedded, Output, Shown, Sums, combine
from training.models.config import ModelConfig

CaptionNeed = Literal["all", "some", "none"]
"""all: every source of a run, as a picture without caption would be contrasted with empty text."""


def _increasing_shares(scale: tuple[float, float]) -> tuple[float, float]:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError("least and most share of the area have to be above 0, at most 1 and in this order")
    return scale


CropScale = Annotated[tuple[float, float], AfterValidator(_increasing_shares)]
"""Least and most share of a picture's area that a random crop keeps."""


class MethodConfig(Config):
    """Keys that every method has."""

    crop_scale: CropScale = key((0.5, 1.0), "least and most share of a picture's area that a crop keeps")
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

    @abstractmethod
    def encode_image(self, images_BHWC: Tensor) -> Tensor:
        """Return L2-normalised float32 [B, E] of uint8 pictures, without augmentation."""

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Return L2-normalised float32 [B, E] of captions; RequestError when the method has no such features."""
        raise RequestError(
            f"method={self.name} trains no text features to compare pictures with; train some for its image encoder "
            "(method=clip init.checkpoint=RUN init.freeze=image), or export it for a probe (pairmill export)"
        )
