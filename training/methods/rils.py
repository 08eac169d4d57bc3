"""RILS (Yang et al. 2023): masked visual reconstruction in language semantic space.

Legend: B batch, C colours, S side, N patches, V visible, M masked, D encoder width, E width of the shared space.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cluster.config import key
from training.data.tokenizer import Tokenizer
from training.losses.distributed import Gathered, LossSum
from training.losses.info_nce import matched
from training.losses.language_reconstruction import language_reconstruction
from training.losses.pixels import normalised_patches, patch_error, patchify
from training.losses.similarity import unit
from training.methods.base import MethodConfig
from training.methods.clip import Clip, ClipConfig
from training.methods.values import Batch, Embedded, Shown, Sums
from training.methods.views import masked_pictures, reconstructed_pictures, to_pictures
from training.models.blocks import take_tokens
from training.models.config import ModelConfig
from training.models.decoder import PatchDecoder
from training.models.masking import PatchMask, num_visible, random_mask
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
    target: Literal["text", "prototypes", "pixels"] = key(
        "text",
        "space of the reconstruction (table 10): the batch's texts, learned prototypes, or raw pixels (MAE+CLIP; all "
        "pictures, whatever use_set_c says)",
    )
    num_prototypes: int = key(4096, "target=prototypes: how many; the paper's number of texts", ge=2)
    norm_pixels: bool = key(True, "target=pixels: every patch with its own mean 0 and variance 1")


class Rils(Clip):
    """Contrastive loss plus reconstruction of masked patches as distributions over the batch's texts."""

    name: ClassVar[str] = "rils"
    config_type: ClassVar[type[MethodConfig]] = RilsConfig
    drops_patches: ClassVar[bool] = True

    def __init__(self, config: RilsConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, model, tokenizer)
        self.rils = config
        self.vision = model.vision
        self.num_patches = model.vision.num_patches
        shape = replace(model.vision.shape, depth=config.decoder_depth)
        values = 3 * model.vision.patch_size**2 if config.target == "pixels" else shape.width
        self.decoder = PatchDecoder(shape.width, shape, grid=self.towers.image.grid, out_width=values)
        if config.target == "prototypes":
            self.prototypes = nn.Parameter(torch.randn(config.num_prototypes, model.embed_dim))

    def embed(self, batch: Batch) -> Embedded:
        """Return what CLIP shares; the pictures and their encoded patches are kept for the reconstruction."""
        pixels_BCSS = self.view(batch)
        tokens_BLD = self.towers.image(pixels_BCSS)
        return Embedded(
            shared=self.share(tokens_BLD, batch.captions), kept={"pixels": pixels_BCSS, "tokens": tokens_BLD}
        )

    def losses(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> Sums:
        """Return L_contra and L_recon (eq. 5, 6, 9)."""
        matched_B = matched(own.shared["image"], everyone["text"])
        losses = {
            "contrastive": self.contrast(own, everyone),
            "reconstruction": self.reconstruct(batch, own, everyone["text"].features, self.counted(matched_B)),
        }
        return Sums(losses=losses, metrics=self.metrics(batch, matched_B))

    def counts(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> dict[str, Tensor]:
        """One term a pair, and one a masked patch of the set C."""
        counted_B = self.counted(matched(own.shared["image"], everyone["text"]))
        num_masked = self.num_patches - num_visible(self.num_patches, self.rils.mask_ratio)
        return {**super().counts(batch, own, everyone), "reconstruction": counted_B.sum() * num_masked}

    def weights(self, step: int) -> dict[str, float]:
        """Return lambda_1 and lambda_2 of eq. 10."""
        return {
            "contrastive": self.rils.contrastive_weight.at(step),
            "reconstruction": self.rils.reconstruction_weight.at(step),
        }

    def counted(self, matched_B: Tensor) -> Tensor:
        """Return bool [B]: the set C, or everything."""
        return matched_B if self.rils.use_set_c and self.rils.target != "pixels" else torch.ones_like(matched_B)

    def reconstruct(self, batch: Batch, own: Embedded, texts_GE: Tensor, counted_B: Tensor) -> LossSum:
        """Decode the masked view and compare it with the whole one in the space of texts (eq. 1, 3, 7, 8, 9)."""
        mask = self.mask(batch)
        decoded_BMD = self.predict(own.kept["pixels"], mask)
        if self.rils.target == "pixels":
            return patch_error(decoded_BMD, self.pixel_targets(own.kept["pixels"], mask))
        image, theta = self.towers.image, self.towers.image_projection
        whole_BMD = take_tokens(image.patches(own.kept["tokens"]), mask.masked)
        return language_reconstruction(
            unit(theta(whole_BMD)),
            unit(theta(decoded_BMD)),
            texts_GE if self.rils.target == "text" else unit(self.prototypes),
            counted_B,
            target_temperature=self.rils.target_temperature,
            prediction_temperature=self.rils.prediction_temperature,
        )

    def mask(self, batch: Batch) -> PatchMask:
        """Draw which patches every picture hides."""
        return random_mask(
            batch.seed, batch.sample_ids, batch.epoch, num_patches=self.num_patches, ratio=self.rils.mask_ratio
        )

    def predict(self, pixels_BCSS: Tensor, mask: PatchMask) -> Tensor:
        """Return the decoded hidden patches, [B, M, D]."""
        image = self.towers.image
        visible_BVD = image.patches(image(pixels_BCSS, mask.keep))
        return take_tokens(self.decoder(visible_BVD, mask.keep), mask.masked)

    def pixel_targets(self, pixels_BCSS: Tensor, mask: PatchMask) -> Tensor:
        """Return what the hidden patches hold."""
        patches_BNK = patchify(pixels_BCSS, self.vision.patch_size)
        return take_tokens(normalised_patches(patches_BNK) if self.rils.norm_pixels else patches_BNK, mask.masked)

    def show(self, batch: Batch) -> Shown | None:
        """Return crops and what is visible of them; with target=pixels the reconstruction as well."""
        pixels_BCSS, mask, patch_size = self.view(batch), self.mask(batch), self.vision.patch_size
        pictures = {
            "picture": to_pictures(pixels_BCSS),
            "visible": masked_pictures(pixels_BCSS, mask.masked, patch_size),
        }
        if self.rils.target == "pixels":
            predicted_BMK = self.predict(pixels_BCSS, mask)
            pictures["reconstruction"] = reconstructed_pictures(
                pixels_BCSS, mask.masked, predicted_BMK, patch_size, norm_pixels=self.rils.norm_pixels
            )
        return Shown(pictures=pictures, captions={"caption": batch.captions})
