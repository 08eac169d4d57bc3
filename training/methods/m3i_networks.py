"""The networks of M3I: the input encoder f_theta, the target encoder f_phi and the decoders f_psi.

Legend: B batch, N features of a view, V those of an input that a reading looks at, D encoder width, K values predicted
for a place, E width of the space shared with text.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from training.data.tokenizer import Tokenizer
from training.data.transforms import evaluation_view
from training.losses.feature_prediction import plain_norm
from training.losses.pixels import normalised_patches, patchify
from training.losses.similarity import unit
from training.methods.base import CaptionNeed, Method
from training.methods.m3i_forms import M3iConfig
from training.methods.m3i_views import Reading, Views
from training.methods.views import read_captions, refuse_trained_pooling
from training.models.blocks import take_tokens
from training.models.config import ModelConfig
from training.models.encoders import Encoders
from training.models.image_encoder import build_image_encoder
from training.models.pooling import Pooling
from training.models.predictor import Predictor
from training.models.relative import own_places, relative_places
from training.models.towers import Towers
from training.momentum import follow, momentum_at, momentum_copy

HEAD_WIDTH = 64
"""Of the attention pooling."""


class M3iNetworks(Method):
    """What M3I computes of views, categories and captions, before any loss."""

    config_type: ClassVar[type[M3iConfig]] = M3iConfig
    without_captions: ClassVar[str] = "m3i.text=false"

    def __init__(
        self, config: M3iConfig, model: ModelConfig, tokenizer: Tokenizer, classes: Sequence[str] = ()
    ) -> None:
        super().__init__(config, model, tokenizer)
        self.config, self.form = config, config.image_form
        self.tokenizer, self.image_size = tokenizer, model.vision.image_size
        has_category = config.has_category(has_labels=bool(classes))
        self.towers: Towers | Encoders
        if config.has_text:
            ids = {"vocabulary_size": tokenizer.vocabulary_size, "end_of_text_id": tokenizer.end_of_text_id}
            self.towers = Towers(model, **ids)
        else:
            self.towers = Encoders(build_image_encoder(model.vision))
        width, self.grid = self.towers.image.width, self.towers.image.grid
        self.patch_size = self.image_size // self.grid
        self.readout = Pooling("map", width, max(1, width // HEAD_WIDTH)) if config.has_text or has_category else None
        self.category = nn.Linear(width, len(classes)) if has_category else None
        self.classes = tuple(classes)
        self.predictor, self.target = None, None
        if self.form is not None:
            values = 3 * self.patch_size**2 if self.form.target == "pixels" else width
            self.predictor = Predictor(width, config.predictor.shape, values)
            self.target = None if self.form.target == "pixels" else momentum_copy(self.towers.image)

    @classmethod
    def build(cls, config: Any, model: ModelConfig, tokenizer: Tokenizer, classes: Sequence[str]) -> Self:
        """Return the method with fresh weights and a category embedding for each class."""
        return cls(config, model, tokenizer, classes)

    @classmethod
    def check(cls, config: Any, model: ModelConfig, *, part_size: int, has_labels: bool) -> None:
        """Raise RequestError for a request that cannot work."""
        refuse_trained_pooling(cls.name, model.vision, "model.vision")
        config.refuse_unfit(model.vision, part_size=part_size, has_labels=has_labels)

    @classmethod
    def needs_captions(cls, config: Any) -> CaptionNeed:
        """Only where they are predicted; a sample without one has no such term."""
        return "some" if config.has_text else "none"

    @classmethod
    def has_text_features(cls, config: Any) -> bool:
        """With a text target."""
        return bool(config.has_text)

    def before_step(self, step: int, num_steps: int) -> None:
        """Move the target encoder, f_phi."""
        if self.target is not None:
            # At step 0 it is the encoder, wherever that has its weights from.
            momentum = momentum_at(step, num_steps, start=self.config.momentum) if step else 0.0
            pairs = zip(self.target.parameters(), self.towers.image.parameters(), strict=True)
            follow(pairs, momentum)

    def encode(self, views: Views) -> Tensor:
        """Return z_x = f_theta(input), [B, N, D]; of the kept patches alone where some are left out."""
        image = self.towers.image
        return image.patches(image(views.input) if views.keep is None else image(views.input, views.keep))

    @torch.no_grad()
    def targets(self, views: Views) -> Tensor | None:
        """Return z_y of every picture: [B, N, K], or [B, 1, K] of the whole view; None without image targets."""
        if self.form is None:
            return None
        if self.target is None:
            return normalised_patches(patchify(views.target, self.patch_size))
        features_BND = self.target.patches(self.target(views.target)).float()
        return plain_norm(features_BND.mean(1, keepdim=True) if self.form.target == "global" else features_BND)

    def predict(self, tokens_BND: Tensor, views: Views, reading: Reading) -> Tensor:
        """Return z^_y = f_psi(z_x, t_x, t_y), [B, N, K], for the target view of the reading's picture.

        A global target is predicted by the mean over the places, [B, 1, K].
        """
        assert self.predictor is not None
        assert self.form is not None
        own_BV4 = own_places(self.grid, tokens_BND.device).expand(len(tokens_BND), -1, -1)
        if reading.index is not None:
            own_BV4 = take_tokens(own_BV4, reading.index)
        target_box_B4 = reading.of(views.target_box)
        target_BN4 = relative_places(reading.box, target_box_B4, input_grid=self.grid, target_grid=self.grid)
        predicted: Tensor = self.predictor(reading.pick(tokens_BND), own_BV4, target_BN4, reading.keys)
        return predicted.float().mean(1, keepdim=True) if self.form.target == "global" else predicted

    def pool(self, tokens_BND: Tensor, reading: Reading) -> Tensor:
        """Return [B, D]: attention pooling over the features that show the reading's picture."""
        assert self.readout is not None
        pooled_BD: Tensor = self.readout(reading.pick(tokens_BND), reading.keys)
        return pooled_BD

    def encode_image(self, images_BHWC: Tensor) -> Tensor:
        """Return L2-normalised float32 features of whole pictures, in the space shared with text if there is one."""
        image = self.towers.image
        tokens_BND = image.patches(image(evaluation_view(images_BHWC, self.image_size)))
        if self.readout is None:
            return unit(tokens_BND.float().mean(1))
        pooled_BD = self.readout(tokens_BND)
        return unit(self.towers.image_projection(pooled_BD) if isinstance(self.towers, Towers) else pooled_BD)

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Return L2-normalised float32 [B, E] of captions; RequestError without a text target."""
        if not isinstance(self.towers, Towers):
            return super().encode_text(captions)
        return unit(self.towers.embed_text(read_captions(self.tokenizer, captions, self.towers.log_scale.device).ids))
