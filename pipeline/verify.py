"""`pairmill verify OUT`: is every file of a dataset there, whole, and what the manifest and the journal say?

With `--repair` what is damaged is made again, see `pipeline.mend`; without it nothing is written.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from pydantic import create_model

from cluster.config import REQUIRED, Config, key
from cluster.errors import EXIT_DONE, EXIT_FAILED
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.session import RayConfig
from cluster.store import Store
from pipeline.config import FetchConfig
from pipeline.damage import Damage, file_problem
from pipeline.generations import generation_of, num_repairs
from pipeline.journal_check import check_markers, read_journal, vouched_files
from pipeline.manifest import Manifest, read_manifest
from pipeline.repair import overrides
from pipeline.shard_check import check_counts, check_shard, check_strays

VerifyConfig = create_model(
    "VerifyConfig",
    __base__=Config,
    dataset=(str, key(REQUIRED, "folder or URL of a finished dataset", min_length=1)),
    repair=(bool, key(False, "make again what is damaged, as `--repair` does; needs work/")),
    decode=(int | None, key(16, "images of each shard to decode, evenly spread; null: all", unit="images", ge=0)),
    work=(bool, key(True, "read the files in work/ as well, from which the rest can be made again")),
    threads=(int, key(min(8, os.cpu_count() or 1), "files read at once", unit="threads", ge=1)),
    fetch=(overrides(FetchConfig, "VerifyFetch"), key({}, "downloading, where a repair has to")),
    ray=(overrides(RayConfig, "VerifyRay"), key({}, "Ray, for a repair")),
)


def verify_command(config: Any) -> int:
    """Check a dataset, print what is damaged and what to do, or do it; the exit status."""
    store, manifest = read_manifest(config.dataset)
    damages = verify(store, manifest, decode=config.decode, threads=config.threads, work=config.work)
    if num_repairs(Journal(store)) > len(manifest.repairs):
        print(f"{store.url}: a repair was interrupted; `pairmill repair {store.url}` goes on with it")
    _print_damages(store, damages)
    if damages and config.repair:
        from pipeline.mend import mend

        for refusal in mend(store, manifest, damages, config):
            print(f"{store.url}: not repaired: {refusal}")
        before = damages
        damages = verify(store, manifest, decode=config.decode, threads=config.threads, work=config.work)
        print(f"{store.url}: {len(before)} damaged, {len(damages)} after the repair")
        _print_damages(store, damages)
    if damages:
        print(f"{store.url}: {len(damages)} damaged; {remedy(store, damages)}")
        return EXIT_FAILED
    size_gib = sum(shard.tar.size_bytes + shard.parquet.size_bytes for shard in manifest.shards) / 2**30
    print(
        f"{store.url}: whole: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards "
        f"({size_gib:,.3f} GiB), all sizes and sha256 as in manifest.json"
    )
    return EXIT_DONE


def verify(
    store: Store, manifest: Manifest, *, decode: int | None = 16, threads: int = 4, work: bool = True
) -> list[Damage]:
    """Everything that is wrong with a dataset, in order of its files. work: read the intermediate files, too."""
    journal = Journal(store)
    # A repair that was interrupted has packed shards and replaced records that manifest.json does not speak of yet.
    is_amid_repair = num_repairs(journal) > len(manifest.repairs)
    found = [*check_counts(manifest), *([] if is_amid_repair else check_strays(store, manifest))]
    with Progress(title=f"verify {store.url}") as progress, ThreadPoolExecutor(threads) as pool:
        stages = read_journal(journal, len(manifest.repairs), pool)
        found += check_markers(stages)
        pinned = {file.path: file for shard in manifest.shards for file in (shard.tar, shard.parquet)}
        vouched = vouched_files(stages)
        found += [
            Damage(path=path, problem="the marker of its unit vouches for other bytes than manifest.json", unit=unit)
            for path, (file, unit) in vouched.items()
            if path in pinned and file != pinned[path]
        ]
        wanted = [file for path, file in vouched.items() if path not in pinned and _is_wanted(path, is_amid_repair)]
        files = [each for each in wanted if work or not each[0].path.startswith("work/")]
        checks: list[Callable[[], tuple[list[Damage], int]]] = [
            *(lambda s=shard: (check_shard(store, manifest, s, decode), s.num_samples) for shard in manifest.shards),
            *(lambda f=each: (list(_check_file(store, *f)), 0) for each in _unless_all_gone(store, files)),
        ]
        progress.start("verify", num_units=len(checks))
        for task in as_completed([pool.submit(check) for check in checks]):
            damages, num_samples = task.result()
            found += damages
            progress.advance(Marker(stage="verify", unit="", attempt="", outputs=(), counts={"rows": num_samples}))
        progress.finish()
    return sorted(found, key=lambda damage: damage.path)


def remedy(store: Store, damages: Sequence[Damage]) -> str:
    """What to do about damages, for people."""
    made = [damage for damage in damages if damage.unit is not None]
    lines = []
    if made and not store.find("work"):
        lines.append(
            "work/ was removed, so nothing can be made again from it: put back copies of the damaged files, or "
            "build into a new output"
        )
    elif made:
        lines.append(f"`pairmill verify {store.url} --repair` makes them again")
    if others := [store.url_of(damage.path) for damage in damages if damage.unit is None]:
        lines.append("not part of the dataset, or not made by one unit: " + ", ".join(others))
    return "\n".join(lines)


def _print_damages(store: Store, damages: Sequence[Damage]) -> None:
    for damage in damages:
        print(f"{store.url_of(damage.path)}: {damage.problem}")


def _is_wanted(path: str, is_amid_repair: bool) -> bool:
    return path.startswith("work/") or not is_amid_repair


def _unless_all_gone(store: Store, files: Sequence[Any]) -> Iterator[Any]:
    """The files to check: those in work/ not, if it was removed as a whole (for a build, or a repair), as it may be."""
    there = {generation_of(entry.path.split("/")[1]) for entry in store.find("work")}
    for file, unit in files:
        if not file.path.startswith("work/") or generation_of(unit[0]) in there:
            yield file, unit


def _check_file(store: Store, file: Any, unit: tuple[str, str]) -> Iterator[Damage]:
    if problem := file_problem(store, file):
        yield Damage(path=file.path, problem=problem, unit=unit)
