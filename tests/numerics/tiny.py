"""The smallest run of every method: what its gradients are compared on. New methods join by being in METHODS."""

from typing import Any

import torch

from cluster.config import validate
from training.config import TrainConfig
from training.data.tokenizer import Tokenizer
from training.methods import METHODS, Batch, Method, build_method

BATCH_SIZE = 8
CAPTIONS = [
    "a red cat on a mat",
    "two dogs in the sun",
    "a green house",
    "cat",
    "three moons over a lake",
    "a blue disc and a ring",
    "noise",
    "a square and two bars",
]
CLASSES = ("animal", "building", "shape")
LABELS = [0, 0, 1, -1, -1, 2, -1, 2]
MODEL: dict[str, Any] = {
    "vision": {"width": 16, "depth": 2, "heads": 2, "image_size": 16, "patch_size": 4},
    "text": {"width": 16, "depth": 2, "heads": 2, "context_length": 16, "vocabulary": "compact"},
    "embed_dim": 8,
}

DECODER = {"width": 16, "depth": 2, "heads": 2}
PREDICTOR = {"width": 16, "depth": 1, "heads": 2}
TEXT_OF_MAE_CLIP = {"attention": "bidirectional", "pooling": "map"}

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "rils": [
        {"use_set_c": False},
        {"use_set_c": True},
        {"target": "prototypes", "num_prototypes": 12, "decoder_depth": 2, "use_set_c": False},
        {"target": "pixels"},
    ],
    "mae": [{"decoder": DECODER}, {"decoder": DECODER, "target": "features"}],
    "m3ae": [{"decoder": DECODER}, {"decoder": DECODER, "encoder": "separate"}],
    "mae_clip": [{"decoder": DECODER, "masking": "random"}, {"decoder": DECODER, "model": {"text": TEXT_OF_MAE_CLIP}}],
    "slip": [{"ssl_hidden": 32, "ssl_dim": 8}],
    "mug": [
        {"decoder": DECODER, "caption_decoder": {**DECODER, "text_depth": 1}},
        {"decoder": DECODER, "caption_decoder": {**DECODER, "text_depth": 1}, "captioning": "masked"},
    ],
    "m3i": [
        {"predictor": PREDICTOR},
        {"predictor": PREDICTOR, "form": "siamese_feature"},
    ],
}
"""Settings of a method to go through, by its name; one run with its defaults where nothing is said. Keys `model` and
`train` in a setting go there; all others are the method's own. `make test` tries the first one under every ZeRO stage
and the others under one each."""


def variants() -> list[str]:
    """Every case: "method" for its first setting, then "method/1" and so on."""
    names = []
    for method in METHODS:
        names += [f"{method}/{number}" if number else method for number in range(len(VARIANTS.get(method, [{}])))]
    return names


def make_config(variant: str, **loop: Any) -> TrainConfig:
    """The configuration of a variant in fp32; loop: keys of `train`."""
    name, _, number = variant.partition("/")
    setting = dict(VARIANTS.get(name, [{}])[int(number or 0)])
    model, train = setting.pop("model", {}), setting.pop("train", {})
    return validate(
        TrainConfig,
        {
            "data": {"dataset": "unused"},
            "output": "unused",
            "method": name,
            name: setting,
            "model": {part: {**value, **model.get(part, {})} if isinstance(value, dict) else value
                      for part, value in MODEL.items()},
            "train": {"batch_size": BATCH_SIZE, "precision": "fp32", **train, **loop},
            "optim": {"grad_clip": 0.0},
        },
    )  # fmt: skip


def make_method(config: TrainConfig) -> Method:
    """Equal weights in every process."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.build(CAPTIONS, context_length=16, vocabulary="compact")
    return build_method(config.method, config.method_config, config.model, tokenizer, CLASSES)


def make_batch(rank: int, num_ranks: int) -> Batch:
    """A rank's part of a fixed batch of two epochs, whose samples are at random places of the data."""
    generator = torch.Generator().manual_seed(19)  # some pictures, not all, are matched with their captions
    share = BATCH_SIZE // num_ranks
    rows = slice(rank * share, (rank + 1) * share)
    return Batch(
        images=torch.randint(0, 256, (BATCH_SIZE, 20, 20, 3), generator=generator).to(torch.uint8)[rows],
        captions=CAPTIONS[rows],
        sample_ids=(torch.arange(BATCH_SIZE) * 977 - 5)[rows],
        epoch=(torch.arange(BATCH_SIZE) // 5)[rows],
        step=3,
        seed=11,
        labels=torch.tensor(LABELS)[rows],
    )
