"""M3AE (Geng et al. 2022), a baseline of MAE-CLIP: hide most of the picture and of its caption, predict both.

Legend: B batch, C colours, S side, V visible patches or words, M masked ones, D width, K values of a patch,
T masked words of all captions, W vocabulary.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from cluster.config import key
from training.data.tokenizer import Tokenizer
from training.data.transforms import evaluation_view
from training.losses.distributed import Gathered
from training.losses.similarity import unit
from training.methods.base import CaptionNeed, Method, MethodConfig
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
from training.methods.views import Captions, captions_cut, crop, read_captions, refuse_trained_pooling
from training.models.config import ModelConfig
from training.models.decoder import DecoderConfig
from training.models.encoders import Encoders
from training.models.joint import Words
from training.models.text import TextTransformer
from training.models.vit import VisionTransformer
from training.schedule import Schedule


class M3aeConfig(GenerativeConfig):
    """Keys of M3AE."""

    encoder: Literal["joint", "separate"] = key(
        "joint", "one encoder that sees both, or one a modality (MAE-CLIP's baseline of equal cost)"
    )
    image_weight: Schedule = key(Schedule(value=1.0), "weight of eq. 3, the hidden patches")
    text_weight: Schedule = key(Schedule(value=0.1), "weight of eq. 4, the hidden words")
    decoder: DecoderConfig = key(DecoderConfig(width=512, depth=8, heads=16), "the decoder of both modalities")


class M3ae(Method):
    """The encoder sees a quarter of the patches and of the words; the decoder predicts the others."""

    name: ClassVar[str] = "m3ae"
    config_type: ClassVar[type[MethodConfig]] = M3aeConfig
    drops_patches: ClassVar[bool] = True

    def __init__(self, config: M3aeConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, model, tokenizer)
        self.config, self.tokenizer, self.vision = config, tokenizer, model.vision
        image = VisionTransformer(model.vision)
        vocabulary_size, end_of_text_id = tokenizer.vocabulary_size, tokenizer.end_of_text_id
        if config.encoder == "joint":
            width = model.vision.shape.width
            self.towers = Encoders(image)
            self.words = Words(width, vocabulary_size=vocabulary_size, context_length=tokenizer.context_length)
        else:
            width = model.text.width
            text = TextTransformer(model.text, vocabulary_size=vocabulary_size, end_of_text_id=end_of_text_id)
            self.towers = Encoders(image, text)
        self.decoder = build_decoder(config.decoder, model, tokenizer, text_width=width)

    @classmethod
    def check(cls, config: Any, model: ModelConfig, *, part_size: int, has_labels: bool) -> None:
        """Refuse poolings with weights, which nothing would train."""
        refuse_trained_pooling(cls.name, model.vision, "model.vision")
        if config.encoder == "separate":
            refuse_trained_pooling(cls.name, model.text, "model.text")

    @classmethod
    def needs_captions(cls, config: Any) -> CaptionNeed:
        """One that is missing has no hidden words."""
        return "some"

    def losses(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> Sums:
        """Return the errors of hidden patches and of hidden words."""
        pixels_BCSS = crop(batch, self.config, self.vision.image_size)
        captions, hidden = self.hide(batch)
        predicted = self.predict(pixels_BCSS, captions, hidden)
        return Sums(
            losses=generative_losses(self.config, predicted, hidden, pixels_BCSS, captions, self.vision.patch_size),
            metrics={"captions_cut": captions_cut(self.tokenizer, batch)},
        )

    def counts(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> dict[str, Tensor]:
        """One term a hidden patch, one a hidden word."""
        return generative_counts(self.config, batch, self.tokenizer, self.vision.num_patches)

    def weights(self, step: int) -> dict[str, float]:
        """Return the weights of both losses."""
        return {"image": self.config.image_weight.at(step), "text": self.config.text_weight.at(step)}

    def hide(self, batch: Batch) -> tuple[Captions, Hidden]:
        """Return the words and what is hidden."""
        captions = read_captions(self.tokenizer, batch.captions, batch.images.device)
        return captions, hide_at_random(self.config, batch, captions, self.vision.num_patches)

    def predict(self, pixels_BCSS: Tensor, captions: Captions, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Return hidden patches [B, M, K] and scores of hidden words [T, W] from what is visible."""
        image, keep_BV = self.towers.image, hidden.patches.keep
        if self.config.encoder == "joint":
            words_BVD = self.words(captions.ids, hidden.words)
            tokens_BLD = image(pixels_BCSS, keep_BV, beside=(words_BVD, hidden.words.seen))
            num_words = words_BVD.shape[1]
            image_BVD, text_BVD = image.patches(tokens_BLD[:, :-num_words]), tokens_BLD[:, -num_words:]
        else:
            image_BVD = image.patches(image(pixels_BCSS, keep_BV))
            text_BVD = self.towers.text(captions.ids, hidden.words)
        decoded: tuple[Tensor, Tensor] = self.decoder(image_BVD, hidden.patches, text_BVD, hidden.words, captions.keys)
        return decoded

    def encode_image(self, images_BHWC: Tensor) -> Tensor:
        """Return L2-normalised float32 [B, D]: the pooled patches of the whole picture without words, for probes."""
        image = self.towers.image
        return unit(image.pool(image(evaluation_view(images_BHWC, self.vision.image_size))))

    def show(self, batch: Batch) -> Shown | None:
        """Return crops and captions, what is visible of them, and what is predicted."""
        pixels_BCSS = crop(batch, self.config, self.vision.image_size)
        captions, hidden = self.hide(batch)
        predicted = self.predict(pixels_BCSS, captions, hidden)
        return show_hidden(self.config, predicted, hidden, pixels_BCSS, captions, self.tokenizer, self.vision)
