"""The caption decoder of MUG: layers over words alone, then layers that also look at the picture.

Legend: B batch, L tokens, T places that are asked for, V patches of the picture that are seen, D width, H heads,
K width of a head.
"""

from dataclasses import replace

import torch
from pydantic import model_validator
from torch import Tensor, nn

from cluster.config import key
from training.models.blocks import Attention, Blocks, attend, run
from training.models.config import Shape
from training.models.decoder import DecoderConfig


class CaptionDecoderConfig(DecoderConfig):
    """The shape of the caption decoder; the paper gives none."""

    depth: int = key(6, "layers", ge=1)
    text_depth: int = key(3, "how many of them, the first ones, see words alone; the others see the picture too", ge=0)
    heads: int = key(8, "attention heads", ge=1)

    @model_validator(mode="after")
    def _a_layer_sees(self) -> "CaptionDecoderConfig":
        if self.text_depth >= self.depth:
            raise ValueError(f"text_depth={self.text_depth}: has to leave one of depth={self.depth} layers that sees")
        return self


class CaptionDecoder(nn.Module):
    """From token ids and patches to scores of the vocabulary."""

    activation_checkpointing = False
    """As in `Blocks`, of the layers that see the picture. The engine sets it."""

    def __init__(
        self, config: CaptionDecoderConfig, *, picture_width: int, vocabulary_size: int, length: int, causal: bool
    ) -> None:
        """picture_width: of the patches. length: most tokens of a caption.

        causal: a token sees itself and what precedes; else all tokens, some of which are hidden behind a mask token.
        """
        super().__init__()
        shape = config.shape
        self.causal = causal
        self.tokens = nn.Embedding(vocabulary_size, shape.width)
        self.positions = nn.Parameter(torch.randn(length, shape.width) * 0.01)
        self.mask_token = None if causal else nn.Parameter(torch.randn(shape.width) * 0.02)
        self.text_layers = Blocks(replace(shape, depth=config.text_depth)) if config.text_depth else None
        depth = shape.depth - config.text_depth
        self.layers = nn.ModuleList(CrossBlock(shape, picture_width) for _ in range(depth))
        self.norm = nn.LayerNorm(shape.width)
        self.words = nn.Linear(shape.width, vocabulary_size, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.words.weight, std=shape.width**-0.5)
        for layer in self.layers:
            _shrink(layer, shape.width**-0.5 * (2 * shape.depth) ** -0.5)

    def forward(
        self,
        ids_BL: Tensor,
        picture_BVD: Tensor,
        *,
        at_BL: Tensor,
        keys_BL: Tensor | None = None,
        hidden_BL: Tensor | None = None,
    ) -> Tensor:
        """Return scores [T, vocabulary] at the T places where at_BL is True, row by row.

        keys_BL: True where a token is. hidden_BL: True where it is masked.
        """
        x_BLD = self.tokens(ids_BL)
        if hidden_BL is not None and self.mask_token is not None:
            x_BLD = torch.where(hidden_BL[..., None], self.mask_token.to(x_BLD.dtype), x_BLD)
        x_BLD = x_BLD + self.positions[: ids_BL.shape[1]]
        keys_BL = None if self.causal else keys_BL  # what is padding comes last: no token before it can see it
        if self.text_layers is not None:
            x_BLD = self.text_layers(x_BLD, causal=self.causal, keys_BL=keys_BL)
        for layer in self.layers:
            again = self.activation_checkpointing
            x_BLD = run(layer, x_BLD, picture_BVD, again=again, causal=self.causal, keys_BL=keys_BL)
        scores: Tensor = self.words(self.norm(x_BLD[at_BL]))
        return scores


class CrossBlock(nn.Module):
    """x + attention(norm(x)), then x + attention to the picture, then x + mlp(norm(x))."""

    def __init__(self, shape: Shape, picture_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(shape.width) for _ in range(3))
        self.attention = Attention(shape)
        self.cross = CrossAttention(shape, picture_width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, shape.mlp_width), nn.GELU(), nn.Linear(shape.mlp_width, shape.width)
        )

    def forward(
        self, x_BLD: Tensor, picture_BVD: Tensor, *, causal: bool = False, keys_BL: Tensor | None = None
    ) -> Tensor:
        """Return [B, L, D]; causal and keys_BL concern the tokens, every patch is seen."""
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), causal=causal, keys_BL=keys_BL)
        x_BLD = x_BLD + self.cross(self.norm2(x_BLD), picture_BVD)
        y_BLD: Tensor = x_BLD + self.mlp(self.norm3(x_BLD))
        return y_BLD


class CrossAttention(nn.Module):
    """Multi-head attention whose queries are words and whose keys and values are patches."""

    def __init__(self, shape: Shape, picture_width: int) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query = nn.Linear(shape.width, shape.width)
        self.key_value = nn.Linear(picture_width, 2 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x_BLD: Tensor, picture_BVD: Tensor) -> Tensor:
        """Return [B, L, D]."""
        q_BHLK = self.query(x_BLD).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k_BHVK, v_BHVK = self.key_value(picture_BVD).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y_BLD: Tensor = self.out(attend(q_BHLK, k_BHVK, v_BHVK).transpose(1, 2).flatten(2))
        return y_BLD


def _shrink(layer: nn.Module, branch_std: float) -> None:
    """Initialise as `Blocks` does: zero biases, small outputs of the residual branches."""
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith(("out.weight", "mlp.2.weight")):
            nn.init.normal_(parameter, std=branch_std)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
