"""What M3AE and MAE-CLIP share: both modalities are hidden in part, and one decoder predicts what is hidden.

Legend: B batch, C colours, S side, L tokens of a caption, N patches, V visible, M masked, K values of a patch,
T masked words of all captions, W vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.config import key
from training.data.tokenizer import Tokenizer
from training.losses.distributed import LossSum
from training.losses.masked_text import masked_text
from training.losses.pixels import normalised_patches, patch_error, patchify
from training.methods.base import MethodConfig
from training.methods.values import Batch, Shown
from training.methods.views import Captions, masked_pictures, read_captions, reconstructed_pictures, to_pictures
from training.models.blocks import take_tokens
from training.models.config import ModelConfig, VisionConfig
from training.models.cross_decoder import CrossModalityDecoder
from training.models.decoder import DecoderConfig
from training.models.masking import PatchMask, TextMask, num_hidden_words, num_visible, random_mask, random_text_mask


class GenerativeConfig(MethodConfig):
    """Keys of predicting hidden patches and words (MAE-CLIP, eq. 3 and 4)."""

    image_mask_ratio: float = key(0.75, "share of the patches that are hidden", gt=0, lt=1)
    text_mask_ratio: float = key(0.75, "share of a caption's words that are hidden", gt=0, lt=1)
    norm_pixels: bool = key(True, "predict every patch with its own mean 0 and variance 1")


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """What is hidden of a batch."""

    patches: PatchMask
    words: TextMask


def build_decoder(
    config: DecoderConfig, model: ModelConfig, tokenizer: Tokenizer, *, text_width: int
) -> CrossModalityDecoder:
    """Build the decoder of both modalities. text_width: of what encodes the words."""
    vision = model.vision
    return CrossModalityDecoder(
        config.shape,
        image_width=vision.shape.width,
        text_width=text_width,
        grid=vision.image_size // vision.patch_size,
        context_length=tokenizer.context_length,
        patch_values=3 * vision.patch_size**2,
        vocabulary_size=tokenizer.vocabulary_size,
    )


def hide_at_random(config: GenerativeConfig, batch: Batch, captions: Captions, num_patches: int) -> Hidden:
    """Draw what every sample hides."""
    draw = (batch.seed, batch.sample_ids, batch.epoch)
    length = captions.ids.shape[1]
    return Hidden(
        patches=random_mask(*draw, num_patches=num_patches, ratio=config.image_mask_ratio),
        words=random_text_mask(*draw, end_B=captions.ends, length=length, ratio=config.text_mask_ratio),
    )


def generative_losses(
    config: GenerativeConfig,
    predicted: tuple[Tensor, Tensor],
    hidden: Hidden,
    pixels_BCSS: Tensor,
    captions: Captions,
    patch_size: int,
) -> dict[str, LossSum]:
    """Return `image` (eq. 3) and `text` (eq. 4). predicted: what `CrossModalityDecoder` returned."""
    patches_BMK, logits_TW = predicted
    whole_BNK = patchify(pixels_BCSS, patch_size)
    target_BNK = normalised_patches(whole_BNK) if config.norm_pixels else whole_BNK
    ids_T = captions.ids.gather(1, hidden.words.masked)[hidden.words.counted]
    return {
        "image": patch_error(patches_BMK, take_tokens(target_BNK, hidden.patches.masked)),
        "text": masked_text(logits_TW, ids_T),
    }


def generative_counts(
    config: GenerativeConfig, batch: Batch, tokenizer: Tokenizer, num_patches: int
) -> dict[str, Tensor]:
    """Return the counts of `generative_losses`: hidden patches, and hidden words, whichever they are."""
    end_B = read_captions(tokenizer, batch.captions, batch.images.device).ends
    num_masked = num_patches - num_visible(num_patches, config.image_mask_ratio)
    return {
        "image": torch.full((), len(batch.captions) * num_masked, device=batch.images.device),
        "text": num_hidden_words(end_B, config.text_mask_ratio).sum(),
    }


def show_hidden(
    config: GenerativeConfig,
    predicted: tuple[Tensor, Tensor],
    hidden: Hidden,
    pixels_BCSS: Tensor,
    captions: Captions,
    tokenizer: Tokenizer,
    vision: VisionConfig,
) -> Shown:
    """Return crop, visible patches and reconstruction; caption, visible words and the likeliest words."""
    patches_BMK, logits_TW = predicted
    masked_BM, patch = hidden.patches.masked, vision.patch_size
    hidden_BL = hidden.words.hidden(captions.ids.shape[1])
    guessed_BL = captions.ids.masked_scatter(hidden_BL, logits_TW.argmax(-1))
    rows = zip(captions.ids.tolist(), guessed_BL.tolist(), hidden_BL.tolist(), captions.ends.tolist(), strict=True)
    texts = [
        (
            tokenizer.decode(ids),
            " ".join(
                "_" if gone else tokenizer.decode([token]) for token, gone in zip(ids[1:end], away[1:end], strict=True)
            ),
            tokenizer.decode(guessed[:end]),
        )
        for ids, guessed, away, end in rows
    ]
    return Shown(
        pictures={
            "picture": to_pictures(pixels_BCSS),
            "visible": masked_pictures(pixels_BCSS, masked_BM, patch),
            "reconstruction": reconstructed_pictures(
                pixels_BCSS, masked_BM, patches_BMK, patch, norm_pixels=config.norm_pixels
            ),
        },
        captions={
            "caption": [caption for caption, _, _ in texts],
            "visible words": [visible for _, visible, _ in texts],
            "predicted words": [guess for _, _, guess in texts],
        },
    )
