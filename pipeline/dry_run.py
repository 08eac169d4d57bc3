"""`curate.dry_run`: what would be kept, told from the journal when everything is decided and nothing is packed.

Numbers are pairs. Of a rule, `fail` are the pairs that it does not keep of those that it sees, `alone` those of them
that no other rule of its stage drops, `dropped` those that it is blamed for, being the first.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.config import flatten
from cluster.journal import Journal, Marker
from cluster.store import Store
from pipeline.config import BuildConfig
from pipeline.curation.context import Curated
from pipeline.curation.replay import replayed
from pipeline.manifest import Manifest
from pipeline.rules.base import Rule, limit_of
from pipeline.rules.chosen import image_rules, named_text_rules
from pipeline.selection import num_dropped

MAX_OVERLAPS = 30
_SHOWN = (bool, int, float, str)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing that drops pairs. fail, alone: of a rule alone. limit: its threshold, where its key does not tell."""

    name: str
    dropped: int
    fail: int | None = None
    alone: int | None = None
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Two rules of one stage, and how many pairs fail both."""

    one: str
    other: str
    both: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What would become of all pairs; each phase's lines are in the order in which they drop."""

    num_rows: int
    num_pairs: int
    phases: tuple[tuple[str, tuple[Line, ...]], ...]
    overlaps: tuple[Overlap, ...]
    num_kept: int


def outcome(config: BuildConfig, store: Store, curated: Curated) -> Outcome:
    """From the markers of plan-order, fetch and decide, and the drops of every step."""
    journal = Journal(store)
    planned, fetched, decided = (_total(journal.markers(stage)) for stage in ("plan-order", "fetch", "decide"))
    text_lines = _rule_lines(named_text_rules(config.curate), planned)
    unusable = tuple(
        Line(name=name.removeprefix("pairs:"), dropped=number)
        for name, number in sorted(planned.items(), key=lambda item: (-item[1], item[0]))
        if name.startswith("pairs:") and number
    )
    left = planned["pairs"] - sum(line.dropped for line in (*unusable, *text_lines))
    lost = Line(name="no image came of it (see pairmill status)", dropped=left - fetched["images"])
    image_lines = _rule_lines(image_rules(config.curate), decided)
    steps = tuple(
        Line(name=step.rule, dropped=int(num_dropped(store, [step], len(curated.units)).sum()))
        for step in curated.drops
    )
    phases = (
        ("before the download", (*unusable, *text_lines)),
        ("download", (lost,)),
        ("rules on images", image_lines),
        ("compared with other pairs", steps),
    )
    return Outcome(
        num_rows=planned["rows"],
        num_pairs=planned["pairs"],
        phases=phases,
        overlaps=tuple(sorted((*_overlaps(planned), *_overlaps(decided)), key=lambda o: (-o.both, o.one, o.other))),
        num_kept=sum(curated.num_kept),
    )


def print_outcome(config: BuildConfig, store: Store, curated: Curated) -> None:
    """The outcome as tables, and how to go on."""
    print("dry run: nothing is packed or published\n")
    _print_tables(outcome(config, store, curated), config)
    print("\nTo make the dataset, run the same command without curate.dry_run: it goes on from here.")


def print_finished(config: BuildConfig, store: Store, manifest: Manifest) -> None:
    """The outcome of a dataset that is there: from its journal, or from its manifest where its work/ is gone."""
    curated = replayed(store, config)
    if curated is None:
        print("the dataset is finished; its decisions (work/) are gone; what is left are counts of rows")
        for name, number in sorted(manifest.counts.items(), key=lambda item: (item[0] != "kept", -item[1])):
            print(f"  {number:>14,}  {name}")
        return
    repairs = f" (the build's; its {len(manifest.repairs)} repairs are not told of)" if manifest.repairs else ""
    print(f"the dataset is finished; these were its decisions{repairs}\n")
    _print_tables(outcome(config, store, curated), config)


def _print_tables(told: Outcome, config: BuildConfig) -> None:
    print("\n".join(_funnel(told, flatten(config))))
    if told.overlaps:
        print("\n" + "\n".join(_overlap_table(told)))


def _total(markers: Mapping[str, Marker]) -> dict[str, int]:
    total = {"rows": 0, "pairs": 0, "images": 0}
    for marker in markers.values():
        for name, number in marker.counts.items():
            total[name] = total.get(name, 0) + number
    return total


def _rule_lines(rules: Sequence[Rule], counts: Mapping[str, int]) -> tuple[Line, ...]:
    return tuple(
        Line(
            name=rule.name,
            dropped=counts.get(f"first:{rule.name}", 0),
            fail=counts.get(f"drops:{rule.name}", 0),
            alone=counts.get(f"alone:{rule.name}", 0),
            limit=limit_of(rule)[1],
        )
        for rule in rules
    )


def _overlaps(counts: Mapping[str, int]) -> Iterator[Overlap]:
    for name, number in counts.items():
        if name.startswith("both:"):
            one, _, other = name.removeprefix("both:").partition("+")
            yield Overlap(one=one, other=other, both=number)


def _funnel(told: Outcome, settings: Mapping[str, object]) -> Iterator[str]:
    left = told.num_pairs
    rows: list[tuple[str, ...]] = [("", "fail", "alone", "dropped", "left")]
    rows.append((f"in the lists ({told.num_rows:,} rows)", "", "", "", f"{left:,}"))
    for title, lines in told.phases:
        if lines:
            rows.append((title, "", "", "", ""))
        for line in lines:
            left -= line.dropped
            counts = ("" if number is None else f"{number:,}" for number in (line.fail, line.alone))
            rows.append((f"  {_with_value(line, settings)}", *counts, f"{line.dropped:,}", f"{left:,}"))
    part = f" ({told.num_kept / told.num_pairs:.1%})" if told.num_pairs else ""
    rows.append((f"would be kept{part}", "", "", "", f"{told.num_kept:,}"))
    yield from _aligned(rows)
    yield "fail: does not pass the rule; alone: passes all others of its stage; dropped: passes all before it"


def _overlap_table(told: Outcome) -> Iterator[str]:
    fails = {line.name: line.fail or 0 for _, lines in told.phases for line in lines}
    shown = told.overlaps[:MAX_OVERLAPS]
    rows: list[tuple[str, ...]] = [("pairs that fail two rules", "both", "of the first", "of the second")]
    for overlap in shown:
        parts = (f"{overlap.both / max(1, fails.get(name, 0)):.0%}" for name in (overlap.one, overlap.other))
        rows.append((f"  {overlap.one} and {overlap.other}", f"{overlap.both:,}", *parts))
    yield from _aligned(rows)
    if len(told.overlaps) > len(shown):
        yield f"  ... and {len(told.overlaps) - len(shown)} more"


def _with_value(line: Line, settings: Mapping[str, object]) -> str:
    """A rule's key with what it is set to, where that is short, else with its threshold."""
    value = settings.get(line.name)
    if isinstance(value, _SHOWN):
        return f"{line.name}={str(value).lower() if isinstance(value, bool) else value}"
    return line.name if line.limit is None else f"{line.name} ({line.limit:g})"


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
