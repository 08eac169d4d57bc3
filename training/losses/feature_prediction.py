"""Prediction of target features: the Gaussian of M3I eq. 3, and the term of SiameseIM that keeps features apart.

Legend: B pictures of this rank, N places of a picture, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from training.losses.distributed import LossSum


def feature_prediction(
    prediction_BND: Tensor,
    target_BND: Tensor,
    counted_BN: Tensor,
    *,
    correlation_DD: Tensor | None = None,
    negative_weight: float = 0.0,
) -> LossSum:
    """Return (sum over the counted places of (||p - t||^2 + negative_weight * p^T C p) / D, how many they are).

    target_BND: no gradient reaches it. correlation_DD: C, the mean of t t^T over the places of all targets; p^T C p is
    the mean of (p t)^2, what a prediction has in common with any target. None leaves the term out. float32 also under
    autocast.
    """
    with torch.autocast(prediction_BND.device.type, enabled=False):
        p_BND, t_BND = prediction_BND.float(), target_BND.detach().float()
        error_BN = (p_BND - t_BND).square().sum(-1)
        if correlation_DD is not None:
            error_BN = error_BN + negative_weight * ((p_BND @ correlation_DD.detach().float()) * p_BND).sum(-1)
        return LossSum((error_BN * counted_BN).sum() / p_BND.shape[-1], counted_BN.sum())


@torch.no_grad()
def outer_products(target_BND: Tensor) -> Tensor:
    """Return [D, D] float32: the sum of t t^T over pictures and places."""
    with torch.autocast(target_BND.device.type, enabled=False):
        t_ND = target_BND.float().flatten(0, 1)
        return t_ND.T @ t_ND


@torch.no_grad()
def plain_norm(features_BND: Tensor) -> Tensor:
    """Return features of mean 0 and variance 1 along the width: layer normalisation without weights."""
    with torch.autocast(features_BND.device.type, enabled=False):
        return functional.layer_norm(features_BND.float(), features_BND.shape[-1:])
