"""The histograms of a dataset's report."""

from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from cluster.journal import Journal
from cluster.report import PALETTE, figure_html, new_figure
from cluster.store import Store
from pipeline.manifest import Manifest
from pipeline.report.data import Sampled

NUM_BINS = 40
NUM_BARS = 15
MAX_NAME_CHARS = 32
Numbers = NDArray[np.float64]


def distributions_html(sampled: Sampled, languages: Counter[str]) -> str:
    """Sizes, aspect ratios, bytes, caption lengths, sharpness and hosts of the sampled pairs that were kept.

    languages: of all captions, empty if they were not told.
    """
    kept = sampled.kept
    width, height = _numbers(kept.column("original_width")), _numbers(kept.column("original_height"))
    captions = np.array([len(text) for text in kept.column("caption").to_pylist()], np.float64)
    words = np.array([len(text.split()) for text in kept.column("caption").to_pylist()], np.float64)
    sharpness = _numbers(kept.column("sharpness").drop_null())
    sizes = _numbers(kept.column("size_bytes").drop_null())  # not told of imported images
    figures = [
        histogram("Original size", "pixels", [("width", width), ("height", height)]),
        histogram("Aspect ratio", "width / height", [("", width / height)], log=True),
        histogram("Size of the download", "KB", [("", sizes / 1000)], log=True),
        histogram("Caption length", "characters", [("", captions)]),
        histogram("Caption length", "words", [("", words)]),
        histogram("Sharpness", "variance of the Laplacian", [("", sharpness)], log=True),
    ]
    hosts = Counter(host_of(url) for url in kept.column("url").to_pylist())
    figures.append(bars("Hosts", hosts.most_common(NUM_BARS), hosts.total()))
    if languages:
        figures.append(bars("Languages of all captions", languages.most_common(NUM_BARS), languages.total()))
    animated = sum(map(bool, kept.column("is_animated").to_pylist()))
    note = f"<p>{animated:,} of them are the first frame of an animation.</p>" if animated else ""
    return f'{note}<div class="figures">{"".join(figures)}</div>'


def histogram(title: str, unit: str, series: Sequence[tuple[str, Numbers]], *, log: bool = False) -> str:
    """One histogram with a line per series; the longest 0.5 % at each end are put into the outermost bins.

    Empty where there is nothing to show.
    """
    values = np.concatenate([numbers for _, numbers in series])
    if not len(values):
        return ""
    figure, axes = new_figure(4.4, 2.4)
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


def host_of(url: str | None) -> str:
    """The host of a URL, "" if it has none."""
    try:
        return urlsplit(url or "").hostname or ""
    except ValueError:
        return ""


def count_languages(store: Store, sampled: Sampled, manifest: Manifest) -> Counter[str]:
    """Pairs by the language that the rule curate.languages has told, kept or not; empty without that rule."""
    counts: Counter[str] = Counter()
    if not manifest.config.get("curate.languages"):
        return counts
    markers = Journal(store).markers("plan-order")
    for unit in sampled.units:
        planned, _, group = unit.partition("-")
        try:
            with store.open(markers[planned].path_of("decisions.parquet")) as file:
                table = pq.ParquetFile(file).read_row_group(int(group), columns=["rule", "detail"])
        except (KeyError, FileNotFoundError, ValueError):  # work/ may be removed; units of an import have other names
            continue
        told = table.filter(pc.field("rule") == "curate.languages").column("detail").drop_null().to_pylist()
        counts.update(detail.removeprefix("language ") for detail in told)
    return counts


def bars(title: str, counts: Sequence[tuple[str, int]], total: int) -> str:
    """Horizontal bars, the largest at the top, each with its share of `total`."""
    figure, axes = new_figure(4.4, 0.7 + 0.22 * max(3, len(counts)))
    names = [name if len(name) <= MAX_NAME_CHARS else f"{name[: MAX_NAME_CHARS - 1]}…" for name, _ in counts]
    numbers = [number for _, number in counts]
    axes.barh(range(len(counts)), numbers, color=PALETTE[0], alpha=0.75)
    for place, number in enumerate(numbers):
        axes.text(number, place, f" {number / max(1, total):.1%}", va="center", fontsize=8)
    axes.set_yticks(range(len(counts)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title(title)
    axes.set_xlabel("pairs")
    return figure_html(figure, alt=title)


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


def _numbers(column: Any) -> Numbers:
    values: Numbers = column.to_numpy().astype(np.float64)
    return values
