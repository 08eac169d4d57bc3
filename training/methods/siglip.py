"""SigLIP (Zhai et al. 2023): every pair of the global batch is a yes-or-no question of its own."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from cluster.config import key
from training.data.tokenizer import Tokenizer
from training.losses.distributed import Gathered, LossSum
from training.losses.siglip import sigmoid_pairs
from training.losses.similarity import scale
from training.methods.clip import Clip, ClipConfig
from training.methods.values import Embedded
from training.models.config import ModelConfig


class SiglipConfig(ClipConfig):
    """Keys of the sigmoid loss; the defaults are the paper's."""

    initial_scale: float = key(10.0, "t at the start of the run", gt=0, le=100)
    initial_bias: float = key(-10.0, "b at the start: about one pair in G matches, so begin by denying all")


class Siglip(Clip):
    """Sigmoid loss over all pairs, with learned temperature and bias."""

    name: ClassVar[str] = "siglip"
    config_type: ClassVar[type[SiglipConfig]] = SiglipConfig

    def __init__(self, config: SiglipConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, model, tokenizer)
        nn.init.constant_(self.towers.log_scale, math.log(config.initial_scale))
        self.bias = nn.Parameter(torch.tensor(config.initial_bias))

    def contrast(self, own: Embedded, everyone: Mapping[str, Gathered]) -> LossSum:
        """Ask of every picture here and every text whether they belong together (eq. 1)."""
        bias = self.bias.float().reshape(())  # [1] inside DeepSpeed
        return sigmoid_pairs(own.shared["image"], everyone["text"], scale(self.towers.log_scale), bias)
