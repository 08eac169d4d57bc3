"""MUG (Zhao et al. 2023): reconstruct the hidden patches and generate the caption, both from the visible patches alone.

Legend: B batch, C colours, S side, V visible patches, D encoder width, L tokens, T tokens to be predicted, W
vocabulary.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cluster.config import key
from training.data.tokenizer import Tokenizer
from training.losses.distributed import Gathered, LossSum
from training.losses.masked_text import masked_text, predicted_places
from training.losses.pixels import patch_error
from training.methods.base import CaptionNeed, MethodConfig
from training.methods.mae import Mae, MaeConfig
from training.methods.values import Batch, Embedded, Shown, Sums
from training.methods.views import Captions, captions_cut, crop, read_captions
from training.models.blocks import take_tokens
from training.models.caption_decoder import CaptionDecoder, CaptionDecoderConfig
from training.models.config import ModelConfig
from training.models.masking import PatchMask, random_text_mask
from training.schedule import Schedule


class MugConfig(MaeConfig):
    """Keys of MUG; weights and mask ratio are the paper's, the caption decoder's shape is not in it."""

    norm_pixels: bool = key(False, "every patch with its own mean 0 and variance 1, instead of raw pixels")
    pixel_weight: Schedule = key(Schedule(value=1.0), "lambda_V, of the pixels")
    caption_weight: Schedule = key(
        Schedule(value=0.1), "lambda_L, of the caption; constant 0 is MAE: there is no caption decoder then"
    )
    captioning: Literal["autoregressive", "masked"] = key(
        "autoregressive", "predict every word from those before it, or hidden words from all others"
    )
    caption_mask_ratio: float = key(0.5, "captioning=masked: share of the words that are hidden", gt=0, le=1)
    caption_decoder: CaptionDecoderConfig = key(CaptionDecoderConfig(), "the caption decoder")
    monitor_every_steps: int = key(
        10,
        "steps between looks at the caption loss of other pictures' captions; make it that of log.every_steps",
        affects_result=False,
        unit="steps",
        ge=1,
    )


class Mug(Mae):
    """MAE with a second decoder that writes the caption."""

    name: ClassVar[str] = "mug"
    config_type: ClassVar[type[MethodConfig]] = MugConfig
    drops_patches: ClassVar[bool] = True
    without_captions: ClassVar[str] = "mug.caption_weight.value=0"

    def __init__(self, config: MugConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, model, tokenizer)
        self.mug = config
        self.tokenizer = tokenizer
        self.caption_decoder = (
            CaptionDecoder(
                config.caption_decoder,
                picture_width=self.towers.image.width,
                vocabulary_size=tokenizer.vocabulary_size,
                length=tokenizer.context_length,
                causal=config.captioning == "autoregressive",
            )
            if not config.caption_weight.is_always_zero
            else None
        )

    @classmethod
    def needs_captions(cls, config: Any) -> CaptionNeed:
        """Only where they are generated; one that is missing has no term."""
        return "none" if config.caption_weight.is_always_zero else "some"

    def losses(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> Sums:
        """Return L_V and L_L, of one encoder pass over the visible patches."""
        pixels_BCSS, mask = crop(batch, self.config, self.vision.image_size), self.mask(batch)
        visible_BVD = self.see(pixels_BCSS, mask)
        prediction_BMK = take_tokens(self.decoder(visible_BVD, mask.keep), mask.masked)
        losses = {"reconstruction": patch_error(prediction_BMK, take_tokens(self.targets(pixels_BCSS), mask.masked))}
        metrics: dict[str, LossSum] = {}
        if self.caption_decoder is not None:
            metrics["captions_cut"] = captions_cut(self.tokenizer, batch)
            captions = read_captions(self.tokenizer, batch.captions, pixels_BCSS.device)
            losses["caption"] = self.caption(visible_BVD, captions, batch)
            if (batch.step + 1) % self.mug.monitor_every_steps == 0 and len(batch.captions) > 1:
                with torch.no_grad():  # as low as the loss itself: the captions do not come from the pictures
                    metrics["caption_of_other_picture"] = self.caption(visible_BVD.roll(1, 0), captions, batch)
        return Sums(losses=losses, metrics=metrics)

    def counts(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> dict[str, Tensor]:
        """Hidden patches, and words that are predicted: known from masks and captions alone."""
        device = batch.images.device
        counts = {"reconstruction": torch.full((), self.mask(batch).masked.numel(), device=device)}
        if self.caption_decoder is not None:
            captions = read_captions(self.tokenizer, batch.captions, device)
            if self._is_masked:
                counts["caption"] = self._hidden(captions, batch).sum()
            else:
                counts["caption"] = predicted_places(captions.ends, captions.ids.shape[1]).sum()
        return counts

    def weights(self, step: int) -> dict[str, float]:
        """Return lambda_V and lambda_L."""
        weights = {"reconstruction": self.mug.pixel_weight.at(step)}
        return weights if self.caption_decoder is None else weights | {"caption": self.mug.caption_weight.at(step)}

    def see(self, pixels_BCSS: Tensor, mask: PatchMask) -> Tensor:
        """Return [B, V, D]: the encoded visible patches, all that either decoder gets to know of a picture."""
        image = self.towers.image
        return image.patches(image(pixels_BCSS, mask.keep))

    def caption(self, visible_BVD: Tensor, captions: Captions, batch: Batch) -> LossSum:
        """Return -log p(words | picture) and the number of words."""
        assert self.caption_decoder is not None
        if self._is_masked:
            hidden_BL = self._hidden(captions, batch)
            return masked_text(self._scores(visible_BVD, captions, hidden_BL), captions.ids[hidden_BL])
        wanted_BL = predicted_places(captions.ends, captions.ids.shape[1])
        scores_TW = self.caption_decoder(captions.ids, visible_BVD, at_BL=wanted_BL.roll(-1, 1))
        return masked_text(scores_TW, captions.ids[wanted_BL])

    def generate(self, visible_BVD: Tensor) -> list[str]:
        """Write a caption for every picture, the likeliest word each time."""
        assert self.caption_decoder is not None
        start = self.tokenizer([""])[:, :1].to(visible_BVD.device)
        ids_BL = start.expand(len(visible_BVD), 1)
        for _ in range(self.tokenizer.context_length - 1):
            place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
            last_BL = (place_L == len(place_L) - 1).expand_as(ids_BL)
            next_B = self.caption_decoder(ids_BL, visible_BVD, at_BL=last_BL).argmax(-1)
            ids_BL = torch.cat([ids_BL, next_B[:, None]], dim=1)
            if bool((ids_BL == self.tokenizer.end_of_text_id).any(1).all()):
                break
        return [self.tokenizer.decode(row) for row in ids_BL.tolist()]

    def fill_in(self, visible_BVD: Tensor, captions: Captions, batch: Batch) -> tuple[list[str], list[str]]:
        """Return the captions with `_` for hidden words, and with the likeliest words in their places."""
        hidden_BL = self._hidden(captions, batch)
        filled_BL = captions.ids.masked_scatter(hidden_BL, self._scores(visible_BVD, captions, hidden_BL).argmax(-1))
        rows = zip(captions.ids.tolist(), hidden_BL.tolist(), strict=True)
        blanked = [self._with_blanks(ids, hidden) for ids, hidden in rows]
        return blanked, [self.tokenizer.decode(row) for row in filled_BL.tolist()]

    def show(self, batch: Batch) -> Shown | None:
        """Return MAE's pictures, and what the caption decoder writes about their visible patches."""
        shown = super().show(batch)
        if shown is None or self.caption_decoder is None:
            return shown
        pixels_BCSS, mask = crop(batch, self.config, self.vision.image_size), self.mask(batch)
        visible_BVD = self.see(pixels_BCSS, mask)
        if not self._is_masked:
            return Shown(pictures=shown.pictures, captions=shown.captions | {"generated": self.generate(visible_BVD)})
        captions = read_captions(self.tokenizer, batch.captions, pixels_BCSS.device)
        blanked, filled = self.fill_in(visible_BVD, captions, batch)
        return Shown(pictures=shown.pictures, captions=shown.captions | {"words hidden": blanked, "filled in": filled})

    @property
    def _is_masked(self) -> bool:
        return self.mug.captioning == "masked"

    def _scores(self, visible_BVD: Tensor, captions: Captions, hidden_BL: Tensor) -> Tensor:
        """Return [T, W]: scores of the hidden words, seen from all others."""
        assert self.caption_decoder is not None
        scores_TW: Tensor = self.caption_decoder(
            captions.ids, visible_BVD, at_BL=hidden_BL, keys_BL=captions.keys, hidden_BL=hidden_BL
        )
        return scores_TW

    def _hidden(self, captions: Captions, batch: Batch) -> Tensor:
        """bool [B, L]: the words to be predicted from the others."""
        length = captions.ids.shape[1]
        mask = random_text_mask(
            batch.seed,
            batch.sample_ids,
            batch.epoch,
            end_B=captions.ends,
            length=length,
            ratio=self.mug.caption_mask_ratio,
        )
        return mask.hidden(length)

    def _with_blanks(self, ids: list[int], hidden: list[bool]) -> str:
        end = ids.index(self.tokenizer.end_of_text_id)
        return " ".join("_" if hidden[place] else self.tokenizer.decode([ids[place]]) for place in range(1, end))
