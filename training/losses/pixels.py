"""Reconstruction of masked patches in pixels: MAE's loss, eq. 3 of MAE-CLIP.

Legend: B pictures of this rank, C colours, S side, P side of a patch, N patches, M masked ones, K = P * P * C.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from training.losses.distributed import LossSum

_EPS = 1e-6
"""Added to a patch's variance, as in MAE: a flat patch has none."""


def patchify(pixels_BCSS: Tensor, patch_size: int) -> Tensor:
    """Return [B, N, K]: the pixels of each patch in row-major order, colours fastest."""
    x_BKN = functional.unfold(pixels_BCSS, patch_size, stride=patch_size)
    batch, _, num_patches = x_BKN.shape
    return x_BKN.view(batch, -1, patch_size**2, num_patches).permute(0, 3, 2, 1).flatten(2)


def unpatchify(patches_BNK: Tensor, patch_size: int) -> Tensor:
    """Return [B, C, S, S]: the inverse of `patchify`."""
    batch, num_patches, _ = patches_BNK.shape
    x_BKN = patches_BNK.reshape(batch, num_patches, patch_size**2, -1).permute(0, 3, 2, 1).flatten(1, 2)
    return functional.fold(x_BKN, math.isqrt(num_patches) * patch_size, patch_size, stride=patch_size)


def normalised_patches(patches_BNK: Tensor) -> Tensor:
    """Return each patch with its own mean 0 and (unbiased) variance 1, float32: MAE's `norm_pix` targets."""
    x_BNK = patches_BNK.float()
    mean_BN1, variance_BN1 = x_BNK.mean(-1, keepdim=True), x_BNK.var(-1, keepdim=True)
    return (x_BNK - mean_BN1) / (variance_BN1 + _EPS).sqrt()


def denormalised_patches(prediction_BNK: Tensor, patches_BNK: Tensor) -> Tensor:
    """Return a prediction of normalised patches with the true ones' mean and variance: to look at."""
    x_BNK = patches_BNK.float()
    mean_BN1, variance_BN1 = x_BNK.mean(-1, keepdim=True), x_BNK.var(-1, keepdim=True)
    return prediction_BNK.float() * (variance_BN1 + _EPS).sqrt() + mean_BN1


def patch_error(prediction_BMK: Tensor, target_BMK: Tensor) -> LossSum:
    """Return (sum over masked patches of the mean squared error of their values, how many patches that is).

    target_BMK: what the masked patches hold, pixels or features; no gradient reaches it. float32 also under autocast.
    """
    with torch.autocast(prediction_BMK.device.type, enabled=False):
        error_BM = (prediction_BMK.float() - target_BMK.detach().float()).square().mean(-1)
        return LossSum(error_BM.sum(), torch.full((), error_BM.numel(), device=error_BM.device))
