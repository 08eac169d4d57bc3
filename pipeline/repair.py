"""`pairmill repair OUT`: tries the pairs again that failed transiently, and adds what comes to the dataset.

A repair is a generation with stages of its own (`journal/repair-0001-fetch/`, ...) that begins where the dataset is
published: it reads manifest.json, record/ and the shards' tables, and needs nothing of work/. What it recovers goes
into further shards; no shard that is there is touched, and a newcomer whose image is in the dataset is dropped. Then
the records that changed are replaced, one by one, and last manifest.json. Killed at any moment, the same command goes
on; the dataset is whole all the time.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

from pydantic import create_model

from cluster.config import REQUIRED, Config, key, validate, walk_keys
from cluster.errors import EXIT_DONE, RequestError
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.run import require_run
from cluster.session import RayConfig, ray_session, require_reachable
from cluster.store import Store
from pipeline.against import known_shards
from pipeline.config import BuildConfig, FetchConfig
from pipeline.curation.chain import curate
from pipeline.curation.context import Context, Curated, RunStage
from pipeline.fetch import FetchStage
from pipeline.generations import record_markers, stage_name
from pipeline.manifest import MANIFEST_FILE, SAMPLE_COLUMNS, Manifest, read_manifest
from pipeline.pack import PackStage, cut_shards, more_columns
from pipeline.publish import extend_manifest
from pipeline.reasons import is_transient
from pipeline.record import REPEATED_PAIR, RecordStage, total_counts
from pipeline.repair_stages import Change, PlanStage, UpdateStage
from pipeline.workfile import WorkFile

_REASON = "reason:"


def overrides(group: type[Config], name: str) -> Any:
    """The keys of a group that may differ from one command to the next, all optional: null is as the build had it."""
    fields: dict[str, Any] = {
        key_name: (Optional[field.annotation], key(None, f"{field.description}; null: as the build had it"))  # noqa: UP045
        for key_name, field in walk_keys(group)
        if not dict(field.json_schema_extra or {})["affects_result"]  # type: ignore[arg-type]
    }
    return create_model(name, __base__=Config, **fields)


RepairConfig = create_model(
    "RepairConfig",
    __base__=Config,
    dataset=(str, key(REQUIRED, "folder or URL of a finished dataset", min_length=1)),
    fetch=(overrides(FetchConfig, "RepairFetch"), key({}, "downloading")),
    ray=(overrides(RayConfig, "RepairRay"), key({}, "Ray")),
)


def repair_command(config: Any) -> int:
    """Repair a dataset and print what came of it."""
    from pipeline.build import Build
    from pipeline.report import write_report

    store, manifest = read_manifest(config.dataset)
    _refuse_other_columns(store, manifest)
    _, record = require_run(config.dataset, "build")
    settings = settings_of(record["config"], config)
    journal = Journal(store)
    groups = group_records(journal, len(manifest.repairs) + 1, settings.plan.rows_per_unit)
    if not groups:
        print(f"{store.url}: nothing to repair: no pair failed for a reason that may pass")
        return EXIT_DONE
    require_reachable(settings.ray)
    with ray_session(settings.ray) as executor, Progress(title=f"repair {store.url}") as progress:
        repaired = Build(settings, store, executor, progress).repair(manifest)
        publish_again(store, repaired)
    write_report(store)
    print_outcome(store, manifest, repaired)
    return EXIT_DONE


def _refuse_other_columns(store: Store, manifest: Manifest) -> None:
    """RequestError if further shards would have columns that those of the dataset have not."""
    if missing := [name for name in SAMPLE_COLUMNS if name not in manifest.columns]:
        raise RequestError(
            f"{store.url}: its shards have no column {', '.join(missing)}: another version of pairmill has built it; "
            "repair it with that one"
        )


def settings_of(stored: Mapping[str, Any], config: Any) -> BuildConfig:
    """The build's settings, with what the command overrides."""
    values: dict[str, Any] = {name: dict(value) if isinstance(value, dict) else value for name, value in stored.items()}
    values["output"] = config.dataset
    for group in ("fetch", "ray"):
        values[group] |= getattr(config, group).model_dump(mode="json", exclude_none=True)
    return validate(BuildConfig, values)


def transient_rows(marker: Marker) -> dict[str, int]:
    """{transient reason: input rows} of a record."""
    reasons = {name.removeprefix(_REASON): n for name, n in marker.counts.items() if name.startswith(_REASON) and n}
    return {reason: number for reason, number in reasons.items() if is_transient(reason)}


def group_records(journal: Journal, number: int, rows_per_unit: int) -> list[list[Marker]]:
    """The records with something to try again, as generation `number` finds them, together as many as a fetch unit."""
    groups: list[list[Marker]] = []
    room = 0
    for marker in record_markers(journal, before=number).values():
        if num_rows := sum(transient_rows(marker).values()):
            if num_rows > room:
                groups.append([])
                room = rows_per_unit
            groups[-1].append(marker)
            room -= num_rows
    return groups


@dataclass(frozen=True, kw_only=True)
class Repair:
    """One generation. Every stage is planned from the markers before it, so it may be stopped and go on anywhere."""

    config: BuildConfig
    store: Store
    run_stage: RunStage
    ledgers: Any
    manifest: Manifest
    """The dataset before."""

    @property
    def number(self) -> int:
        return len(self.manifest.repairs) + 1

    def run(self) -> Manifest:
        """Do what is left of every stage; returns the manifest that is to be published."""
        groups = group_records(Journal(self.store), self.number, self.config.plan.rows_per_unit)
        records = tuple(tuple(WorkFile.of(marker, "record.parquet") for marker in group) for group in groups)
        planned = self.run_stage(PlanStage(store=self.store, groups=records, name=self._name("plan")))
        fetch = FetchStage.of(self.config, self.store, planned)
        fetched = self.run_stage(replace(fetch, name=self._name("fetch"), ledgers=self.ledgers))
        earlier, num_earlier = known_shards(self.config, len(self.manifest.shards))
        context = Context(
            config=self.config,
            store=self.store,
            run_stage=self.run_stage,
            generation=self.number,
            known=(*self.manifest.shards, *earlier),
            num_known=self.manifest.num_samples + num_earlier,
        )
        packed, judged = self._write(curate(context, fetched))
        changes = tuple(
            Change(before=before, verdicts=WorkFile.of(verdicts, "record.parquet"))
            for group, verdicts in zip(groups, judged.values(), strict=True)
            for before in group
        )
        self.run_stage(UpdateStage(store=self.store, changes=changes, name=self._name("record")))
        before: Counter[str] = Counter()
        for group in groups:
            for marker in group:
                before.update(transient_rows(marker))
        history = {
            "num_rows": before.total(),
            "before": dict(sorted(before.items())),
            "after": total_counts(judged),
            "first_shard": len(self.manifest.shards),
            "num_shards": len(packed),
        }
        recorded = record_markers(Journal(self.store), before=self.number + 1)
        return extend_manifest(self.store, self.manifest, list(packed.values()), recorded, history)

    def _write(self, curated: Curated) -> tuple[dict[str, Marker], dict[str, Marker]]:
        """Stages pack and verdict: as those of a build, behind the shards that are there."""
        size, first_shard = self.config.pack.samples_per_shard, len(self.manifest.shards)
        pack = PackStage(
            store=self.store,
            shards=tuple(tuple(parts) for parts in cut_shards(curated.units, curated.num_kept, size)),
            drops=curated.drops,
            alternatives=curated.alternatives,
            samples_per_shard=size,
            more_columns=more_columns(self.config),
            first_shard=first_shard,
            name=self._name("pack"),
        )
        judge = RecordStage(
            store=self.store,
            decided=curated.units,
            num_kept=curated.num_kept,
            drops=curated.drops,
            samples_per_shard=size,
            first_shard=first_shard,
            generation=self.number,
            name=self._name("verdict"),
        )
        return self.run_stage(pack), self.run_stage(judge)

    def _name(self, stage: str) -> str:
        return stage_name(self.number, stage)


def publish_again(store: Store, manifest: Manifest) -> None:
    """Replace manifest.json, at once and as a whole."""
    store.write_bytes(MANIFEST_FILE, manifest.to_json())


def print_outcome(store: Store, before: Manifest, after: Manifest) -> None:
    """What was tried again, and what became of it."""
    repair = after.repairs[-1]
    print(f"tried again: {repair['num_rows']:,} rows = {_counts_text(repair['before'])}")
    print(f"now: {_counts_text(repair['after'])}")
    left = sum(number for reason, number in repair["after"].items() if _may_pass(reason))
    if left:
        print(f"left for another repair: {left:,} rows")
    elif repair["after"]["kept"] + repair["after"].get(REPEATED_PAIR, 0) == repair["num_rows"]:
        print("everything was recovered")
    else:
        print("nothing is left to try again: the rest failed for good")
    added = after.shards[len(before.shards) :]
    names = f", new: {added[0].index:05}..{added[-1].index:05}" if added else ", none new"
    print(f"dataset: {store.url} ({after.num_samples:,} samples in {len(after.shards):,} shards{names})")
    print(f"manifest: {store.url_of(MANIFEST_FILE)}")


def _may_pass(name: str) -> bool:
    return name not in ("kept", REPEATED_PAIR) and is_transient(name)


def _counts_text(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (item[0] != "kept", -item[1], item[0]))
    return ", ".join(f"{name} {number:,}" for name, number in ordered)
