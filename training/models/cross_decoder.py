"""The cross-modality decoder of M3AE and MAE-CLIP: hidden patches and hidden words from what is visible of both.

Legend: B batch, N patches, L tokens of a caption, V visible ones, M masked ones, D width, K values of a patch,
T masked words of all captions, W vocabulary.
"""

import torch
from torch import Tensor, nn

from training.models.blocks import Blocks, take_tokens
from training.models.config import Shape
from training.models.decoder import put_back
from training.models.masking import PatchMask, TextMask
from training.models.positions import sincos_1d, sincos_2d


class CrossModalityDecoder(nn.Module):
    """One transformer over the tokens of both modalities (MAE-CLIP 3.3.1).

    Each modality enters by its own projection; hidden places hold its learned mask token; fixed positions and a learned
    modality embedding are added; hidden places leave by the modality's own head. Padding is never attended to.
    """

    image_positions: Tensor
    text_positions: Tensor

    def __init__(
        self,
        shape: Shape,
        *,
        image_width: int,
        text_width: int,
        grid: int,
        context_length: int,
        patch_values: int,
        vocabulary_size: int,
    ) -> None:
        """image_width, text_width: of the encoders. patch_values: K. shape: the decoder's own."""
        super().__init__()
        width = shape.width
        self.enter_image = nn.Linear(image_width, width)
        self.enter_text = nn.Linear(text_width, width)
        self.image_mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.text_mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.image_modality_token = nn.Parameter(torch.randn(width) * 0.02)
        self.text_modality_token = nn.Parameter(torch.randn(width) * 0.02)
        self.register_buffer("image_positions", sincos_2d(grid, width), persistent=False)
        self.register_buffer("text_positions", sincos_1d(context_length, width), persistent=False)
        self.blocks = Blocks(shape)
        self.norm = nn.LayerNorm(width)
        self.leave_image = nn.Linear(width, patch_values)
        self.leave_text = nn.Linear(width, vocabulary_size)
        for linear in (self.enter_image, self.enter_text, self.leave_image):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(self.leave_text.weight, std=0.02)
        for linear in (self.enter_image, self.enter_text, self.leave_image, self.leave_text):
            nn.init.zeros_(linear.bias)

    def forward(
        self, image_BVD: Tensor, patches: PatchMask, text_BVD: Tensor, words: TextMask, keys_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (masked patches [B, M, K], logits of masked words [T, W]), in the order of the masks; no fillers.

        image_BVD, text_BVD: the encoded visible tokens. keys_BL: True where the caption has a token.
        """
        image_BND = put_back(
            self.enter_image(image_BVD), patches.keep, self.image_mask_token, len(self.image_positions)
        )
        text_BLD = put_back(self.enter_text(text_BVD), words.keep, self.text_mask_token, keys_BL.shape[1])
        image_BND = image_BND + (self.image_positions + self.image_modality_token).to(image_BND.dtype)
        text_BLD = text_BLD + (self.text_positions[: keys_BL.shape[1]] + self.text_modality_token).to(text_BLD.dtype)
        num_patches = image_BND.shape[1]
        keys_BL = torch.cat([keys_BL.new_ones(len(keys_BL), num_patches), keys_BL], dim=1)
        y_BLD = self.norm(self.blocks(torch.cat([image_BND, text_BLD], dim=1), keys_BL=keys_BL))
        hidden_patches_BMD = take_tokens(y_BLD[:, :num_patches], patches.masked)
        hidden_words_TD = take_tokens(y_BLD[:, num_patches:], words.masked)[words.counted]
        return self.leave_image(hidden_patches_BMD), self.leave_text(hidden_words_TD)
