"""Any ONNX file that looks at images, on onnxruntime's processor backend."""

import json
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from cluster.errors import RequestError
from pipeline.models.protocol import Embeddings, Image, Scores
from pipeline.models.spec import file_identity

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class OnnxModel:
    """A network with one input of images, [N, 3, S, S] or [N, S, S, 3], found by its shape.

    file: local path. size: side S; None: as the file says, else 224. mean, std: of each colour as a part of 255, in
    the order of `colours`. fit: crop takes the largest centred square, squash changes the proportions.
    output: number of the network's output that is used. column: which of its values is the score.
    softmax: the output is logits, the score a probability.
    """

    def __init__(
        self,
        *,
        threads: int,
        file: str,
        size: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        colours: Literal["rgb", "bgr"] = "rgb",
        fit: Literal["crop", "squash"] = "crop",
        output: int = 0,
        column: int | None = None,
        softmax: bool = False,
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        node = self._session.get_inputs()[0]
        self._input, self._output = node.name, self._session.get_outputs()[output].name
        self._channels_first, self.size = _layout(node.shape, size)
        self._mean, self._std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        self._colours, self._fit, self._column, self._softmax = colours, fit, column, softmax
        self.dimension = self._run([np.zeros((self.size, self.size, 3), np.uint8)]).shape[1]

    @classmethod
    def identity(cls, *, file: str, **parameters: Any) -> str:
        """The file's hash and the other parameters; where the file lies does not matter."""
        for name, allowed in (("colours", ("rgb", "bgr")), ("fit", ("crop", "squash"))):
            if parameters.get(name, allowed[0]) not in allowed:
                raise RequestError(f"{name}={parameters[name]}: give one of {', '.join(allowed)}")
        for name in ("mean", "std"):
            if name in parameters and np.shape(parameters[name]) != (3,):
                raise RequestError(f"{name}={parameters[name]}: give three numbers")
        return json.dumps([file_identity(file), parameters], sort_keys=True)

    def embed(self, images: Sequence[Image]) -> Embeddings:
        return self._run(images)

    def score(self, images: Sequence[Image], captions: Sequence[str]) -> Scores:
        values = self._run(images)
        if self._column is None and values.shape[1] > 1:
            raise ValueError(f"the network has {values.shape[1]} outputs; say by `column` which is the score")
        if self._softmax:
            values = np.exp(values - values.max(axis=1, keepdims=True))
            values /= values.sum(axis=1, keepdims=True)
        return values[:, self._column or 0]

    def _run(self, images: Sequence[Image]) -> NDArray[np.float32]:
        pixels = np.stack([fitted(image, self.size, self._fit) for image in images])
        if self._colours == "bgr":
            pixels = pixels[..., ::-1]
        batch = (pixels.astype(np.float32) / 255 - self._mean) / self._std
        if self._channels_first:
            batch = batch.transpose(0, 3, 1, 2)
        values = self._session.run([self._output], {self._input: np.ascontiguousarray(batch)})[0]
        return np.asarray(values, np.float32).reshape(len(images), -1)


def _layout(shape: Sequence[Any], size: int | None) -> tuple[bool, int]:
    """(whether colours come before rows, the side) of an input's shape."""
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        raise ValueError(f"the network's input is {list(shape)}; it has to be [N, 3, S, S] or [N, S, S, 3]")
    channels_first = shape[1] == 3
    side = shape[2]
    if isinstance(side, int) and size is not None and side != size:
        raise ValueError(f"size={size}: the network takes {side}")
    return channels_first, side if isinstance(side, int) else size or 224


def fitted(image: Image, side: int, fit: Literal["crop", "squash"] = "crop") -> Image:
    """The image as a square of this side."""
    height, width = image.shape[:2]
    if fit == "crop":
        square = min(height, width)
        top, left = (height - square) // 2, (width - square) // 2
        image = image[top : top + square, left : left + square]
    if image.shape[:2] == (side, side):
        return image
    interpolation = cv2.INTER_AREA if min(image.shape[:2]) > side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (side, side), interpolation=interpolation), np.uint8)
