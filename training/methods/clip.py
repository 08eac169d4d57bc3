"""CLIP (Radford et al. 2021): align pictures with their captions among all pairs of the global batch.

Legend: B batch, L tokens, D encoder width, E width of the shared space.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from cluster.config import key
from training.data.tokenizer import Tokenizer
from training.data.transforms import evaluation_view
from training.losses.distributed import Gathered, LossSum, Scope
from training.losses.info_nce import info_nce, matched
from training.losses.similarity import scale, unit
from training.methods.base import Method, MethodConfig
from training.methods.values import Batch, Embedded, Sums, mean_of
from training.methods.views import captions_cut, crop, read_captions
from training.models.config import ModelConfig
from training.models.towers import Towers


class ClipConfig(MethodConfig):
    """Keys of the contrastive loss."""

    scope: Scope = key("global", "pairs to contrast with: of all ranks (global) or of each rank alone (local)")
    local_steps: int = key(0, "first steps with scope local, whatever comes after", unit="steps", ge=0)


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

    def embed(self, batch: Batch) -> Embedded:
        """Return normalised embeddings `image` and `text`, [B, E]."""
        return Embedded(shared=self.share(self.towers.image(self.view(batch)), batch.captions))

    def losses(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> Sums:
        """Return the contrastive loss."""
        found_B = matched(own.shared["image"], everyone["text"])
        return Sums(losses={"contrastive": self.contrast(own, everyone)}, metrics=self.metrics(batch, found_B))

    def counts(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> dict[str, Tensor]:
        """One term a pair."""
        return {"contrastive": torch.full((), len(batch.captions), device=batch.images.device)}

    def weights(self, step: int) -> dict[str, float]:
        """One loss, weight 1."""
        return {"contrastive": 1.0}

    def scope(self, step: int) -> Scope:
        """Local for the first `local_steps`, then as configured."""
        return "local" if step < self.config.local_steps else self.config.scope

    def share(self, tokens_BLD: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return what meets the other pairs: pooled, projected, normalised (RILS eq. 1, 2, 4)."""
        read = read_captions(self.tokenizer, captions, tokens_BLD.device)
        return {
            "image": unit(self.towers.embed_pooled(tokens_BLD)),
            "text": unit(self.towers.embed_text(read.ids)),
        }

    def contrast(self, own: Embedded, everyone: Mapping[str, Gathered]) -> LossSum:
        """Contrast both sides (RILS eq. 5, 6)."""
        return info_nce(
            own.shared["image"],
            own.shared["text"],
            everyone["image"],
            everyone["text"],
            scale(self.towers.log_scale),
        )

    def metrics(self, batch: Batch, matched_B: Tensor) -> dict[str, LossSum]:
        """The temperature, the share of pictures whose nearest text is their own, and that of cut captions."""
        return {
            "logit_scale": mean_of(scale(self.towers.log_scale)),
            "batch_accuracy": mean_of(matched_B),
            "captions_cut": captions_cut(self.tokenizer, batch),
        }

    def view(self, batch: Batch) -> Tensor:
        """Return the batch's random crops, [B, C, S, S]."""
        return crop(batch, self.config, self.image_size)

    def encode_image(self, images_BHWC: Tensor) -> Tensor:
        """Return L2-normalised float32 [B, E] of uint8 pictures: the largest centred square, resized."""
        return unit(self.towers.embed_pooled(self.towers.image(evaluation_view(images_BHWC, self.image_size))))

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Return L2-normalised float32 [B, E] of captions."""
        return unit(self.towers.embed_text(read_captions(self.tokenizer, captions, self.towers.log_scale.device).ids))
