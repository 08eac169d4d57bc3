"""Zero-shot classification: a picture belongs to the class whose name, put into templates, is nearest to it.

Legend: N pictures, C classes, T templates, E width of the shared space.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Shares of right answers, and the classes each picture was put into, best first."""

    top1: float
    top5: float
    num_classes: int
    num_samples: int
    predicted: Tensor
    """int64 [N, min(5, C)]: indices of classes."""

    @property
    def chance(self) -> float:
        """What guessing gets: one of C."""
        return 1 / self.num_classes

    @property
    def chance5(self) -> float:
        """What five different guesses get."""
        return min(5, self.num_classes) / self.num_classes


def ranked(queries_QE: Tensor, candidates_CE: Tensor, k: int) -> Tensor:
    """Return [Q, k]: the indices of the candidates with the largest inner products, best first; a chunk at a time."""
    chunks = (queries_QE[first : first + 1024] for first in range(0, len(queries_QE), 1024))
    return torch.cat([(chunk @ candidates_CE.T).topk(k, dim=1).indices for chunk in chunks])


def class_features(
    classes: Sequence[str], templates: Sequence[str], encode_texts: Callable[[Sequence[str]], Tensor]
) -> Tensor:
    """Return [C, E]: for each class the normalised mean of its templates' features (Radford et al. 2021, 3.1.4)."""
    texts = [template.replace("{}", name) for name in classes for template in templates]
    features_CTE = encode_texts(texts).reshape(len(classes), len(templates), -1)
    return normalize(features_CTE.mean(dim=1), dim=-1)


def classify(images_NE: Tensor, classes_CE: Tensor, labels_N: Tensor) -> ZeroShot:
    """Rank the classes for each picture by the cosine of normalised features; labels are indices of classes."""
    predicted = ranked(images_NE, classes_CE, min(5, len(classes_CE)))
    right = predicted == labels_N[:, None]
    return ZeroShot(
        top1=float(right[:, 0].float().mean()),
        top5=float(right.any(dim=1).float().mean()),
        num_classes=len(classes_CE),
        num_samples=len(images_NE),
        predicted=predicted,
    )
