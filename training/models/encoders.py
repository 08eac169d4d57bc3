"""The encoders of methods without a shared space, under the names that `Towers` has: weights move between methods by
name."""

from torch import nn

from training.models.image_encoder import ImageEncoder
from training.models.text import TextTransformer


class Encoders(nn.Module):
    """An image encoder and, where a method has one, a text encoder."""

    def __init__(self, image: ImageEncoder, text: TextTransformer | None = None) -> None:
        super().__init__()
        self.image = image
        if text is not None:
            self.text = text
