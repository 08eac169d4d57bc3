"""The histograms of a dataset's report."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from cluster.report import PALETTE, figure_html, new_figure
from pipeline.report_data import Sampled

NUM_BINS = 40
Numbers = NDArray[np.float64]


def histograms_html(sampled: Sampled) -> str:
    """Sizes, aspect ratios, bytes, caption lengths and sharpness of the sampled pairs that were kept."""
    kept = sampled.rows.filter(_is_kept(sampled))
    width, height = _numbers(kept.column("original_width")), _numbers(kept.column("original_height"))
    captions = np.array([len(text) for text in kept.column("caption").to_pylist()], np.float64)
    words = np.array([len(text.split()) for text in kept.column("caption").to_pylist()], np.float64)
    sharpness = _numbers(kept.column("sharpness").drop_null())
    figures = [
        histogram("Original size", "pixels", [("width", width), ("height", height)]),
        histogram("Aspect ratio", "width / height", [("", width / height)], log=True),
        histogram("Size of the download", "KB", [("", _numbers(kept.column("size_bytes")) / 1000)], log=True),
        histogram("Caption length", "characters", [("", captions)]),
        histogram("Caption length", "words", [("", words)]),
        histogram("Sharpness", "variance of the Laplacian", [("", sharpness)], log=True),
    ]
    animated = sum(map(bool, kept.column("is_animated").to_pylist()))
    note = f"<p>{animated:,} of them are the first frame of an animation.</p>" if animated else ""
    return f'{note}<div class="figures">{"".join(figures)}</div>'


def histogram(title: str, unit: str, series: Sequence[tuple[str, Numbers]], *, log: bool = False) -> str:
    """One histogram with a line per series; the longest 0.5 % at each end are put into the outermost bins."""
    figure, axes = new_figure(4.4, 2.4)
    values = np.concatenate([numbers for _, numbers in series])
    edges = _edges(values, log)
    for index, (name, numbers) in enumerate(series):
        counts, _ = np.histogram(np.clip(numbers, edges[0], edges[-1]), edges)
        axes.stairs(counts, edges, fill=True, alpha=0.45, color=PALETTE[index])
        axes.stairs(counts, edges, color=PALETTE[index], linewidth=1.2, label=name or None)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))
        axes.xaxis.set_minor_formatter(FuncFormatter(_plain_number if edges[-1] < 4 * edges[0] else _one_two_five))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.set_ylabel("samples")
    if len(series) > 1:
        axes.legend()
    return figure_html(figure, alt=f"{title}, {unit}")


def _edges(values: Numbers, log: bool) -> Numbers:
    low, high = (float(edge) for edge in np.quantile(values, [0.005, 0.995])) if len(values) else (0.0, 1.0)
    if log:
        low = max(low, 1e-3)
        if high / low < 1.2:
            low, high = low / 1.5, high * 1.5
        return np.geomspace(low, high, NUM_BINS + 1)
    low, high = np.floor(low), np.ceil(high)
    if high - low < 4:
        low, high = max(0.0, low - 2), high + 2
    step = max(1.0, np.ceil((high - low) / NUM_BINS))
    return np.arange(low, high + step + 1, step, dtype=np.float64)


def _plain_number(value: float, place: int | None) -> str:
    return f"{value:,.0f}" if value >= 1_000 else f"{value:.4g}"


def _one_two_five(value: float, place: int | None) -> str:
    """Labels for a wide logarithmic axis: there is no room for every digit."""
    return _plain_number(value, place) if f"{value:e}"[0] in "125" else ""


def _is_kept(sampled: Sampled) -> Any:
    return np.array([status == "kept" for status in sampled.column("status")], bool)


def _numbers(column: Any) -> Numbers:
    values: Numbers = column.to_numpy().astype(np.float64)
    return values
