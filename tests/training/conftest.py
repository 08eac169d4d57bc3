"""A small real dataset in the published form, written through the manifest's own schema."""

import copy
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch
import yaml

from cluster.config import parse
from pipeline.manifest import FORMAT_VERSION, MANIFEST_FILE, FileInfo, Manifest, Shard
from training.command import TrainResult, run_train
from training.config import TrainConfig
from training.launch import single_group

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220), "yellow": (230, 220, 40)}
SHAPES = ("disc", "square", "bar", "ring")
STYLES = ("plain", "noisy", "held-out")

DatasetMaker = Callable[..., Path]


def draw(colour: str, shape: str, style: str, rng: np.random.Generator, side: int) -> np.ndarray[Any, Any]:
    """A picture that shows its caption, at a random place and size."""
    image = np.full((side, side, 3), 245, np.uint8)
    radius = int(rng.integers(side // 5, side // 3))
    x, y = (int(v) for v in rng.integers(radius, side - radius, 2))
    fill = COLOURS[colour]
    if shape == "disc":
        cv2.circle(image, (x, y), radius, fill, -1)
    elif shape == "ring":
        cv2.circle(image, (x, y), radius, fill, max(2, radius // 3))
    elif shape == "square":
        cv2.rectangle(image, (x - radius, y - radius), (x + radius, y + radius), fill, -1)
    else:
        cv2.rectangle(image, (x - radius, y - radius // 3), (x + radius, y + radius // 3), fill, -1)
    if style != "plain":
        noise = rng.normal(0, 12 if style == "noisy" else 20, image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return image


def write_dataset(folder: Path, num_samples: int = 96, shard_size: int = 40, side: int = 40) -> Path:
    """Write manifest.json and shards below `folder`; columns beside the standard ones: concept, style, number."""
    rng = np.random.default_rng(0)
    concepts = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    rows = []
    for number in range(num_samples):
        colour, shape = concepts[number % len(concepts)]
        style = STYLES[(number // len(concepts)) % len(STYLES)]
        pixels = draw(colour, shape, style, rng, side)
        data = simplejpeg.encode_jpeg(pixels, quality=90)
        uid = hashlib.sha256(f"{number}".encode()).hexdigest()[:32]
        rows.append((uid, f"a {colour} {shape}", f"{colour} {shape}", style, number, data))
    shards = [
        _write_shard(folder, index, rows[first : first + shard_size], side)
        for index, first in enumerate(range(0, num_samples, shard_size))
    ]
    schema = pq.read_schema(folder / shards[0].parquet.path)
    manifest = Manifest(
        version=FORMAT_VERSION,
        num_input_rows=num_samples,
        num_samples=num_samples,
        counts={"kept": num_samples},
        shards=tuple(shards),
        columns={field.name: str(field.type) for field in schema},
        config={},
        sources=(),
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.to_json())
    return folder


def _write_shard(folder: Path, index: int, rows: list[Any], side: int) -> Shard:
    tar_path, parquet_path = f"shards/{index:05}.tar", f"shards/{index:05}.parquet"
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    table: list[dict[str, Any]] = []
    with tarfile.open(folder / tar_path, "w") as tar:
        for place, (uid, caption, concept, style, number, data) in enumerate(rows):
            key = f"{index:05}{place:04}"
            image_offset = _add(tar, f"{key}.jpg", data)
            caption_offset = _add(tar, f"{key}.txt", caption.encode())
            _add(tar, f"{key}.json", json.dumps({"uid": uid}).encode())
            table.append(
                {
                    "key": key,
                    "uid": uid,
                    "url": f"http://127.0.0.1/{number}.jpg",
                    "caption": caption,
                    "width": np.int32(side),
                    "height": np.int32(side),
                    "original_width": np.int32(side),
                    "original_height": np.int32(side),
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "image_format": "jpg",
                    "image_offset": image_offset,
                    "image_size": len(data),
                    "caption_offset": caption_offset,
                    "caption_size": len(caption.encode()),
                    "concept": concept,
                    "style": style,
                    "number": number,
                }
            )
    pq.write_table(pa.Table.from_pylist(table), folder / parquet_path)
    tar_info, parquet_info = (_info(folder, path) for path in (tar_path, parquet_path))
    return Shard(index=index, num_samples=len(rows), tar=tar_info, parquet=parquet_info)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member and return where its data begins."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return start


def _info(folder: Path, path: str) -> FileInfo:
    data = (folder / path).read_bytes()
    return FileInfo(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


@pytest.fixture
def make_dataset(tmp_path: Path) -> DatasetMaker:
    def make(name: str = "data", **options: Any) -> Path:
        return write_dataset(tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 pairs in three shards, 16 concepts in three styles; read only."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture(autouse=True)
def _torchs_own_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 exchanges them for its own, for good: the tests after one would round otherwise than those before it."""
    monkeypatch.setattr("torch.nn.functional.linear", torch.nn.functional.linear)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """A process group of this process alone. One for all tests: DeepSpeed cannot change groups in a process."""
    with single_group():
        yield


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """Runs a Python command line as two gloo ranks and waits for both; any failure fails the test."""

    def run(words: list[str], timeout_s: float = 120) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, *words], env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank in range(2)
        ]
        try:
            assert [rank.wait(timeout_s) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()

    return run


@pytest.fixture(scope="session")
def tiny_settings(dataset: Path) -> dict[str, Any]:
    """Settings of a model that trains in a second: 64 samples, batch 16, bf16, one rank in this process."""
    return {
        "data": {"dataset": str(dataset), "select": ["style!=held-out"]},
        "model": {
            "embed_dim": 32,
            "vision": {"width": 48, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8},
            "text": {"width": 48, "depth": 2, "heads": 2, "context_length": 16, "vocabulary": "compact"},
        },
        "train": {"batch_size": 16, "num_steps": 9, "num_threads": 1},
        "optim": {"lr": 2e-3, "warmup_steps": 2},
        "checkpoint": {"every_steps": 3},
        "log": {"every_steps": 1},
        "ray": {"address": "inline"},
    }


@pytest.fixture(scope="session")
def write_config(tiny_settings: dict[str, Any]) -> Callable[..., Path]:
    """Writes the tiny settings, with changes by dotted key, as a YAML file."""

    def write(path: Path, **changes: Any) -> Path:
        settings = copy.deepcopy(tiny_settings)
        path.write_text(yaml.safe_dump(settings | {name.replace("__", "."): value for name, value in changes.items()}))
        return path

    return write


@pytest.fixture(scope="session")
def train_tiny(
    write_config: Callable[..., Path], one_rank: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TrainResult]:
    """Runs `pairmill train` in this process on the tiny settings; words are dotted overrides."""

    def train(output: Path | str, *words: str) -> TrainResult:
        file = write_config(tmp_path_factory.mktemp("config") / "tiny.yaml")
        return run_train(parse(TrainConfig, [str(file), f"output={output}", *words]))

    return train


@pytest.fixture(scope="session")
def finished_run(train_tiny: Callable[..., TrainResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of nine steps with all its checkpoints; read only."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train_tiny(folder, "checkpoint.keep=9")
    return folder
