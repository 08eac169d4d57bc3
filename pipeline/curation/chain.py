"""The steps of curation, one after the other: each sees what those before it have left."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.journal import Marker
from pipeline.balance.step import balance
from pipeline.config import source_priorities
from pipeline.curation.context import Context, Curated, Step
from pipeline.decide import DecideStage
from pipeline.duplicates.exact import drop_exact, drop_same_bytes_and_caption, drop_same_url
from pipeline.duplicates.facts import needed_facts
from pipeline.duplicates.near import drop_near
from pipeline.duplicates.semantic import drop_semantic
from pipeline.mixture import has_labels
from pipeline.models.measure import measure
from pipeline.rules.chosen import image_rules
from pipeline.selection import DecidedUnit, Groups, num_dropped

if TYPE_CHECKING:
    from pipeline.duplicates.captions import Alternatives

STEPS: tuple[Step, ...] = (drop_exact, drop_same_url, drop_same_bytes_and_caption, drop_near, drop_semantic, balance)


def curate(context: Context, fetched: Mapping[str, Marker]) -> Curated:
    """What is kept of these fetch units; `num_kept` of the result is what every step has left."""
    decide = DecideStage.of(
        context.store,
        list(fetched.values()),
        image_rules(context.config.curate),
        measure(context, fetched),
        priorities=source_priorities(context.config),
        facts_dtype=needed_facts(context.config),
        has_labels=has_labels(context.config),
    )
    decided = context.run_stage(replace(decide, name=context.name("decide")))
    num_kept = tuple(marker.counts["kept"] for marker in decided.values())
    curated = Curated(
        units=tuple(DecidedUnit.of(index, fetched[name], decided[name]) for index, name in enumerate(fetched)),
        num_kept=num_kept,
        groups=Groups.of(num_kept),
        facts_dtype=decide.facts_dtype,
    )
    for step in STEPS:
        if drops := step(context, curated):
            curated = curated.without(drops)
    dropped = num_dropped(context.store, curated.drops, len(curated.units))
    left = tuple(int(kept - dropped[index]) for index, kept in enumerate(curated.num_kept))
    return replace(curated, num_kept=left, alternatives=_alternatives(context, curated))


def _alternatives(context: Context, curated: Curated) -> "Alternatives | None":
    """Captions of dropped duplicates, if they are asked for."""
    if not context.config.dedup.alternatives:
        return None
    from pipeline.duplicates.alternatives import gather  # here, as few need it

    return gather(context, curated)
