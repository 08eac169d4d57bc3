"""One file a paper; each turns a batch into named losses, and reads like its paper."""

from training.data.tokenizer import Tokenizer
from training.methods.base import Batch, Method, MethodConfig, Output
from training.methods.clip import Clip, ClipConfig
from training.methods.rils import Rils, RilsConfig
from training.models.config import ModelConfig

METHODS: dict[str, type[Method]] = {method.name: method for method in (Clip, Rils)}
"""Every method by the name that a configuration gives."""

__all__ = [
    "METHODS",
    "Batch",
    "ClipConfig",
    "Method",
    "MethodConfig",
    "ModelConfig",
    "Output",
    "RilsConfig",
    "Tokenizer",
    "build_method",
]


def build_method(name: str, config: MethodConfig, model: ModelConfig, tokenizer: Tokenizer) -> Method:
    """Build a method with fresh weights, drawn from torch's default generator: seed it first, alike on every rank."""
    return METHODS[name](config, model, tokenizer)
