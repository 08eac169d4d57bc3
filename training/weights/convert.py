"""Weights from our names and layout to another library's, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cluster.errors import RequestError
from training.data.tokenizer import Tokenizer
from training.models.config import ModelConfig
from training.models.positions import sincos_2d
from training.weights.names import BIAS, POSITIONS, TABLE, TOKEN, Dialect, Pair, folds_bias, pairs

Weights = dict[str, Tensor]
# MAE's stored table and ours are the same formula in float64, rounded to float32 in another order of operations.
SAME_POSITIONS = 1e-4


def to_theirs(dialect: Dialect, weights: Mapping[str, Tensor], model: ModelConfig, tokenizer: Tokenizer) -> Weights:
    """Return a model's weights in another library's names. weights: by part, as `names.py` says."""
    if dialect == "pairmill":
        return dict(weights)
    ours = dict(weights)
    ours[TABLE] = _table(ours, model, fold=folds_bias(dialect, model))
    if "text.tokens.weight" in ours:
        ours["text.tokens.weight"] = full_vocabulary(ours["text.tokens.weight"], tokenizer)
    theirs: Weights = {}
    for pair in pairs(dialect, model):
        value = ours[pair.ours]
        value = value.T if pair.transposed else value
        value = value.reshape((1,) * pair.leading + value.shape)
        pieces = value.chunk(len(pair.theirs)) if len(pair.theirs) > 1 else [value]
        for name, piece in zip(pair.theirs, pieces, strict=True):
            theirs[name] = piece.contiguous().clone()
    return theirs


def from_theirs(dialect: Dialect, theirs: Mapping[str, Tensor], model: ModelConfig) -> Weights:
    """Return what is there of another library's weights in our names; parts that are not there are left out.

    The vocabulary stays CLIP's whole one (see `fit_vocabulary`). Raises RequestError for fixed positions that differ.
    """
    if dialect == "pairmill":
        return dict(theirs)
    ours = {pair.ours: _ours(pair, theirs) for pair in pairs(dialect, model) if all(n in theirs for n in pair.theirs)}
    if TABLE in ours:
        _take_table(ours, model)
    if "image.stem.projection.weight" in ours and BIAS not in ours and folds_bias(dialect, model):
        ours[BIAS] = torch.zeros(len(ours["image.stem.projection.weight"]))
    if "text.positions" in ours:  # a shorter context than theirs is theirs, cut
        ours["text.positions"] = ours["text.positions"][: model.text.context_length]
    return ours


def names_of(dialect: Dialect, model: ModelConfig) -> set[str]:
    """Return every name that the other library has for a model of this shape."""
    return {name for pair in pairs(dialect, model) for name in pair.theirs}


def full_vocabulary(rows_VD: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Return a row for each of CLIP's 49,408 ids: that of the id it becomes here, or of "unknown"."""
    return rows_VD[tokenizer.ids_of_all()]


def fit_vocabulary(full_VD: Tensor, tokenizer: Tokenizer, fresh_VD: Tensor) -> Tensor:
    """Return the rows that this tokenizer keeps of CLIP's; rows without a counterpart are taken from `fresh_VD`."""
    ids = tokenizer.ids_of_all()
    if len(fresh_VD) == len(full_VD):
        return full_VD
    fitted_VD = fresh_VD.clone()
    known = ids >= tokenizer.first_known_id
    fitted_VD[ids[known]] = full_VD[known].to(fitted_VD.dtype)
    return fitted_VD


def _table(ours: Weights, model: ModelConfig, *, fold: bool) -> Tensor:
    positions_ND = ours.get(POSITIONS)
    if positions_ND is None:
        vision = model.vision
        positions_ND = sincos_2d(vision.image_size // vision.patch_size, vision.shape.width)
    if fold:
        positions_ND = positions_ND + ours[BIAS]
    if not model.vision.has_class_token:
        return positions_ND
    return torch.cat([torch.zeros_like(positions_ND[:1]), positions_ND])


def _take_table(ours: Weights, model: ModelConfig) -> None:
    """Replace the table by positions and, in the class token, its own position."""
    vision = model.vision
    table = ours.pop(TABLE)
    if vision.has_class_token:
        first, table = table[0], table[1:]
        if TOKEN in ours:
            ours[TOKEN] = ours[TOKEN] + first
    if vision.positions == "learned":
        ours[POSITIONS] = table
        return
    fixed = sincos_2d(vision.image_size // vision.patch_size, vision.shape.width)
    if table.shape != fixed.shape or (table - fixed).abs().max() > SAME_POSITIONS:
        raise RequestError(
            f"init.weights: its position embeddings {tuple(table.shape)} are not the fixed ones of {vision.image_size} "
            f"px and patch {vision.patch_size} {tuple(fixed.shape)}; set model.vision.positions=learned, and "
            "image_size and patch_size to those of the weights"
        )


def _ours(pair: Pair, theirs: Mapping[str, Tensor]) -> Tensor:
    value = torch.cat([theirs[name] for name in pair.theirs]) if len(pair.theirs) > 1 else theirs[pair.theirs[0]]
    if any(length != 1 for length in value.shape[: pair.leading]) or value.ndim < pair.leading:
        raise RequestError(f"init.weights: {pair.theirs[0]} is {tuple(value.shape)}, which is none of its kind")
    value = value.reshape(value.shape[pair.leading :]).float()
    return value.T.contiguous() if pair.transposed else value
