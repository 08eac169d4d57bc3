"""One file a paper; each turns a batch into named losses, and reads like its paper."""

from collections.abc import Sequence

from training.data.tokenizer import Tokenizer
from training.methods.base import Method, MethodConfig
from training.methods.clip import Clip, ClipConfig
from training.methods.m3ae import M3ae, M3aeConfig
from training.methods.m3i import M3i
from training.methods.m3i_forms import M3iConfig
from training.methods.mae import Mae, MaeConfig
from training.methods.mae_clip import MaeClip, MaeClipConfig
from training.methods.mug import Mug, MugConfig
from training.methods.rils import Rils, RilsConfig
from training.methods.siglip import Siglip, SiglipConfig
from training.methods.slip import Slip, SlipConfig
from training.methods.values import Batch, Embedded, Output, Shown, Sums
from training.models.config import ModelConfig

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Clip, Siglip, Rils, Mae, M3ae, MaeClip, Slip, Mug, M3i)
}
"""Every method by the name that a configuration gives."""

__all__ = [
    "METHODS",
    "Batch",
    "ClipConfig",
    "Embedded",
    "M3aeConfig",
    "M3iConfig",
    "MaeClipConfig",
    "MaeConfig",
    "Method",
    "MethodConfig",
    "ModelConfig",
    "MugConfig",
    "Output",
    "RilsConfig",
    "Shown",
    "SiglipConfig",
    "SlipConfig",
    "Sums",
    "Tokenizer",
    "build_method",
]


def build_method(
    name: str, config: MethodConfig, model: ModelConfig, tokenizer: Tokenizer, classes: Sequence[str] = ()
) -> Method:
    """Build a method with fresh weights, drawn from torch's default generator: seed it first, alike on every rank.

    classes: names of the data's categories.
    """
    return METHODS[name].build(config, model, tokenizer, classes)
