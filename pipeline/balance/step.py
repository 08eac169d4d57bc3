"""Step balance: the last of curation. Counts of concepts are of the whole dataset, draws are of each pair alone.

    balance-concepts   once: concepts.txt, the concepts one a line; counts concepts
    balance-count      a unit per group of fetch units: matches.bin (`sample.MATCH`), counts.npy (int64 [concepts])
    balance-total      once: counts.npy, their sum
    balance-draw       a unit per group: drops.bin, kept.npy (int64 [concepts], of the rows that stay)
    balance-result     once: concepts.parquet: concept, found, kept, probability; most frequent first

A repair counts nothing: its pairs are drawn with the probabilities of the build.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import RunError
from cluster.executor import Unit
from cluster.journal import Journal, Marker, UnitOutput
from cluster.store import Store
from pipeline.balance.concepts import Matcher, concept_words, matcher_of, read_concepts
from pipeline.balance.config import BalanceConfig
from pipeline.balance.sample import MATCH, NO_CONCEPT, Matches, count_concepts, draw, probabilities
from pipeline.buckets import Records
from pipeline.curation.context import Context, Curated
from pipeline.duplicates.exchange import GroupStage, facts_tasks, of_units, read_facts, write_unit_drops
from pipeline.mixture import has_labels, without_caption
from pipeline.readers.schema import LABEL
from pipeline.reasons import Reason
from pipeline.selection import DROP, NONE, Drops, Groups, column_list, read_checked
from pipeline.workfile import WorkFile


def balance(context: Context, curated: Curated) -> Drops | None:
    """Step of curation: frequent concepts keep about `balance.per_concept` pairs each."""
    config, store = context.config.balance, context.store
    if config.per_concept is None or not config.concepts:
        return None
    concepts = _once(context, "balance-concepts", lambda name: ConceptsStage(config=config, name=name))
    counted = context.run_stage(CountStage.of(context, curated, concepts))
    counts = _files(counted, "counts.npy")
    total = _once(context, "balance-total", lambda name: TotalStage(store=store, counts=counts, name=name))
    drawn = context.run_stage(
        DrawStage(
            store=store,
            groups=curated.groups,
            matches=_files(counted, "matches.bin"),
            concepts=concepts,
            total=total,
            config=config,
            seed=context.config.seed,
            name=context.name("balance-draw"),
        )
    )
    if not context.generation:
        kept = _files(drawn, "kept.npy")
        context.run_stage(
            ResultStage(store=store, concepts=concepts, total=total, kept=kept, per_concept=config.per_concept)
        )
    return Drops(
        rule="balance.per_concept",
        reason=Reason.BALANCED_OUT,
        paths=tuple(marker.path_of("drops.bin") for marker in drawn.values()),
        groups=curated.groups,
    )


def _once(context: Context, stage: str, make: Callable[[str], Any]) -> WorkFile:
    """The output of a stage of one unit, which a repair takes from the build. RunError when it is not there."""
    name = "concepts.txt" if stage == "balance-concepts" else "counts.npy"
    if context.generation:
        markers = Journal(context.store).markers(stage)
        if not markers:
            raise RunError(
                f"{context.store.url_of(f'journal/{stage}')} is missing: a repair balances its pairs as the build did; "
                "restore it"
            )
    else:
        markers = context.run_stage(make(stage))
    return WorkFile.of(next(iter(markers.values())), name)


def _files(markers: dict[str, Marker], name: str) -> tuple[WorkFile, ...]:
    return tuple(WorkFile.of(marker, name) for marker in markers.values())


@dataclass(frozen=True, kw_only=True)
class ConceptsStage:
    """The list of concepts as it is when the build first needs it; later changes of the user's file are not seen."""

    config: BalanceConfig
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 256 * 2**20

    def units(self) -> Sequence[Unit]:
        return [Unit(id="00000", params={})]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        concepts = read_concepts(self.config.concepts or [], self.config.ignore_case)
        output.path("concepts.txt").write_text("\n".join(concepts), encoding="utf-8")
        output.count("concepts", len(concepts))


@dataclass(frozen=True, kw_only=True)
class CountStage(GroupStage):
    """What concepts the rows of each group have that are left. `tasks`: of `facts_tasks`, with their rows' files.

    has_labels: some rows have a category in the place of a caption; they have no part in it, and stay.
    """

    concepts: WorkFile
    ignore_case: bool
    has_labels: bool
    memory_bytes: int = 1024 * 2**20

    @staticmethod
    def of(context: Context, curated: Curated, concepts: WorkFile) -> "CountStage":
        tasks = []
        for task in facts_tasks(curated):
            units = curated.units[task.params["first_unit"] : task.params["end_unit"]]
            tasks.append(Unit(id=task.id, params={**task.params, "rows": tuple(unit.rows for unit in units)}))
        return CountStage(
            store=context.store,
            tasks=tuple(tasks),
            drops=curated.drops,
            concepts=concepts,
            ignore_case=context.config.balance.ignore_case,
            has_labels=has_labels(context.config),
            name=context.name("balance-count"),
        )

    def run(self, unit: Unit, output: UnitOutput) -> None:
        data = self.concepts.read(self.store)
        matcher = matcher_of(data, self.ignore_case)
        facts = read_facts(self.store, unit.params, self.drops)
        counts = np.zeros(data.count(b"\n") + 1, np.int64)
        with open(output.path("matches.bin"), "wb") as all_matches:
            for file, mine in zip(unit.params["rows"], of_units(facts, unit.params), strict=True):
                if len(mine):
                    matches = self._matches(matcher, file, mine)
                    matches.tofile(all_matches)
                    found = np.bincount(matches["concept"][matches["concept"] != NO_CONCEPT])
                    counts[: len(found)] += found
                    output.count("unmatched", int((matches["concept"] == NO_CONCEPT).sum()))
        np.save(output.path("counts.npy"), counts)
        output.count("rows", len(facts))

    def _matches(self, matcher: Matcher, rows: WorkFile, facts: Records) -> Matches:
        """Concepts of these rows of a fetch unit."""
        columns = ["caption", LABEL] if self.has_labels else ["caption"]
        table = read_checked(self.store, rows, columns).take(pa.array(facts["row"], pa.int64()))
        if self.has_labels:
            has_part = ~without_caption(table)
            table, facts = table.filter(pa.array(has_part)), facts[has_part]
        found = [matcher.find(caption) or [int(NO_CONCEPT)] for caption in column_list(table, "caption")]
        matches = np.empty(sum(map(len, found)), MATCH)
        of_row = facts[np.repeat(np.arange(len(facts)), [len(each) for each in found])]
        for name in ("unit", "row", "uid_high", "uid_low"):
            matches[name] = of_row[name]
        matches["concept"] = [concept for each in found for concept in each]
        return matches


@dataclass(frozen=True, kw_only=True)
class TotalStage:
    """The sum of what was counted in all groups."""

    store: Store
    counts: tuple[WorkFile, ...]
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 256 * 2**20

    def units(self) -> Sequence[Unit]:
        return [Unit(id="00000", params={})]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        np.save(output.path("counts.npy"), _sum(self.store, self.counts))


@dataclass(frozen=True, kw_only=True)
class DrawStage:
    """Which rows of each group stay. `matches`: of every group, in order."""

    store: Store
    groups: Groups
    matches: tuple[WorkFile, ...]
    concepts: WorkFile
    total: WorkFile
    config: BalanceConfig
    seed: int
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 1024 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "matches": ()}

    def units(self) -> Sequence[Unit]:
        return [
            Unit(id=f"{group:05}", params={"group": group, "matches": matches})
            for group, matches in enumerate(self.matches)
        ]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        assert self.config.per_concept is not None
        words = concept_words(self.concepts.read(self.store).decode().split("\n"))
        matches = np.frombuffer(unit.params["matches"].read(self.store), MATCH)
        probability = probabilities(_load(self.store, self.total), self.config.per_concept)
        drawn = draw(matches, probability, words, self.seed, self.config.unmatched == "keep")
        dropped = matches[drawn.first[~drawn.stays]]
        drops = np.zeros(len(dropped), DROP)
        drops["unit"], drops["row"] = dropped["unit"], dropped["row"]
        drops["of_unit"] = NONE
        drops["score"] = drawn.probability[~drawn.stays]
        write_unit_drops(output.path("drops.bin"), drops, *self.groups.range(unit.params["group"]))
        lengths = np.diff(drawn.first, append=len(matches))
        np.save(output.path("kept.npy"), count_concepts(matches[np.repeat(drawn.stays, lengths)], len(words)))
        output.count("rows", len(drawn.first))
        output.count("dropped", len(drops))


@dataclass(frozen=True, kw_only=True)
class ResultStage:
    """What balance did to each concept."""

    store: Store
    concepts: WorkFile
    total: WorkFile
    kept: tuple[WorkFile, ...]
    per_concept: int
    name: str = "balance-result"
    num_cpus: float = 1.0
    memory_bytes: int = 256 * 2**20

    def units(self) -> Sequence[Unit]:
        return [Unit(id="00000", params={})]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        found, names = _load(self.store, self.total), self.concepts.read(self.store).decode().split("\n")
        order = np.argsort(-found, kind="stable")
        table = pa.table(
            {
                "concept": [names[index].strip() for index in order],
                "found": found[order],
                "kept": _sum(self.store, self.kept)[order],
                "probability": probabilities(found, self.per_concept)[order],
            }
        )
        pq.write_table(table, output.path("concepts.parquet"), compression="zstd")
        output.count("concepts", len(names))
        output.count("concepts_found", int((found > 0).sum()))
        output.count("concepts_limited", int((found > self.per_concept).sum()))


def _load(store: Store, file: WorkFile) -> NDArray[np.int64]:
    numbers: NDArray[np.int64] = np.load(io.BytesIO(file.read(store)))
    return numbers


def _sum(store: Store, files: Sequence[WorkFile]) -> NDArray[np.int64]:
    """The sum of arrays in files, one in memory at a time."""
    total = _load(store, files[0]).copy()
    for file in files[1:]:
        total += _load(store, file)
    return total
