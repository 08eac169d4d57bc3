"""Models by name: `model=ViT-B-16`, `model.text=mae_clip`; single keys still override what a name stands for."""

import difflib
from collections.abc import Mapping
from typing import Any

from cluster.errors import RequestError

_CLIP = {"width": 512, "depth": 12, "heads": 8, "context_length": 77, "attention": "causal", "pooling": "end"}
# Sees the whole caption, so that masked words can be predicted from both sides.
_BIDIRECTIONAL = _CLIP | {"attention": "bidirectional", "pooling": "map"}

TEXTS: dict[str, dict[str, Any]] = {
    "clip": _CLIP,
    "slip": _CLIP,
    "rils": _CLIP,
    "mae_clip": _BIDIRECTIONAL,
    "m3i": _BIDIRECTIONAL | {"width": 768, "heads": 12},
}
"""Text encoders of the papers. RILS's is CLIP's: 37.8 M parameters in the blocks, 63.4 M in all; M3I's has the shape
of BERT-base."""


def _text(width: int, depth: int, heads: int) -> dict[str, Any]:
    return _CLIP | {"width": width, "depth": depth, "heads": heads}


_TOY_TEXT = {"width": 128, "depth": 1, "heads": 2, "context_length": 32, "vocabulary": "compact"}
_TEXT_BESIDE = {
    "Ti": _text(512, 12, 8),
    "S": _text(512, 12, 8),
    "B": _text(512, 12, 8),
    "L": _text(768, 12, 12),
    "H": _text(1024, 24, 16),
    "g": _text(1024, 24, 16),
    "G": _text(1280, 32, 20),
}
"""What open_clip (and SLIP, for S) puts beside an image encoder of a size."""


def _models() -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = {
        "nano": {
            "vision": {"size": "nano", "image_size": 64, "patch_size": 16, "stem": "conv"},
            "text": _TOY_TEXT,
            "embed_dim": 128,
        },
        "micro": {
            "vision": {"size": "micro", "image_size": 64, "patch_size": 8},
            "text": _TOY_TEXT | {"width": 256, "depth": 4, "heads": 4},
            "embed_dim": 256,
        },
        "internimage-nano": {
            "vision": {"size": "internimage-nano", "image_size": 64},
            "text": _TOY_TEXT,
            "embed_dim": 128,
        },
    }
    for size, text in _TEXT_BESIDE.items():
        for patch in (14, 16, 32):
            vision = {"size": size, "patch_size": patch, "image_size": 224}
            models[f"ViT-{size}-{patch}"] = {"vision": vision, "text": text, "embed_dim": text["width"]}
            as_clip = {"pooling": "class", "positions": "learned", "pre_norm": True}
            models[f"CLIP-{size}-{patch}"] = {"vision": vision | as_clip, "text": text, "embed_dim": text["width"]}
    for letter in ("T", "S", "B", "L", "XL", "H"):
        vision = {"size": f"internimage-{letter}", "image_size": 224}
        models[f"internimage-{letter}"] = {"vision": vision, "text": TEXTS["m3i"], "embed_dim": 768}
    return models


MODELS = _models()
"""ViT-*: MAE's positions, mean pooling. CLIP-*: name for name and feature for feature open_clip's ViT-*, but for S."""


def expand(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a model's keys, with those of its named preset and of its text encoder's beneath them."""
    preset = _find(MODELS, "model", values.get("preset"))
    text = values.get("text") or {}
    text_preset = _find(TEXTS, "model.text", text.get("preset")) if isinstance(text, Mapping) else {}
    result = {**preset, **values}
    for name, beneath in (("vision", preset.get("vision")), ("text", text_preset or preset.get("text"))):
        given = values.get(name) or {}
        if beneath and isinstance(given, Mapping):
            result[name] = {**beneath, **given}
    return result


def _find(known: dict[str, dict[str, Any]], where: str, name: Any) -> dict[str, Any]:
    if not name:
        return {}
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.3)
        raise RequestError(f"{where}={name}: no such preset; did you mean {', '.join(close or sorted(known))}?")
    return known[name]
