"""What methods share around their networks: the crop and the words they look at, and what a person can look at.

Legend: B batch, C colours, S side, L tokens, N patches, M masked ones, K values of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import RequestError
from training.data.tokenizer import Tokenizer
from training.data.transforms import denormalise, training_view
from training.losses.distributed import LossSum
from training.losses.pixels import denormalised_patches, patchify, unpatchify
from training.methods.base import MethodConfig
from training.methods.values import Batch, mean_of
from training.models.config import TextConfig, VisionConfig


def crop(batch: Batch, config: MethodConfig, side: int) -> Tensor:
    """Return the batch's random crops, normalised float32 [B, C, S, S]."""
    return training_view(
        batch.images,
        side=side,
        crop_scale=config.crop_scale,
        flip=config.flip,
        seed=batch.seed,
        sample_ids_B=batch.sample_ids,
        epoch_B=batch.epoch,
    )


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Captions as the networks read them."""

    ids: Tensor
    """int64 [B, L], cut after the longest caption, to a multiple of 8, so that shapes repeat."""
    ends: Tensor
    """int64 [B]: where <end of text> stands; 1 in an empty caption."""

    @property
    def keys(self) -> Tensor:
        """bool [B, L]: True where there is a token, padding excluded."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) <= self.ends[:, None]


def read_captions(tokenizer: Tokenizer, captions: Sequence[str], device: torch.device) -> Captions:
    """Tokenise captions and send them to the device."""
    ids_BL = tokenizer(captions)
    end_B = (ids_BL == tokenizer.end_of_text_id).int().argmax(dim=1)
    longest = int(end_B.max()) + 1 if len(end_B) else 1
    length = min(ids_BL.shape[1], -(-longest // 8) * 8)
    return Captions(ids=ids_BL[:, :length].to(device, non_blocking=True), ends=end_B.to(device, non_blocking=True))


def captions_cut(tokenizer: Tokenizer, batch: Batch) -> LossSum:
    """Return the metric of the share of captions that are too long for the context, and lose their last words."""
    return mean_of(tokenizer.is_cut(batch.captions).to(batch.images.device, non_blocking=True))


def to_pictures(pixels_BCSS: Tensor) -> Tensor:
    """Return uint8 [B, S, S, C] of normalised pixels."""
    return denormalise(pixels_BCSS.float()).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def masked_pictures(pixels_BCSS: Tensor, masked_BM: Tensor, patch_size: int) -> Tensor:
    """Return uint8 [B, S, S, C] with the hidden patches in mean grey."""
    patches_BNK = patchify(pixels_BCSS, patch_size)
    return to_pictures(unpatchify(_replace(patches_BNK, masked_BM, patches_BNK.new_zeros(())), patch_size))


def reconstructed_pictures(
    pixels_BCSS: Tensor, masked_BM: Tensor, prediction_BMK: Tensor, patch_size: int, *, norm_pixels: bool
) -> Tensor:
    """Return uint8 [B, S, S, C]: the visible patches as they are, the hidden ones as predicted.

    norm_pixels: the prediction is of patches with mean 0 and variance 1; the true ones' are lent to it, as in MAE.
    """
    patches_BNK = patchify(pixels_BCSS, patch_size).float()
    if norm_pixels:
        index_BMK = masked_BM[:, :, None].expand_as(prediction_BMK)
        prediction_BMK = denormalised_patches(prediction_BMK, patches_BNK.gather(1, index_BMK))
    return to_pictures(unpatchify(_replace(patches_BNK, masked_BM, prediction_BMK.float()), patch_size))


def refuse_trained_pooling(method: str, encoder: VisionConfig | TextConfig, name: str) -> None:
    """Raise RequestError for attention pooling in a method whose loss does not reach it."""
    if encoder.pooling == "map":
        raise RequestError(
            f"{name}.pooling=map: the loss of method={method} does not reach the pooling, whose weights would stay "
            f"random; use {name}.pooling=mean or max"
        )


def _replace(patches_BNK: Tensor, index_BM: Tensor, value: Tensor) -> Tensor:
    index_BMK = index_BM[:, :, None].expand(-1, -1, patches_BNK.shape[2])
    return patches_BNK.scatter(1, index_BMK, value.to(patches_BNK.dtype).expand(index_BMK.shape))
