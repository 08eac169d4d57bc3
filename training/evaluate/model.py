"""A trained model from its checkpoint, and features of pictures and texts in batches."""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.config import validate
from cluster.errors import RequestError, RunError
from cluster.run import require_run
from cluster.store import Store
from training.checkpoint import (
    CLASSES_FILE,
    CONFIG_FILE,
    FOLDER,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    CheckpointInfo,
    first_damaged,
    local_copy,
    newest_valid,
    published,
    tag_of,
)
from training.config import TrainConfig
from training.data.tokenizer import Tokenizer
from training.methods import Method, build_method


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A method with the weights of one checkpoint, ready to encode."""

    method: Method
    config: TrainConfig
    run: Store
    step: int
    device: torch.device

    def encode_images(self, images_NSS3: Tensor, batch_size: int) -> Tensor:
        """Features [N, E] of uint8 pictures, float32 on the CPU, L2-normalised."""
        with torch.inference_mode(), self._autocast():
            encode = self.method.encode_image
            return torch.cat(
                [
                    encode(images_NSS3[first : first + batch_size].to(self.device)).float().cpu()
                    for first in range(0, len(images_NSS3), batch_size)
                ]
            )

    def encode_texts(self, texts: Sequence[str], batch_size: int) -> Tensor:
        """Features [N, E] of texts, float32 on the CPU, L2-normalised."""
        with torch.inference_mode(), self._autocast():
            return torch.cat(
                [
                    self.method.encode_text(texts[first : first + batch_size]).float().cpu()
                    for first in range(0, len(texts), batch_size)
                ]
            )

    def _autocast(self) -> AbstractContextManager[object]:
        """The arithmetic that the model was trained in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")


def load_model(checkpoint: str) -> TrainedModel:
    """Load a model from a train run (its newest valid checkpoint) or from one checkpoint folder of it.

    Raises RequestError when there is none, RunError when the one that was asked for is damaged.
    """
    store, info = find_checkpoint(checkpoint)
    try:
        return _read(store, info)
    except FileNotFoundError:  # the run goes on, and keeps its newest only
        raise RunError(f"{store.url_of(info.folder)}: removed while it was read; run the same command again") from None


def find_checkpoint(checkpoint: str) -> tuple[Store, CheckpointInfo]:
    """Return a run's folder and the checkpoint that `load_model` would load. Raises what that raises."""
    run_url, folder, tag = checkpoint.rstrip("/").rpartition(f"/{FOLDER}/step-")
    store, _ = require_run(run_url if folder else checkpoint, "train")
    info = _chosen(store, int(tag)) if folder and tag.isdigit() else newest_valid(store)
    if info is None:
        raise RequestError(f"checkpoint={checkpoint}: no valid checkpoint here; run the same `pairmill train` again")
    return store, info


def _read(store: Store, info: CheckpointInfo) -> TrainedModel:
    config = validate(TrainConfig, json.loads(store.read_bytes(f"{info.folder}/{CONFIG_FILE}")))
    tokenizer = Tokenizer.from_json(store.read_bytes(f"{info.folder}/{TOKENIZER_FILE}").decode())
    classes = tuple(json.loads(store.read_bytes(f"{info.folder}/{CLASSES_FILE}")))
    method = build_method(config.method, config.method_config, config.model, tokenizer, classes)
    with local_copy(store, f"{info.folder}/{WEIGHTS_FILE}") as path:
        method.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return TrainedModel(method=method.to(device).eval(), config=config, run=store, step=info.step, device=device)


def _chosen(store: Store, step: int) -> CheckpointInfo:
    for info in published(store):
        if info.step == step:
            if damaged := first_damaged(store, info):
                raise RunError(f"{store.url_of(damaged)}: missing, or its size or sha256 differs from the marker")
            return info
    steps = ", ".join(tag_of(info.step) for info in published(store)) or "none"
    raise RequestError(f"{store.url_of(FOLDER)}: no checkpoint {tag_of(step)}; there is {steps}")
