"""Models that need torch, as the curation of a dataset asks them: by import path, with nothing of the pipeline.

Each is built with its parameters and `threads`, and has `embed(images)`, some also `embed_texts(captions)`; `identity`
says before any work whether the parameters can be used, and identifies the outputs; `has_texts`, whether this one can
compare with texts. Images are uint8 [H, W, 3], red
green blue, of any size.

Legend: N images of a batch, D dimension of an embedding, S side of a picture.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cluster.config import validate
from cluster.errors import RequestError, RunError
from cluster.journal import file_sha256
from training.checkpoint import CLASSES_FILE, CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from training.config import TrainConfig
from training.data.image import to_square
from training.evaluate.model import find_checkpoint, load_model
from training.methods import METHODS
from training.models.timm_encoder import declare_missing_operators, import_timm

Pictures = Sequence[NDArray[np.uint8]]
Features = NDArray[np.float32]
LOCAL_FOLDER, HUB = "local-dir:", "hf-hub:"


class CheckpointModel:
    """The newest valid checkpoint of a training run (or RUN/checkpoints/step-...), in the arithmetic of its training.

    Pictures are cut to their largest centred square and resized, as training does for evaluation.
    """

    def __init__(self, *, threads: int, run: str) -> None:
        torch.set_num_threads(threads)
        self._model = load_model(run)
        self._side = self._model.config.image_size
        self.dimension = len(self.embed([np.zeros((self._side, self._side, 3), np.uint8)])[0])

    @classmethod
    def identity(cls, *, run: str) -> str:
        """The hashes of what the checkpoint's outputs are made of; where it lies does not matter."""
        try:
            _, info = find_checkpoint(run)
        except RunError as error:
            raise RequestError(str(error)) from error
        wanted = (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE, CLASSES_FILE)
        hashes = {Path(file.path).name: file.sha256 for file in info.files if Path(file.path).name in wanted}
        return json.dumps(hashes, sort_keys=True)

    @classmethod
    def has_texts(cls, *, run: str) -> bool:
        """Return whether the method trains text features, which `embed_texts` needs."""
        store, info = find_checkpoint(run)
        config = validate(TrainConfig, json.loads(store.read_bytes(f"{info.folder}/{CONFIG_FILE}")))
        return METHODS[config.method].has_text_features(config.method_config)

    def embed(self, images: Pictures) -> Features:
        """Return [N, D]."""
        pictures_NSS3 = torch.from_numpy(np.stack([to_square(image, self._side) for image in images]))
        return _numpy(self._model.encode_images(pictures_NSS3, len(images)))

    def embed_texts(self, captions: Sequence[str]) -> Features:
        """Return [N, D]."""
        return _numpy(self._model.encode_texts(captions, len(captions)))


class OpenClipModel:
    """A model of open_clip with its own preprocessing: NAME and a file of weights, or a name that brings its weights
    (local-dir:FOLDER, hf-hub:...)."""

    def __init__(self, *, threads: int, name: str, weights: str | None = None) -> None:
        open_clip = _import_open_clip()
        torch.set_num_threads(threads)
        model, _, self._prepare = open_clip.create_model_and_transforms(name, pretrained=weights)
        self._model: Any = model.eval()
        self._tokenize = open_clip.get_tokenizer(name)
        self.dimension = self.embed([np.zeros((8, 8, 3), np.uint8)]).shape[1]

    @classmethod
    def identity(cls, *, name: str, weights: str | None = None) -> str:
        open_clip = _import_open_clip()
        if not name.startswith((LOCAL_FOLDER, HUB)) and name not in open_clip.list_models():
            raise RequestError(f"open_clip has no model {name}; see open_clip.list_models()")
        return _identity_of_weights("open_clip", open_clip.__version__, name, weights)

    def embed(self, images: Pictures) -> Features:
        """Return [N, D]."""
        with torch.inference_mode():
            return _numpy(self._model.encode_image(_stack(self._prepare, images)))

    def embed_texts(self, captions: Sequence[str]) -> Features:
        """Return [N, D]."""
        with torch.inference_mode():
            return _numpy(self._model.encode_text(self._tokenize(list(captions))))


class TimmModel:
    """A model of timm without its classifier, with the preprocessing that its configuration names."""

    def __init__(self, *, threads: int, name: str, weights: str | None = None) -> None:
        timm = import_timm()
        data: Any = importlib.import_module("timm.data")  # not all of it is typed
        torch.set_num_threads(threads)
        file = {"file": weights} if weights else None  # its loader leaves the classifier out
        model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=file)
        self._model = model.eval()
        self._prepare = data.create_transform(**data.resolve_data_config(model=model))
        self.dimension = self.embed([np.zeros((8, 8, 3), np.uint8)]).shape[1]

    @classmethod
    def identity(cls, *, name: str, weights: str | None = None) -> str:
        timm = import_timm()
        if not name.startswith((LOCAL_FOLDER, HUB)) and not timm.is_model(name):
            raise RequestError(f"timm has no model {name}; see timm.list_models()")
        return _identity_of_weights("timm", timm.__version__, name, weights)

    def embed(self, images: Pictures) -> Features:
        """Return [N, D]."""
        with torch.inference_mode():
            return _numpy(self._model(_stack(self._prepare, images)).flatten(1))


def _import_open_clip() -> Any:
    declare_missing_operators()  # it imports torchvision
    return importlib.import_module("open_clip")


def _identity_of_weights(library: str, version: str, name: str, weights: str | None) -> str:
    """Raises RequestError where there are no weights: what a fresh network says means nothing."""
    if weights is not None:
        if not Path(weights).is_file():
            raise RequestError(f"{weights}: no such file of weights")
        return json.dumps([library, version, name, file_sha256(Path(weights))])
    if name.startswith(LOCAL_FOLDER):
        folder = Path(name.removeprefix(LOCAL_FOLDER))
        files = sorted(path for path in folder.glob("*") if path.is_file())
        if not files:
            raise RequestError(f"{folder}: no such folder, or it holds no file")
        digests = "".join(file_sha256(path) for path in files)
        return json.dumps([library, version, hashlib.sha256(digests.encode()).hexdigest()])
    if name.startswith(HUB):
        return json.dumps([library, version, name])
    raise RequestError(f"without weights its outputs mean nothing; give {library}:{name}:FILE")


def _stack(prepare: Callable[[Image.Image], Tensor], images: Pictures) -> Tensor:
    return torch.stack([prepare(Image.fromarray(image)) for image in images])


def _numpy(features_ND: Tensor) -> Features:
    return np.asarray(features_ND.float().cpu().numpy(), np.float32)
