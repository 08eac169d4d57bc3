"""Sums over all pairs of rows and columns without the matrix of pairs: one tile of rows at a time.

A contrastive loss of A rows against G columns is sum_i f_i(z_i1 .. z_iG), with z = scale * rows @ columns^T + bias. It
needs the A x G logits only through f, one row at a time. So a tile of rows is computed, turned into its sum and, in
place, into df/dz, and multiplied back at once into the gradients of rows and columns. Nothing is computed twice: the
products are those of the dense loss, and its memory shrinks from A x G to a tile.

Legend: A rows, G columns, D width, T rows of a tile.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

TILE_BYTES = 32 * 2**20
"""Of one float32 tile, of which a loss holds two to four: enough rows for the products' full speed."""
MIN_TILE_ROWS = 64


class Term(Protocol):
    """What a loss makes of one tile of logits."""

    def __call__(self, logits_TG: Tensor, rows: slice, /) -> Tensor:
        """Return the sum of f_i over the tile's rows, and overwrite the tile with df_i/dz_ij."""
        ...


def sum_over_pairs(
    rows_AD: Tensor, columns_GD: Tensor, scale: Tensor, term: Term, *, bias: Tensor | None = None
) -> Tensor:
    """Return sum_i f_i(scale * rows @ columns^T + bias), float32, with gradients of rows, columns, scale and bias.

    scale, bias: float32 scalars. Computed in float32 also under autocast. The gradient has no gradient of its own.
    """
    with torch.autocast(rows_AD.device.type, enabled=False):
        total: Tensor = _SumOverPairs.apply(  # type: ignore[no-untyped-call]  # torch's own
            rows_AD.float(), columns_GD.float(), scale, bias, term, torch.is_grad_enabled()
        )
    return total


def tiles(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Cut rows so that a float32 tile of rows x columns takes about TILE_BYTES."""
    size = max(MIN_TILE_ROWS, TILE_BYTES // (4 * max(1, num_columns)))
    for first in range(0, num_rows, size):
        yield slice(first, min(first + size, num_rows))


class _SumOverPairs(torch.autograd.Function):
    """Scalar output, so the gradient of the inputs is known up to a factor as soon as the sum is."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_AD: Tensor,
        columns_GD: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        term: Term,
        with_gradient: bool,
    ) -> Tensor:
        total = scale.new_zeros(())
        d_rows_AD, d_columns_GD = torch.zeros_like(rows_AD), torch.zeros_like(columns_GD)
        d_scale, d_bias = torch.zeros_like(scale), torch.zeros_like(scale)
        parts = list(tiles(len(rows_AD), len(columns_GD)))
        buffer_TG = rows_AD.new_empty(parts[0].stop if parts else 0, len(columns_GD))
        for part in parts:
            rows_TD = rows_AD[part] * scale
            tile_TG = torch.mm(rows_TD, columns_GD.T, out=buffer_TG[: len(rows_TD)])
            if bias is not None:
                tile_TG += bias
            total += term(tile_TG, part)
            if with_gradient:
                pulled_TD = torch.mm(tile_TG, columns_GD, out=d_rows_AD[part])
                d_scale += torch.linalg.vecdot(pulled_TD, rows_AD[part]).sum()
                d_bias += tile_TG.sum() if bias is not None else 0
                d_columns_GD.addmm_(tile_TG.T, rows_TD)
        ctx.save_for_backward(d_rows_AD.mul_(scale), d_columns_GD, d_scale, d_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (*(x * gradients[0] if need else None for x, need in zip(found, needed, strict=False)), None, None)


def softmax_term(own_A: Tensor, hidden_A: Tensor | None = None) -> Term:
    """Return f_i = log sum_j exp z_ij - z_i,own(i): cross-entropy.

    own_A: the column that belongs to each row. hidden_A: a column that is no candidate for it.
    """

    def term(logits_TG: Tensor, rows: slice) -> Tensor:
        own_T1 = own_A[rows, None]
        if hidden_A is not None:
            logits_TG.scatter_(1, hidden_A[rows, None], -torch.inf)
        log_p_TG = logits_TG.log_softmax(1)
        own_T = log_p_TG.gather(1, own_T1)
        torch.exp(log_p_TG, out=logits_TG).scatter_add_(1, own_T1, torch.full_like(own_T, -1))
        return -own_T.sum()

    return term


def sigmoid_term(own_A: Tensor) -> Term:
    """Return f_i = -sum_j log sigmoid(y_ij z_ij), y = 1 for the own column and -1 elsewhere.

    As log(1 + e^-z) = log(1 + e^z) - z, that is sum_j log(1 + e^z_ij) - z_i,own(i), with derivative sigmoid(z) - [own].
    """

    def term(logits_TG: Tensor, rows: slice) -> Tensor:
        own_T1 = own_A[rows, None]
        own_logit_T1 = logits_TG.gather(1, own_T1)
        total: Tensor = functional.softplus(logits_TG).sum() - own_logit_T1.sum()
        logits_TG.sigmoid_().scatter_add_(1, own_T1, torch.full_like(own_logit_T1, -1))
        return total

    return term


def divergence_term(target_logits: Callable[[slice], Tensor]) -> Term:
    """Return f_i = KL(p_i || softmax(z_i)) with p_i the softmax of fixed logits. target_logits: those of some rows."""

    def term(logits_TG: Tensor, rows: slice) -> Tensor:
        log_p_TG = target_logits(rows).log_softmax(1)
        log_q_TG = logits_TG.log_softmax(1)
        p_TG = log_p_TG.exp()
        torch.exp(log_q_TG, out=logits_TG).sub_(p_TG)
        return torch.dot(p_TG.flatten(), log_p_TG.sub_(log_q_TG).flatten())

    return term
