"""CLIP (Radford et al. 2021): align pictures with their captions among all pairs of the global batch.

Legend: B batch, L tokens, D encoder width, E width of the shared space, G pairs of all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cluster.config import key
from training.data.tokenizer import Tokenizer
from training.data.transforms import evaluation_view, training_view
from training.losses.distributed import Gathered, LossSum, Scope, all_reduce_sum, gather, normalise, world_size
from training.losses.info_nce import info_nce, matched
from training.losses.similarity import scale, unit
from training.methods.base import Batch, Method, MethodConfig, Output, combine
from training.models.config import ModelConfig
from training.models.towers import Towers


class ClipConfig(MethodConfig):
    """Keys of the contrastive loss."""

    scope: Scope = key("global", "pairs to contrast with: of all ranks (global) or of each rank alone (local)")


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """The contrastive half of a forward pass, with what other objectives build on."""

    contrastive: LossSum
    tokens: Tensor
    """[B, L, D]: the encoded pictures."""
    texts: Gathered
    """L2-normalised text embeddings of the global batch."""
    matched: Tensor
    """bool [B]: the set C."""
    metrics: dict[str, Tensor]


class Clip(Method):
    """InfoNCE over the global batch, both directions, halved."""

    name: ClassVar[str] = "clip"
    config_type: ClassVar[type[MethodConfig]] = ClipConfig

    def __init__(self, config: ClipConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, model, tokenizer)
        self.config = config
        self.tokenizer = tokenizer
        self.image_size = model.vision.image_size
        self.towers = Towers(model, vocabulary_size=tokenizer.vocabulary_size, end_of_text_id=tokenizer.end_of_text_id)

    def forward(self, batch: Batch) -> Output:
        """Return the contrastive loss."""
        aligned = self.align(self.view(batch), batch.captions)
        losses = normalise({"contrastive": aligned.contrastive})
        return combine(losses, {"contrastive": 1.0}, aligned.metrics)

    def view(self, batch: Batch) -> Tensor:
        """Return the batch's random crops, [B, C, S, S]."""
        return training_view(
            batch.images,
            side=self.image_size,
            crop_scale=self.config.crop_scale,
            flip=self.config.flip,
            seed=batch.seed,
            sample_ids_B=batch.sample_ids,
            epoch_B=batch.epoch,
        )

    def align(self, pixels_BCSS: Tensor, captions: Sequence[str]) -> Aligned:
        """Encode both sides and contrast them (RILS eq. 1, 2, 4, 5, 6)."""
        tokens_BLD = self.towers.image(pixels_BCSS)
        image_BE = unit(self.towers.embed_pooled(tokens_BLD))
        text_BE = unit(self.towers.embed_text(self._ids(captions, pixels_BCSS.device)))
        images, texts = gather(image_BE, self.config.scope), gather(text_BE, self.config.scope)
        temperature = scale(self.towers.log_scale)
        matched_B = matched(image_BE, texts)
        metrics = {
            "logit_scale": temperature,
            "batch_accuracy": all_reduce_sum(matched_B.float().mean()) / world_size(),
        }
        return Aligned(
            contrastive=info_nce(image_BE, text_BE, images, texts, temperature),
            tokens=tokens_BLD,
            texts=texts,
            matched=matched_B,
            metrics=metrics,
        )

    def encode_image(self, images_BHWC: Tensor) -> Tensor:
        """Return L2-normalised float32 [B, E] of uint8 pictures: the largest centred square, resized."""
        return unit(self.towers.embed_pooled(self.towers.image(evaluation_view(images_BHWC, self.image_size))))

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Return L2-normalised float32 [B, E] of captions."""
        return unit(self.towers.embed_text(self._ids(captions, self.towers.log_scale.device)))

    def _ids(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """Token ids on the device, cut after the longest caption (to a multiple of 8, so that shapes repeat)."""
        ids_BL = self.tokenizer(captions)
        longest = int((ids_BL == self.tokenizer.end_of_text_id).int().argmax(dim=1).max()) + 1 if len(ids_BL) else 1
        return ids_BL[:, : -(-longest // 8) * 8].to(device, non_blocking=True)
