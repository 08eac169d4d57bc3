"""`pairmill export`: a trained model as another library reads it.

timm          config.json, model.safetensors            timm.create_model("local-dir:OUT", pretrained=True)
open_clip     open_clip_config.json, open_clip_model.safetensors   open_clip.create_model("local-dir:OUT")
huggingface   config.json, preprocessor_config.json, model.safetensors   CLIPModel.from_pretrained("OUT")
mae           mae.pth, {"model": weights}               what MAE's own scripts start from
pairmill      config.json, tokenizer.json, model.safetensors with our names: every backbone and method
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cluster.config import REQUIRED, Config, key, validate
from cluster.errors import RequestError
from cluster.run import open_store
from cluster.store import Store
from training.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, local_copy
from training.config import TrainConfig
from training.data.tokenizer import Tokenizer
from training.evaluate.model import find_checkpoint
from training.initial import by_part, parts_of
from training.models.config import ModelConfig
from training.weights import settings
from training.weights.convert import Weights, to_theirs
from training.weights.names import Dialect

HINTS: dict[Dialect, str] = {
    "timm": 'timm.create_model("local-dir:{out}", pretrained=True)',
    "open_clip": 'open_clip.create_model("local-dir:{out}")',
    "huggingface": 'transformers.CLIPModel.from_pretrained("{out}"), with the tokenizer of any OpenAI CLIP model',
    "mae": 'torch.load("{out}/mae.pth")["model"]',
    "pairmill": "pairmill train ... init.weights={out}",
}


class ExportConfig(Config):
    """Settings of `pairmill export`."""

    checkpoint: str = key(REQUIRED, "output folder of a train run: its newest checkpoint; or RUN/checkpoints/step-...")
    format: Dialect = key(REQUIRED, "who is to read it")
    output: str = key(REQUIRED, "new or empty folder or URL", affects_result=False)


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    store: Store
    num_tensors: int
    num_parameters: int
    step: int
    hint: str


def run_export(config: ExportConfig) -> Export:
    """Write the folder. Raises RequestError when there is nothing to export or the format cannot hold it."""
    target = open_store(config.output)
    if target.find():
        raise RequestError(f"output={config.output}: is not empty; choose a new folder")
    run, info = find_checkpoint(config.checkpoint)
    trained = validate(TrainConfig, json.loads(run.read_bytes(f"{info.folder}/{CONFIG_FILE}")))
    stored_tokenizer = run.read_bytes(f"{info.folder}/{TOKENIZER_FILE}")
    with local_copy(run, f"{info.folder}/{WEIGHTS_FILE}") as path:
        weights = by_part(torch.load(path, map_location="cpu", weights_only=True))
    settings.check(config.format, trained.model, parts_of(weights))
    theirs = _convert(config.format, weights, trained.model, Tokenizer.from_json(stored_tokenizer.decode()))
    for name, data in _files(config.format, weights, trained, stored_tokenizer).items():
        target.write_bytes(name, data)
    _write_weights(config.format, target, theirs)
    return Export(
        store=target,
        num_tensors=len(theirs),
        num_parameters=sum(value.numel() for value in theirs.values()),
        step=info.step,
        hint=HINTS[config.format].format(out=target.url),
    )


def _convert(dialect: Dialect, weights: Weights, model: ModelConfig, tokenizer: Tokenizer) -> Weights:
    if dialect == "timm" and model.vision.kind == "timm":
        inner = "image.model."
        return {name.removeprefix(inner): value for name, value in weights.items() if name.startswith(inner)}
    return to_theirs(dialect, weights, model, tokenizer)


def _files(dialect: Dialect, weights: Weights, config: TrainConfig, tokenizer: bytes) -> dict[str, bytes]:
    """The small files beside the weights."""
    model = config.model
    if dialect == "timm":
        return {"config.json": _json(settings.timm(model))}
    if dialect == "open_clip":
        return {"open_clip_config.json": _json(settings.open_clip(model))}
    if dialect == "huggingface":
        return {
            "config.json": _json(settings.huggingface(model, float(weights["log_scale"]))),
            "preprocessor_config.json": _json(settings.huggingface_preprocessor(model)),
        }
    if dialect == "pairmill":
        return {"config.json": config.model_dump_json(indent=1).encode(), "tokenizer.json": tokenizer}
    return {}


def _write_weights(dialect: Dialect, target: Store, theirs: dict[str, Tensor]) -> None:
    if dialect == "mae":
        buffer = io.BytesIO()
        torch.save({"model": theirs}, buffer)
        target.write_bytes("mae.pth", buffer.getvalue())
        return
    from safetensors.torch import save_file

    name = "open_clip_model.safetensors" if dialect == "open_clip" else "model.safetensors"
    with TemporaryDirectory(prefix="pairmill-") as folder:
        whole = {name: value.contiguous() for name, value in theirs.items()}
        save_file(whole, Path(folder) / name, metadata={"format": "pt"})
        target.put_file(Path(folder) / name, name)


def _json(plain: Any) -> bytes:
    return json.dumps(plain, indent=1).encode()
