"""Any image model of the timm library as an image encoder.

Legend: B batch, C colours, S side of the picture, N cells of the last map or patches, L tokens, D width.
"""

import difflib
import importlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import RequestError
from training.models.config import VisionConfig
from training.models.image_encoder import ImageEncoder, refuse_keep


class TimmEncoder(ImageEncoder):
    """A timm model without its classifier: tokens are its last map or its token row, the feature its own pooling's.

    Batch normalisation, where a model has it, works on a rank's samples alone: such a model's results depend on the
    number of ranks.
    """

    drops_patches = False

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.name = config.timm
        self._checkpoints = False
        self.model: Any = create(config.timm, config.image_size)
        # Called as a module, not by method: ZeRO-3 fetches the parameters that a model itself holds at its call.
        self.model.forward = self.model.forward_features
        self.width = int(self.model.num_features)
        self.pooled_width = int(getattr(self.model, "head_hidden_size", self.width))
        self.num_prefix_tokens = int(getattr(self.model, "num_prefix_tokens", 0))
        shape = self._shape_of_features(config.image_size)
        self.channels_first = len(shape) == 4 and shape[1] == self.width
        self.num_dimensions = len(shape)
        num_cells = math.prod(shape[1:]) // self.width - self.num_prefix_tokens
        self.grid = math.isqrt(num_cells)
        self.side_is_known = self.grid**2 == num_cells

    @property
    def activation_checkpointing(self) -> bool:
        """Whether the model computes activations again in the backward pass. Set: RequestError if it cannot."""
        return self._checkpoints

    @activation_checkpointing.setter
    def activation_checkpointing(self, enabled: bool) -> None:
        if enabled == self._checkpoints:
            return
        try:
            self.model.set_grad_checkpointing(enabled)
        except (AttributeError, AssertionError) as error:
            raise RequestError(f"train.activation_checkpointing=true: timm's {self.name} cannot do that") from error
        self._checkpoints = enabled

    def forward(self, pixels_BCSS: Tensor, keep_BV: Tensor | None = None) -> Tensor:
        """Return tokens [B, L, D]: what stands before the patches in the model, if anything, then the patches."""
        refuse_keep(self.name, keep_BV)
        x: Tensor = self.model(pixels_BCSS.to(next(self.model.parameters()).dtype))
        if self.num_dimensions == 3:
            return x
        return (x.movedim(1, -1) if self.channels_first else x).flatten(1, 2)

    def patches(self, tokens_BLD: Tensor) -> Tensor:
        """Return the patches [B, N, D]; ValueError for a model that has no square map of them."""
        if not self.side_is_known:
            raise ValueError(f"{self.name} has no square map of patches")
        return tokens_BLD[:, self.num_prefix_tokens :]

    def pool(self, tokens_BLD: Tensor) -> Tensor:
        """Return the model's own feature, [B, pooled_width]."""
        x = tokens_BLD
        if self.num_dimensions == 4:
            x = tokens_BLD.reshape(len(tokens_BLD), self.grid, self.grid, self.width)
            x = x.movedim(-1, 1) if self.channels_first else x
        feature_BD: Tensor = self.model.forward_head(x, pre_logits=True)
        return feature_BD

    @torch.no_grad()
    def _shape_of_features(self, image_size: int) -> torch.Size:
        was_training = self.model.training
        self.model.eval()  # batch normalisation must not count this picture
        like = next(self.model.parameters())
        shape: torch.Size = self.model(like.new_zeros(1, 3, image_size, image_size)).shape
        self.model.train(was_training)
        return shape


def create(name: str, image_size: int, **settings: Any) -> Any:
    """Build a timm model with fresh weights and without classifier. Raises RequestError when it cannot be had."""
    timm = import_timm()
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3)) or "see timm.list_models()"
        raise RequestError(f"model.vision.timm={name}: timm {timm.__version__} has no such model; near: {close}")
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    size = {"img_size": image_size} if fixed else {}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **size, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise RequestError(f"model.vision.timm={name}: not to be built for {image_size} px: {error}") from error
    return model


def classifier_prefixes(name: str) -> tuple[str, ...]:
    """Return what the names of a model's classifier begin with, which `create` leaves out."""
    named = import_timm().get_pretrained_cfg(name).classifier or ()
    return tuple(f"{part}." for part in ([named] if isinstance(named, str) else named))


def import_timm() -> Any:
    """Import timm. Raises RequestError that says how to install it."""
    try:
        declare_missing_operators()
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        raise RequestError(
            f"timm cannot be imported ({' '.join(str(error).split())}); pip install 'pairmill[timm]', with the "
            f"torchvision that belongs to torch {torch.__version__.partition('+')[0]}"
        ) from error


def declare_missing_operators() -> None:
    """Make `import torchvision`, which timm needs, work beside a CPU build of torch.

    torchvision on PyPI is compiled for CUDA. Its operators do not load then, and its import ends at the two that it
    describes in Python without looking whether they are there. Nothing that we use needs them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to load image Python extension")
        for name in ("nms", "qnms"):
            try:
                importlib.import_module("torchvision")
                return
            except RuntimeError as error:
                if f"torchvision::{name} does not exist" not in str(error):
                    raise
                signature = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                _DECLARED.define(signature)  # type: ignore[no-untyped-call]
        importlib.import_module("torchvision")


_DECLARED = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
