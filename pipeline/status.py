"""The downloads of a build so far, for `pairmill status`: what came, and what did not, why and from where."""

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.config import REQUIRED, Config, key
from cluster.errors import EXIT_DONE
from cluster.journal import Journal, Marker
from cluster.progress import REASON_PREFIX
from cluster.store import Store
from pipeline.downloads import COLUMNS, Tally, Totals, size_text, status_name, tally_downloads
from pipeline.generations import all_markers
from pipeline.reasons import sentence
from pipeline.selection import read_table
from pipeline.timings import read_timings

MAX_ROWS = 200_000
NUM_HOSTS_SHOWN = 10


class StatusConfig(Config):
    """`python -m pipeline status OUT`."""

    dataset: str = key(REQUIRED, "folder or URL of a build, finished or not", min_length=1)


def status_command(config: StatusConfig) -> int:
    """Print how the downloads went; nothing while there are none."""
    store = Store(config.dataset)
    markers = all_markers(Journal(store), "fetch")
    if markers:
        print_downloads(store, markers, Console())
    return EXIT_DONE


def print_downloads(store: Store, markers: Sequence[Marker], console: Console) -> None:
    """Totals, then tables by reason, status and host."""
    totals = Totals.of(markers, read_timings(store))
    console.print(totals_text(totals), highlight=False)
    console.print(_reasons(markers))
    tables, is_all = _sampled(store, markers)
    if not tables:
        console.print("work/fetch/ was removed: hosts and statuses are in the report", highlight=False)
        return
    downloads = tally_downloads(tables)
    note = "" if is_all else f", of {sum(table.num_rows for table in tables):,} pairs, a random sample"
    statuses = [(status_name(status), tally) for status, tally in downloads.statuses()]
    console.print(_tally_table("By last answer" + note, "answer", statuses))
    console.print(_tally_table("Hosts with most pairs" + note, "host", downloads.largest_hosts()[:NUM_HOSTS_SHOWN]))
    if failing := downloads.failing_hosts()[:NUM_HOSTS_SHOWN]:
        console.print(_tally_table("Hosts with most failures" + note, "host", failing))


def totals_text(totals: Totals) -> str:
    """Two lines."""
    speeds = [f"{totals.images_per_worker_s:,.1f} images/s a worker"]
    if totals.images_per_s:  # a command has finished the stage
        speeds.insert(0, f"{totals.images_per_s:,.1f} images/s, {size_text(totals.bytes_per_s)}/s")
    return (
        f"downloads: {totals.num_images:,} images, {size_text(totals.size_bytes)}, {totals.num_requests:,} requests, "
        f"{totals.num_retries:,} of them retries\nspeed: {'; '.join(speeds)}"
    )


def _reasons(markers: Sequence[Marker]) -> Table:
    counts: Counter[str] = Counter()
    for marker in markers:
        counts.update(marker.counts)
    table = _numbers_table("By reason", "reason", ("rows", "share"), "meaning")
    for name, number in counts.most_common():
        if name.startswith(REASON_PREFIX):
            reason = name.removeprefix(REASON_PREFIX)
            meaning = "downloaded and decoded" if reason == "ok" else sentence(reason)
            table.add_row(reason, f"{number:,}", f"{number / counts['rows']:.1%}", meaning)
    return table


def _sampled(store: Store, markers: Sequence[Marker]) -> tuple[list[pa.Table], bool]:
    """Rows of the first finished units, up to about MAX_ROWS, and whether these are all."""
    tables: list[pa.Table] = []
    for marker in markers:
        if sum(table.num_rows for table in tables) >= MAX_ROWS:
            return tables, False
        try:
            tables.append(read_table(store, marker.path_of("rows.parquet"), COLUMNS))
        except FileNotFoundError:  # a finished build's work/ may be removed
            return [], False
    return tables, True


def _tally_table(title: str, what: str, tallies: Sequence[tuple[str, Tally]]) -> Table:
    table = _numbers_table(title, what, ("pairs", "images", "share", "failed", "requests", "bytes"), "main reason")
    for name, tally in tallies:
        numbers = (tally.num_pairs, tally.num_images, f"{tally.image_share:.1%}", tally.num_failed, tally.num_requests)
        cells = [number if isinstance(number, str) else f"{number:,}" for number in numbers]
        table.add_row(name, *cells, size_text(tally.size_bytes), tally.main_reason)
    return table


def _numbers_table(title: str, first: str, numbers: Sequence[str], last: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(last, overflow="fold")
    return table
