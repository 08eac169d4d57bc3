"""SLIP (Mu et al. 2022), a baseline of RILS: CLIP, and SimCLR on two more views of every picture.

Legend: B batch, C colours, S side, D encoder width, P width of the space of views.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from cluster.config import key
from training.data.augment import simclr_view
from training.data.tokenizer import Tokenizer
from training.losses.distributed import Gathered
from training.losses.simclr import simclr
from training.losses.similarity import unit
from training.methods.base import CropScale, MethodConfig
from training.methods.clip import Clip, ClipConfig
from training.methods.values import Batch, Embedded, Shown, Sums
from training.methods.views import to_pictures
from training.models.config import ModelConfig
from training.schedule import Schedule

VIEWS = ("view/0", "view/1")
"""The streams that the views are drawn from."""


class SlipConfig(ClipConfig):
    """Keys of SLIP; the defaults are its code's."""

    ssl_weight: Schedule = key(Schedule(value=1.0), "weight of the loss between views")
    ssl_temperature: float = key(0.1, "temperature of the loss between views", gt=0)
    ssl_crop_scale: CropScale = key((0.08, 1.0), "least and most share of the area that a view keeps")
    ssl_hidden: int = key(4096, "hidden width of the projection of views", ge=1)
    ssl_dim: int = key(256, "width of the space of views", ge=2)


class ViewProjection(nn.Sequential):
    """Linear, norm, ReLU, twice, then linear: SLIP's MLP with layer instead of batch normalisation.

    Batch statistics tie a sample's loss to its rank and its part of an accumulated step; synchronised ones cannot be
    accumulated exactly either.
    """

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__(
            *(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU()),
            nn.Linear(hidden, out),
        )


class Slip(Clip):
    """Contrastive loss between pictures and captions plus one between two augmented views."""

    name: ClassVar[str] = "slip"
    config_type: ClassVar[type[MethodConfig]] = SlipConfig

    def __init__(self, config: SlipConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, model, tokenizer)
        self.slip = config
        self.view_projection = ViewProjection(self.towers.image.pooled_width, config.ssl_hidden, config.ssl_dim)

    def embed(self, batch: Batch) -> Embedded:
        """Return what CLIP shares, and both views' normalised projections, [B, P]."""
        views = {stream: unit(self.project(self.augmented(batch, stream))) for stream in VIEWS}
        return Embedded(shared={**super().embed(batch).shared, **views})

    def losses(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> Sums:
        """Return both contrastive losses."""
        aligned = super().losses(batch, own, everyone)
        first, second = VIEWS
        between = simclr(
            own.shared[first],
            own.shared[second],
            everyone[first],
            everyone[second],
            temperature=self.slip.ssl_temperature,
        )
        return Sums(losses={**aligned.losses, "ssl": between}, metrics=aligned.metrics)

    def counts(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> dict[str, Tensor]:
        """One term a picture in both."""
        counts = super().counts(batch, own, everyone)
        return {**counts, "ssl": counts["contrastive"]}

    def weights(self, step: int) -> dict[str, float]:
        """Return 1 and the weight of the loss between views."""
        return {**super().weights(step), "ssl": self.slip.ssl_weight.at(step)}

    def augmented(self, batch: Batch, stream: str) -> Tensor:
        """Return one augmented view of every picture, [B, C, S, S]."""
        return simclr_view(
            batch.images,
            side=self.image_size,
            crop_scale=self.slip.ssl_crop_scale,
            seed=batch.seed,
            sample_ids_B=batch.sample_ids,
            epoch_B=batch.epoch,
            stream=stream,
        )

    def project(self, pixels_BCSS: Tensor) -> Tensor:
        """Return a view's projection, [B, P], not normalised."""
        projected_BP: Tensor = self.view_projection(self.towers.image.pool(self.towers.image(pixels_BCSS)))
        return projected_BP

    def show(self, batch: Batch) -> Shown | None:
        """Return the crop and both views."""
        views = {f"view {number}": to_pictures(self.augmented(batch, stream)) for number, stream in enumerate(VIEWS, 1)}
        return Shown(pictures={"picture": to_pictures(self.view(batch)), **views}, captions={"caption": batch.captions})
