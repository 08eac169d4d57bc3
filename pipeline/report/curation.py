"""How rules overlap, what matched evaluation sets, and what balance did to concepts."""

from collections import Counter

import numpy as np
import pyarrow as pa
from markupsafe import Markup
from numpy.typing import NDArray

from cluster.journal import Journal
from cluster.report import PALETTE, Card, cards_html, environment, figure_html, new_figure, table_html
from cluster.store import Store
from pipeline.generations import all_markers
from pipeline.manifest import Manifest
from pipeline.reasons import Reason
from pipeline.report.data import TEMPLATES, Sampled
from pipeline.report.dropped import why
from pipeline.report.pictures import Album
from pipeline.selection import read_table

NUM_CONCEPTS_SHOWN = 20
NUM_MATCHES_SHOWN = 24


def overlap_html(store: Store) -> str:
    """Which rules drop the same pairs; "" if no rule dropped anything."""
    counts: Counter[str] = Counter()
    for stage in ("plan-order", "decide"):
        for marker in all_markers(Journal(store), stage):
            counts.update({name: number for name, number in marker.counts.items() if ":" in name})
    rules = [name.removeprefix("drops:") for name in counts if name.startswith("drops:")]
    if not rules:
        return ""
    numbers = range(1, len(rules) + 1)
    rows = []
    for number, rule in zip(numbers, rules, strict=True):
        name = Markup('<span style="white-space:nowrap">{} <code>{}</code></span>').format(number, rule)
        both = [_both(counts, rule, other) for other in rules]
        rows.append((name, counts[f"drops:{rule}"], counts[f"alone:{rule}"], *both))
    return (
        "<p>Pairs that each rule would drop; alone: that no other rule of its stage drops; then those that "
        "rule 1, 2, ... drops too. Rules on captions and URLs judge all pairs, rules on images those that were "
        "downloaded.</p>" + table_html(["rule", "drops", "alone", *map(str, numbers)], rows)
    )


def _both(counts: Counter[str], rule: str, other: str) -> int | str:
    if rule == other:
        return ""
    return counts[f"both:{rule}+{other}"] + counts[f"both:{other}+{rule}"]


def evaluation_html(album: Album, sampled: Sampled, manifest: Manifest) -> str:
    """Which images of evaluation sets were found in the dataset; "" unless there are any."""
    total = manifest.counts.get(Reason.EVALUATION_SET, 0)
    if not total:
        return ""
    rows = [sampled.row(index) for index in sampled.find("dropped", Reason.EVALUATION_SET)]
    sets = Counter(str(row["detail"] or "").partition(":")[0] for row in rows)
    pictures = [album.picture(row, why(row)) for row in rows[:NUM_MATCHES_SHOWN]]
    shown = [picture for picture in pictures if picture.image]
    note = "" if sampled.is_all else f" The table and the pictures are of {len(rows):,} of them."
    return (
        f"<p>{total:,} rows were dropped because their image is one of an evaluation set, or very much like one. Under "
        f"each picture: what was measured, and the evaluation image that it matched.{note}</p>"
        + table_html(["evaluation set", "pairs dropped"], sets.most_common())
        + environment(TEMPLATES).get_template("pictures.html").render(pictures=shown)
    )


def sweep_html(store: Store) -> str:
    """How many rows each threshold of semantic similarity would drop; "" where nothing was compared."""
    counts: Counter[str] = Counter()
    for marker in all_markers(Journal(store), "semantic-pairs"):
        counts.update({name: number for name, number in marker.counts.items() if name.startswith("above:")})
    if not counts:
        return ""
    cosines, numbers = zip(*sorted((float(name.removeprefix("above:")), n) for name, n in counts.items()), strict=True)
    figure, axes = new_figure(4.8, 2.6)
    axes.plot(cosines, numbers, marker="o", markersize=3, color=PALETTE[0])
    axes.set_title("Rows that each threshold would drop")
    axes.set_xlabel("dedup.semantic_similarity (cosine)")
    axes.set_ylabel("rows")
    axes.set_ylim(bottom=0)
    return (
        "<p>The cosines of all images to their likest neighbour are stored: another threshold needs no model.</p>"
        + figure_html(figure, alt="rows that each threshold of semantic similarity would drop")
    )


def balance_html(store: Store) -> str:
    """What balance did to frequent concepts; "" unless there was any."""
    markers = Journal(store).markers("balance-result")
    if not markers:
        return ""
    marker = next(iter(markers.values()))
    try:
        table = read_table(store, marker.path_of("concepts.parquet"))
    except FileNotFoundError:
        return '<p class="quiet">What balance counted is not in work/ any more.</p>'
    rows = [
        (row["concept"], row["found"], row["kept"], f"{row['probability']:.4g}")
        for row in table.slice(0, NUM_CONCEPTS_SHOWN).to_pylist()
    ]
    counts = marker.counts
    cards = [
        Card(label="concepts", value=f"{counts['concepts']:,}", note="in the list"),
        Card(label="found", value=f"{counts['concepts_found']:,}", note="in at least one caption"),
        Card(label="limited", value=f"{counts['concepts_limited']:,}", note="found more often than the limit"),
    ]
    return (
        "<p>A pair stays if one of the concepts in its caption is drawn; a concept that is found n times is drawn with "
        "probability min(1, balance.per_concept / n). Counts are of the build, without repairs.</p>"
        + cards_html(cards)
        + '<div class="columns"><div>'
        + table_html(["concept", "pairs before", "pairs after", "probability"], rows, "The most frequent concepts")
        + "</div><div>"
        + _tail(table)
        + "</div></div>"
    )


def _tail(table: pa.Table) -> str:
    """Pairs of each concept before and after, the most frequent first: balance cuts the head and leaves the tail."""
    found, kept = (table.column(name).to_numpy() for name in ("found", "kept"))
    places = _places(int((found > 0).sum()))
    figure, axes = new_figure(4.8, 3.0)
    axes.plot(places + 1, found[places], color=PALETTE[1], label="before")
    axes.plot(places + 1, np.sort(kept)[::-1][places], color=PALETTE[0], label="after")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_title("Pairs of a concept")
    axes.set_xlabel("concepts, most frequent first")
    axes.set_ylabel("pairs")
    axes.legend()
    return figure_html(figure, alt="pairs of each concept before and after balance")


def _places(count: int) -> NDArray[np.int64]:
    """At most some hundred of `count` ranks, dense at the start."""
    return np.unique(np.geomspace(1, max(1, count), 300).astype(np.int64)) - 1
