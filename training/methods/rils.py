"""RILS (Yang et al. 2023): masked visual reconstruction in language semantic space.

Legend: B batch, C colours, S side, N patches, V visible, M masked, D encoder width, E width of the shared space.
"""

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from cluster.config import key
from training.data.tokenizer import Tokenizer
from training.losses.distributed import LossSum, normalise
from training.losses.language_reconstruction import language_reconstruction
from training.losses.similarity import unit
from training.methods.base import Batch, MethodConfig, Output, combine
from training.methods.clip import Aligned, Clip, ClipConfig
from training.models.blocks import take_tokens
from training.models.config import ModelConfig
from training.models.decoder import PatchDecoder
from training.models.masking import random_mask
from training.schedule import Schedule


class RilsConfig(ClipConfig):
    """Keys of RILS; the defaults are the paper's (section 3.3), but for the schedules, which it has not."""

    contrastive_weight: Schedule = key(Schedule(value=1.0), "lambda_1 of eq. 10")
    reconstruction_weight: Schedule = key(Schedule(value=0.5), "lambda_2 of eq. 10")
    mask_ratio: float = key(0.75, "share of the patches that the masked view hides", gt=0, lt=1)
    target_temperature: float = key(0.04, "tau_1 of eq. 8: of the whole picture's patches", gt=0)
    prediction_temperature: float = key(0.1, "tau_2 of eq. 8: of the decoded patches", gt=0)
    decoder_depth: int = key(1, "blocks of the vision decoder", ge=1)
    use_set_c: bool = key(True, "reconstruct only pictures whose nearest text of the batch is their own")


class Rils(Clip):
    """Contrastive loss plus reconstruction of masked patches as distributions over the batch's texts."""

    name: ClassVar[str] = "rils"
    config_type: ClassVar[type[MethodConfig]] = RilsConfig

    def __init__(self, config: RilsConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, model, tokenizer)
        self.rils = config
        self.num_patches = model.vision.num_patches
        shape = replace(model.vision.shape, depth=config.decoder_depth)
        self.decoder = PatchDecoder(shape.width, shape, grid=self.towers.image.grid, out_width=shape.width)

    def forward(self, batch: Batch) -> Output:
        """Return lambda_1 L_contra + lambda_2 L_recon (eq. 10)."""
        pixels_BCSS = self.view(batch)
        aligned = self.align(pixels_BCSS, batch.captions)
        losses = normalise(
            {"contrastive": aligned.contrastive, "reconstruction": self.reconstruct(pixels_BCSS, aligned, batch)}
        )
        weights = {
            "contrastive": self.rils.contrastive_weight.at(batch.step),
            "reconstruction": self.rils.reconstruction_weight.at(batch.step),
        }
        return combine(losses, weights, aligned.metrics)

    def reconstruct(self, pixels_BCSS: Tensor, aligned: Aligned, batch: Batch) -> LossSum:
        """Decode the masked view and compare it with the whole one in the space of texts (eq. 1, 3, 7, 8, 9)."""
        keep_BV, masked_BM = random_mask(
            batch.seed, batch.sample_ids, batch.epoch, num_patches=self.num_patches, ratio=self.rils.mask_ratio
        )
        image = self.towers.image
        visible_BVD = image.patches(image(pixels_BCSS, keep_BV))
        decoded_BMD = take_tokens(self.decoder(visible_BVD, keep_BV), masked_BM)
        whole_BMD = take_tokens(image.patches(aligned.tokens).detach(), masked_BM)
        theta = self.towers.image_projection
        counted_B = aligned.matched if self.rils.use_set_c else aligned.matched.new_ones(len(keep_BV))
        return language_reconstruction(
            unit(theta(whole_BMD)),
            unit(theta(decoded_BMD)),
            aligned.texts.features,
            counted_B,
            target_temperature=self.rils.target_temperature,
            prediction_temperature=self.rils.prediction_temperature,
        )
