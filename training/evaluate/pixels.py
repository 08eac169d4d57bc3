"""A baseline that has learnt nothing: the class of the nearest reference picture, compared at 16x16 pixels.

Pictures are reduced to 16x16 RGB; each one's mean over all 768 values is taken away, so that brightness counts for
nothing, and what is left is compared by its cosine. A query whose class no reference picture has counts as wrong.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

SIDE = 16


def pixel_features(images_NSS3: Tensor) -> Tensor:
    """Return [N, 768] float32, L2-normalised, of uint8 pictures."""
    parts = []
    for first in range(0, len(images_NSS3), 1024):
        images = images_NSS3[first : first + 1024]
        small = interpolate(images.permute(0, 3, 1, 2).float(), size=(SIDE, SIDE), mode="area").flatten(1)
        parts.append(normalize(small - small.mean(dim=1, keepdim=True), dim=1))
    return torch.cat(parts)


def nearest_label_accuracy(
    queries_NP: Tensor, labels: Sequence[str], references_MP: Tensor, reference_labels: Sequence[str]
) -> float:
    """Share of queries whose nearest reference has the same label."""
    num_right = 0
    for first in range(0, len(queries_NP), 1024):
        nearest = (queries_NP[first : first + 1024] @ references_MP.T).argmax(dim=1).tolist()
        num_right += sum(labels[first + i] == reference_labels[j] for i, j in enumerate(nearest))
    return num_right / len(queries_NP)
