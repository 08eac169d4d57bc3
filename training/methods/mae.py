"""MAE (He et al. 2022): predict the pixels of hidden patches; also from the features of a frozen teacher.

Legend: B batch, C colours, S side, N patches, V visible, M masked, D encoder width, K values predicted for a patch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from cluster.config import key
from training.data.tokenizer import Tokenizer
from training.data.transforms import evaluation_view
from training.losses.distributed import Gathered
from training.losses.pixels import normalised_patches, patch_error, patchify
from training.losses.similarity import unit
from training.methods.base import CaptionNeed, CropScale, Method, MethodConfig
from training.methods.values import Batch, Embedded, Shown, Sums
from training.methods.views import crop, masked_pictures, reconstructed_pictures, refuse_trained_pooling, to_pictures
from training.models.blocks import take_tokens
from training.models.config import ModelConfig
from training.models.decoder import DecoderConfig, PatchDecoder
from training.models.encoders import Encoders
from training.models.masking import PatchMask, num_visible, random_mask
from training.models.vit import VisionTransformer


class MaeConfig(MethodConfig):
    """Keys of MAE; the defaults are its paper's."""

    crop_scale: CropScale = key((0.2, 1.0), "least and most share of a picture's area that a crop keeps")
    flip: bool = key(True, "mirror half of the pictures")
    mask_ratio: float = key(0.75, "share of the patches that the encoder does not see", gt=0, lt=1)
    target: Literal["pixels", "features"] = key(
        "pixels", "what is predicted: pixels, or the features of a frozen `teacher` loaded by init (CLIP->MIM)"
    )
    norm_pixels: bool = key(True, "target=pixels: every patch with its own mean 0 and variance 1")
    decoder: DecoderConfig = key(DecoderConfig(), "the decoder")


class Mae(Method):
    """The encoder sees a quarter of the patches; the decoder predicts the others."""

    name: ClassVar[str] = "mae"
    config_type: ClassVar[type[MethodConfig]] = MaeConfig
    drops_patches: ClassVar[bool] = True

    def __init__(self, config: MaeConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, model, tokenizer)
        self.config = config
        vision = model.vision
        self.vision = vision
        self.towers = Encoders(VisionTransformer(vision))
        values = vision.shape.width if config.target == "features" else 3 * vision.patch_size**2
        self.decoder = PatchDecoder(
            vision.shape.width, config.decoder.shape, grid=self.towers.image.grid, out_width=values
        )
        if config.target == "features":
            self.teacher = VisionTransformer(vision).requires_grad_(False)

    @classmethod
    def check(cls, config: Any, model: ModelConfig, *, part_size: int, has_labels: bool) -> None:
        """Refuse a pooling with weights, which nothing would train."""
        refuse_trained_pooling(cls.name, model.vision, "model.vision")

    @classmethod
    def needs_captions(cls, config: Any) -> CaptionNeed:
        """Pictures are enough."""
        return "none"

    def borrowed_parts(self) -> Sequence[str]:
        """A teacher is another run's encoder."""
        return ("teacher",) if self.config.target == "features" else ()

    def losses(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> Sums:
        """Return the mean squared error of the hidden patches."""
        pixels_BCSS = crop(batch, self.config, self.vision.image_size)
        mask = self.mask(batch)
        prediction_BMK = self.predict(pixels_BCSS, mask)
        target_BMK = take_tokens(self.targets(pixels_BCSS), mask.masked)
        return Sums(losses={"reconstruction": patch_error(prediction_BMK, target_BMK)})

    def weights(self, step: int) -> dict[str, float]:
        """Return 1 for the only loss."""
        return {"reconstruction": 1.0}

    def counts(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> dict[str, Tensor]:
        """One term a hidden patch."""
        num_masked = self.vision.num_patches - num_visible(self.vision.num_patches, self.config.mask_ratio)
        return {"reconstruction": torch.full((), len(batch.captions) * num_masked, device=batch.images.device)}

    def mask(self, batch: Batch) -> PatchMask:
        """Draw which patches every picture hides."""
        return random_mask(
            batch.seed, batch.sample_ids, batch.epoch, num_patches=self.vision.num_patches, ratio=self.config.mask_ratio
        )

    def predict(self, pixels_BCSS: Tensor, mask: PatchMask) -> Tensor:
        """Return [B, M, K]: the hidden patches from the visible ones."""
        image = self.towers.image
        visible_BVD = image.patches(image(pixels_BCSS, mask.keep))
        return take_tokens(self.decoder(visible_BVD, mask.keep), mask.masked)

    @torch.no_grad()
    def targets(self, pixels_BCSS: Tensor) -> Tensor:
        """Return [B, N, K]: pixels, or the teacher's features of the whole picture, layer-normalised without affine."""
        if self.config.target == "features":
            features_BND = self.teacher.patches(self.teacher(pixels_BCSS)).float()
            return functional.layer_norm(features_BND, features_BND.shape[-1:])
        patches_BNK = patchify(pixels_BCSS, self.vision.patch_size)
        return normalised_patches(patches_BNK) if self.config.norm_pixels else patches_BNK

    def encode_image(self, images_BHWC: Tensor) -> Tensor:
        """Return L2-normalised float32 [B, D]: the pooled patches of the whole picture, for probes."""
        image = self.towers.image
        return unit(image.pool(image(evaluation_view(images_BHWC, self.vision.image_size))))

    def show(self, batch: Batch) -> Shown | None:
        """Return crops, what is visible of them, and the reconstruction."""
        pixels_BCSS, mask, patch = (
            crop(batch, self.config, self.vision.image_size),
            self.mask(batch),
            self.vision.patch_size,
        )
        pictures = {"picture": to_pictures(pixels_BCSS), "visible": masked_pictures(pixels_BCSS, mask.masked, patch)}
        if self.config.target == "pixels":
            pictures["reconstruction"] = reconstructed_pictures(
                pixels_BCSS,
                mask.masked,
                self.predict(pixels_BCSS, mask),
                patch,
                norm_pixels=self.config.norm_pixels,
            )
        return Shown(pictures=pictures, captions={"caption": batch.captions})
