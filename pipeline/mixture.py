"""Which planned pairs are left out because of where they come from: shares of sources, and earlier datasets."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import BuildConfig
from pipeline.identity import keys_of_text, order_of
from pipeline.readers.schema import LABEL, SOURCE
from pipeline.reasons import Reason

SHARE_SEED = 0x5A4D
"""Not the seed of the order: a share of a source is the same pairs in every dataset, and contains a smaller."""
_VERDICT = ("reason", "rule", "score", "threshold")


def source_weights(config: BuildConfig) -> dict[str, float]:
    """Source name -> the share of it that is taken, of those that are not taken whole."""
    return {name: source.weight for name, source in config.sources.items() if source.weight < 1}


def has_labels(config: BuildConfig) -> bool:
    """Whether some source has categories in the place of captions."""
    return any(source.label is not None for source in config.sources.values())


def with_shares(table: pa.Table, weights: Mapping[str, float]) -> pa.Table:
    """PLANNED rows, those with the reason `sampled_out` that are not in their source's share.

    A pair has a number in [0, 1), by its uid alone; it is in the share when the number is below the weight.
    """
    for source, weight in weights.items():
        numbers = order_of(keys_of_text(table["uid"].combine_chunks()), SHARE_SEED) / 2.0**64
        is_out = pc.equal(table[SOURCE], source).to_numpy() & (numbers >= weight)
        table = _dropped(table, is_out, Reason.SAMPLED_OUT, f"sources.{source}.weight", numbers, weight)
    return table


def without_earlier(table: pa.Table, earlier: pa.Table) -> pa.Table:
    """PLANNED rows, those with the reason `in_earlier_dataset` whose uid is in `earlier`."""
    is_known = pc.is_in(table["uid"], value_set=earlier["uid"].combine_chunks()).to_numpy()
    return _dropped(table, is_known, Reason.IN_EARLIER_DATASET, "against", None, None)


def without_caption(table: pa.Table) -> NDArray[np.bool_]:
    """[N] which rows have a category and no caption: rules about captions do not judge them."""
    spared: NDArray[np.bool_] = pc.and_(pc.is_valid(table[LABEL]), pc.equal(table["caption"], "")).to_numpy()
    return spared


def _dropped(
    table: pa.Table,
    is_out: NDArray[np.bool_],
    reason: Reason,
    rule: str,
    scores: NDArray[np.float64] | None,
    threshold: float | None,
) -> pa.Table:
    """Rows with a verdict where they had none."""
    chosen = pc.and_(pa.array(is_out), pc.is_null(table["reason"]))
    count = table.num_rows
    verdict = (
        pa.scalar(reason.value),
        pa.scalar(rule),
        pa.nulls(count, pa.float64()) if scores is None else pa.array(scores, pa.float64()),
        pa.scalar(threshold, pa.float64()),
    )
    for name, value in zip(_VERDICT, verdict, strict=True):
        values = pc.if_else(chosen, value, table[name])
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
    return table
