"""MAE-CLIP (Weers et al. 2023): CLIP, and a decoder that predicts hidden patches and words from both modalities.

Legend: B batch, C colours, S side, L tokens, N patches, V visible, M masked, D width, E width of the shared space,
K values of a patch, W vocabulary.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cluster.config import key
from training.data.tokenizer import Tokenizer
from training.losses.distributed import Gathered
from training.losses.info_nce import matched
from training.losses.similarity import unit
from training.methods.base import MethodConfig
from training.methods.clip import Clip, ClipConfig
from training.methods.generative import (
    GenerativeConfig,
    Hidden,
    build_decoder,
    generative_counts,
    generative_losses,
    hide_at_random,
    show_hidden,
)
from training.methods.values import Batch, Embedded, Shown, Sums
from training.methods.views import Captions, read_captions
from training.models.config import ModelConfig
from training.models.decoder import DecoderConfig
from training.models.masking import Side, similarity_mask, similarity_text_mask
from training.schedule import Schedule


class MaeClipConfig(GenerativeConfig, ClipConfig):
    """Keys of MAE-CLIP; the defaults are the paper's (sections 3.3 and 4.1), `local_steps` (500 there) excepted."""

    image_weight: Schedule = key(Schedule(value=0.1), "w_i of eq. 5")
    text_weight: Schedule = key(Schedule(value=0.05), "w_t of eq. 5")
    masking: Literal["similarity", "random"] = key(
        "similarity", "what is hidden: by similarity to the other modality's embedding, or at random"
    )
    similarity: Side = key("high", "masking=similarity: hide what is most (high) or least (low) similar")
    decoder: DecoderConfig = key(DecoderConfig(width=512, depth=12, heads=8), "the cross-modality decoder")


class MaeClip(Clip):
    """The encoders run twice: on everything for the contrastive loss, on what is visible for the generative ones."""

    name: ClassVar[str] = "mae_clip"
    config_type: ClassVar[type[MethodConfig]] = MaeClipConfig
    drops_patches: ClassVar[bool] = True

    def __init__(self, config: MaeClipConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, model, tokenizer)
        self.mae_clip = config
        self.vision = model.vision
        self.decoder = build_decoder(config.decoder, model, tokenizer, text_width=model.text.width)

    def embed(self, batch: Batch) -> Embedded:
        """Return what CLIP shares; pixels and, for similarity masking, the encoded tokens are kept."""
        captions = self.read(batch)
        pixels_BCSS, text = self.view(batch), self.towers.text
        image_BLD = self.towers.image(pixels_BCSS)
        text_BLD = text(captions.ids, pooled=False)
        shared = {
            "image": unit(self.towers.embed_pooled(image_BLD)),
            "text": unit(self.towers.text_projection(text.pool(text_BLD, captions.ids))),
        }
        return Embedded(shared=shared, kept={"pixels": pixels_BCSS, "image": image_BLD, "text": text_BLD})

    def losses(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> Sums:
        """Return the contrastive loss and both generative ones (eq. 5)."""
        captions, pixels_BCSS = self.read(batch), own.kept["pixels"]
        hidden = self.hide(batch, own, captions)
        predicted = self.predict(pixels_BCSS, captions, hidden)
        generative = generative_losses(self.mae_clip, predicted, hidden, pixels_BCSS, captions, self.vision.patch_size)
        found_B = matched(own.shared["image"], everyone["text"])
        return Sums(
            losses={"contrastive": self.contrast(own, everyone), **generative}, metrics=self.metrics(batch, found_B)
        )

    def counts(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> dict[str, Tensor]:
        """One term a pair, one a hidden patch, one a hidden word."""
        generative = generative_counts(self.mae_clip, batch, self.tokenizer, self.vision.num_patches)
        return {**super().counts(batch, own, everyone), **generative}

    def weights(self, step: int) -> dict[str, float]:
        """Return 1, w_i and w_t of eq. 5."""
        return {
            "contrastive": 1.0,
            "image": self.mae_clip.image_weight.at(step),
            "text": self.mae_clip.text_weight.at(step),
        }

    def read(self, batch: Batch) -> Captions:
        """Return the captions' tokens."""
        return read_captions(self.tokenizer, batch.captions, batch.images.device)

    def hide(self, batch: Batch, own: Embedded, captions: Captions) -> Hidden:
        """Return what is hidden: at random, or by element-wise CLIP similarity (section 4.1)."""
        if self.mae_clip.masking == "random":
            return hide_at_random(self.mae_clip, batch, captions, self.vision.num_patches)
        patch_BN, word_BL = self.similarities(own)
        hide = self.mae_clip.similarity
        return Hidden(
            patches=similarity_mask(patch_BN, ratio=self.mae_clip.image_mask_ratio, hide=hide),
            words=similarity_text_mask(word_BL, end_B=captions.ends, ratio=self.mae_clip.text_mask_ratio, hide=hide),
        )

    @torch.no_grad()
    def similarities(self, own: Embedded) -> tuple[Tensor, Tensor]:
        """Return the cosine of each patch [B, N] with its caption, and of each word [B, L] with its picture."""
        patch_BNE = unit(self.towers.image_projection(self.towers.image.patches(own.kept["image"])))
        word_BLE = unit(self.towers.text_projection(own.kept["text"]))
        with torch.autocast(patch_BNE.device.type, enabled=False):
            return (
                (patch_BNE * own.shared["text"][:, None]).sum(-1),
                (word_BLE * own.shared["image"][:, None]).sum(-1),
            )

    def predict(self, pixels_BCSS: Tensor, captions: Captions, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Encode what is visible and decode both modalities together: [B, M, K] and [T, W]."""
        image = self.towers.image
        image_BVD = image.patches(image(pixels_BCSS, hidden.patches.keep))
        text_BVD = self.towers.text(captions.ids, hidden.words)
        decoded: tuple[Tensor, Tensor] = self.decoder(image_BVD, hidden.patches, text_BVD, hidden.words, captions.keys)
        return decoded

    def show(self, batch: Batch) -> Shown | None:
        """Return crops and captions, what is visible of them, and what is predicted."""
        own, captions = self.embed(batch), self.read(batch)
        hidden, pixels_BCSS = self.hide(batch, own, captions), own.kept["pixels"]
        predicted = self.predict(pixels_BCSS, captions, hidden)
        return show_hidden(self.mae_clip, predicted, hidden, pixels_BCSS, captions, self.tokenizer, self.vision)
