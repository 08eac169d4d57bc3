"""`pairmill build`: URL lists to a dataset, one stage after the other. Running it again goes on where it stopped."""

import contextlib
import logging
import time
from dataclasses import replace
from functools import cached_property
from typing import Any

from cluster.errors import EXIT_DONE, RequestError, RunError
from cluster.executor import Executor, RayExecutor, run_stage
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.run import open_run
from cluster.session import ray_session, require_reachable
from cluster.store import Store
from pipeline.adopt import Base, MissingStage, RevisitStage, fetch_markers
from pipeline.against import AgainstStage, known_shards, open_earlier
from pipeline.balance.concepts import require_concepts
from pipeline.config import BuildConfig
from pipeline.curation.chain import curate
from pipeline.curation.context import Context, Curated
from pipeline.dry_run import print_finished, print_outcome
from pipeline.fetch import FetchStage
from pipeline.generations import num_repairs
from pipeline.ledgers import Ledgers, LocalLedgers, RayLedgers
from pipeline.manifest import MANIFEST_FILE, Manifest, read_manifest
from pipeline.models.measure import require_usable
from pipeline.pack import PackStage, cut_shards, more_columns
from pipeline.plan import OrderStage, ReadStage
from pipeline.publish import make_manifest, publish, refuse_empty
from pipeline.record import RecordStage, total_counts
from pipeline.repair import Repair
from pipeline.report import REPORT_FILE, write_report
from pipeline.rules.require import require_rules
from pipeline.rules.user import require_on_workers
from pipeline.timings import Timing, add_timing, images_per_s, read_timings

logger = logging.getLogger(__name__)

WORK_FORMAT = 2
"""Grows when stages leave other files for one another: such a build cannot be finished by another version."""


def build_command(config: BuildConfig) -> int:
    """Build (or go on building, or only find) a dataset, and print where everything is."""
    if _is_finished(config.output):
        return _already_done(config)
    read = open_inputs(config)  # looks at the lists: nothing is written when one is missing or unreadable
    require_usable(config)
    require_rules(config.curate, config.output, read.columns())
    require_concepts(config.balance)
    require_reachable(config.ray)
    run = open_run(config.output, "build", config, WORK_FORMAT)
    if isinstance(read, ReadStage):
        read.refuse_changed(run.journal)
    if not config.fetch.contact:
        logger.warning("fetch.contact is not set: sites cannot tell you when your requests trouble them")
    with ray_session(config.ray) as executor, Progress(title=f"build {run.store.url}") as progress:
        require_on_workers(config.curate, executor)
        build = Build(config, run.store, executor, progress)
        done = build.decide(read)[1] if config.curate.dry_run else build.run(read)
    if isinstance(done, Curated):
        print_outcome(config, run.store, done)
        return EXIT_DONE
    write_report(run.store)
    print_summary(run.store, done)
    return EXIT_DONE


def open_inputs(config: BuildConfig) -> ReadStage | Base:
    """What a build begins with. RequestError when something is missing, unreadable or not what it has to be."""
    open_earlier(config)
    return Base.of(config.base) if config.base is not None else ReadStage.of(config)


def _is_finished(output: str) -> bool:
    try:
        return Store(output).exists(MANIFEST_FILE)
    except (ValueError, ImportError, RunError):  # no such place: open_run says so
        return False


def _already_done(config: BuildConfig) -> int:
    """Say where a finished dataset is. RequestError when the request differs from what was built."""
    run = open_run(config.output, "build", config)
    try:
        read = open_inputs(config)
    except RequestError:  # the lists may be gone by now
        read = None
    if isinstance(read, ReadStage):
        with contextlib.suppress(FileNotFoundError):  # work/ may be removed: then names and sizes have to do
            read.refuse_changed(run.journal)
    manifest = read_manifest(config.output)[1]
    if config.curate.dry_run:
        print_finished(config, run.store, manifest)
        return EXIT_DONE
    if not run.store.exists(REPORT_FILE):
        write_report(run.store)
    print("already done; nothing was changed")
    print_summary(run.store, manifest)
    return EXIT_DONE


class Build:
    """The sequence of stages of one build. Every stage is planned from the markers of those before it."""

    def __init__(self, config: BuildConfig, store: Store, executor: Executor, progress: Progress) -> None:
        self._config = config
        self._store = store
        self._journal = Journal(store)
        self._executor = executor
        self._progress = progress
        self._stages: list[str] = []

    def run(self, read: ReadStage | Base) -> Manifest:
        """Do what is left of every stage and publish the manifest. RunError if no pair is kept."""
        manifest = self.first(read)
        for stage in self._stages:
            self._journal.sweep(stage)
        while len(manifest.repairs) < num_repairs(self._journal):  # manifest.json of a repaired dataset was removed
            manifest = self.repair(manifest)
        publish(self._store, manifest)
        return manifest

    def first(self, read: Any) -> Manifest:
        """The build itself without its repairs: all but the publishing of its manifest, which is returned.

        read: what `open_inputs` gives, or another stage with the markers of `plan-read`.
        """
        sources, curated = self.decide(read)
        packed, recorded = self._write(curated)
        refuse_empty(total_counts(recorded), self._config.input)
        return make_manifest(self._store, self._config, list(sources.values()), list(packed.values()), recorded)

    def decide(self, read: Any) -> tuple[dict[str, Marker], Curated]:
        """(markers of plan-read, what is kept): everything up to packing."""
        config, store = self._config, self._store
        sources, fetched = self._revisit(read) if isinstance(read, Base) else self._fetch(read)
        known, num_known = known_shards(config)
        context = Context(config=config, store=store, run_stage=self._stage, known=known, num_known=num_known)
        return sources, curate(context, fetched)

    def _fetch(self, read: Any) -> tuple[dict[str, Marker], dict[str, Marker]]:
        """(markers of plan-read, of fetch)."""
        sources = self._stage(read)
        if number := sum(marker.counts.get("hash_of_stored", 0) for marker in sources.values()):
            logger.warning(
                "%s imported images came without the sha256 of their download: theirs is of the stored bytes, as the "
                "column hash_of_stored says; exact duplicates of them are found only among such images",
                f"{number:,}",
            )
        return sources, self._download(self._plan(sources))

    def _revisit(self, base: Base) -> tuple[dict[str, Marker], dict[str, Marker]]:
        """The same markers, of what the base has read and downloaded."""
        journal, store, config = self._journal, self._store, self._config
        sources = base.adopt_lists(journal)
        ordered = self._plan(sources)
        units = base.units()
        revisit = RevisitStage(
            store=store,
            units_of_base=tuple(units),
            planned=tuple(marker.path_of("rows.parquet") for marker in ordered.values()),
            fetch_missing=config.fetch_missing,
        )
        revisited = self._stage(revisit)
        fetched = fetch_markers(journal, units, revisited)
        base.adopt_scores(journal, revisited)
        if config.fetch_missing:
            missing = MissingStage.of(store, revisited, base.next_number(), config.plan.rows_per_unit)
            fetched |= self._download(self._stage(missing))
        fetched = dict(sorted(fetched.items()))
        journal.announce("fetch", list(fetched))
        journal.seen["fetch"] = fetched
        return sources, fetched

    def _plan(self, sources: dict[str, Marker]) -> dict[str, Marker]:
        """The markers of plan-order."""
        earlier = self._stage(self._against()) if self._config.against else {}
        order = OrderStage.of(self._config, self._store, sources, earlier)
        return self._stage(order.with_rules(self._config.curate, self._stage))

    def _against(self) -> AgainstStage:
        stage = AgainstStage(datasets=open_earlier(self._config), seed=self._config.seed)
        stage.refuse_changed(self._journal)
        return stage

    def _download(self, ordered: dict[str, Marker]) -> dict[str, Marker]:
        """Stage fetch."""
        stage = FetchStage.of(self._config, self._store, ordered)
        return self._stage(replace(stage, ledgers=self._ledgers))

    def repair(self, manifest: Manifest) -> Manifest:
        """The next generation of a dataset: all but the publishing of its manifest, which is returned."""
        repair = Repair(
            config=self._config, store=self._store, run_stage=self._stage, ledgers=self._ledgers, manifest=manifest
        )
        return repair.run()

    @cached_property
    def _ledgers(self) -> Ledgers:
        """Limits per host hold over all tasks of this command."""
        if isinstance(self._executor, RayExecutor):
            return RayLedgers.start(self._config.fetch)
        return LocalLedgers(self._config.fetch)

    def _write(self, curated: Curated) -> tuple[dict[str, Marker], dict[str, Marker]]:
        """Stages pack and record."""
        size = self._config.pack.samples_per_shard
        shards = tuple(tuple(parts) for parts in cut_shards(curated.units, curated.num_kept, size))
        pack = PackStage(
            store=self._store,
            shards=shards,
            drops=curated.drops,
            alternatives=curated.alternatives,
            samples_per_shard=size,
            more_columns=more_columns(self._config),
        )
        record = RecordStage(
            store=self._store,
            decided=curated.units,
            num_kept=curated.num_kept,
            drops=curated.drops,
            samples_per_shard=size,
        )
        return self._stage(pack), self._stage(record)

    def _stage(self, stage: Any) -> dict[str, Marker]:
        """Run a `Stage` (a frozen one, whose members the protocol would have settable) and note what it took."""
        self._stages.append(stage.name)
        done_before = self._journal.markers(stage.name)
        started = time.monotonic()
        markers = run_stage(stage, self._journal, self._executor, self._progress)
        new = [marker for unit, marker in markers.items() if unit not in done_before]
        if new:
            timing = Timing(
                stage=stage.name,
                wall_s=round(time.monotonic() - started, 3),
                num_units=len(new),
                num_rows=sum(marker.counts.get("rows", 0) for marker in new),
                num_images=sum(marker.counts.get("images", 0) for marker in new),
                num_bytes=sum(marker.counts.get("bytes", 0) for marker in new),
            )
            add_timing(self._store, timing)
        return markers


def print_summary(store: Store, manifest: Manifest) -> None:
    """Where everything is, what became of the rows, and how fast it went."""
    ordered = sorted(manifest.counts.items(), key=lambda item: (item[0] != "kept", -item[1], item[0]))
    counts = ", ".join(f"{name} {number:,}" for name, number in ordered)
    print(f"rows: {manifest.num_input_rows:,} = {counts}")
    if rate := images_per_s(read_timings(store)):
        print(f"fetch: {rate:,.1f} images/s")
    print(f"dataset: {store.url} ({manifest.num_samples:,} samples in {len(manifest.shards):,} shards)")
    print(f"shards: {store.url_of('shards')}/{{{shard_range(manifest)}}}.tar")
    print(f"manifest: {store.url_of(MANIFEST_FILE)}")
    print(f"record: {store.url_of('record')} (what became of every pair; `pairmill explain` reads it)")
    print(f"report: {store.url_of(REPORT_FILE)}")


def shard_range(manifest: Manifest) -> str:
    """The names of the shards the way webdataset and a shell expand them, such as `00000..00009`."""
    return f"{manifest.shards[0].index:05}..{manifest.shards[-1].index:05}"
