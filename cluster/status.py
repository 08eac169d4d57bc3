"""`pairmill status OUT`: how far a run is, read from what it left in its folder; the run itself is not asked."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.errors import EXIT_DONE, RequestError
from cluster.journal import Journal
from cluster.progress import REASON_PREFIX
from cluster.run import require_run
from cluster.store import Store

HELP = """usage: pairmill status RUN

Prints the stages of a build with units done and counts by reason and how its downloads went (reasons, HTTP statuses,
hosts, images/s), or the last step and losses of a training run."""


def status_command(words: Sequence[str]) -> int:
    """Print the state of the run in a folder."""
    if len(words) != 1 or words[0] in ("--help", "-h"):
        if not words or words[0] not in ("--help", "-h"):
            raise RequestError("give the output folder of one run: pairmill status OUT")
        print(HELP)
        return EXIT_DONE
    store, record = require_run(words[0])
    console = Console()
    console.print(f"{record['kind']} run in {store.url}, created {record['created']}", highlight=False, soft_wrap=True)
    if record["kind"] == "build":
        _print_build(store, console)
        _print_downloads(store)
    else:
        _print_training(store, console)
    return EXIT_DONE


def _print_build(store: Store, console: Console) -> None:
    journal = Journal(store)
    table = Table("stage", "units", "rows", "busy", "counts by reason")
    for name, num_units in _stages(store):
        markers = journal.markers(name)
        counts: Counter[str] = Counter()
        for marker in markers.values():
            counts.update(marker.counts)
        reasons = [(key[len(REASON_PREFIX) :], n) for key, n in counts.most_common() if key.startswith(REASON_PREFIX)]
        busy_s = sum(marker.seconds for marker in markers.values())
        table.add_row(
            name,
            f"{len(markers)}/{num_units}",
            f"{counts['rows']:,}" if counts["rows"] else "",
            f"{busy_s:,.1f} s",
            ", ".join(f"{reason} {number:,}" for reason, number in reasons),
        )
    console.print(table)
    finished = store.exists("manifest.json")
    console.print(
        "finished: manifest.json is published" if finished else "not finished: run the same build command to go on",
        highlight=False,
    )


def _print_downloads(store: Store) -> None:
    """The package that downloads knows what there is to tell of it."""
    from cluster.cli import module_command

    sys.stdout.flush()
    subprocess.run(module_command("pipeline", ["status", store.url]), check=False)


def _stages(store: Store) -> list[tuple[str, int]]:
    """(stage, number of units) of every stage that was announced, in the order they began."""
    found = []
    for entry in store.find("journal"):
        if entry.path.count("/") == 1 and entry.path.endswith(".json"):
            plan: dict[str, Any] = json.loads(store.read_bytes(entry.path))
            found.append((plan.get("started", 0.0), entry.path[len("journal/") : -len(".json")], plan["num_units"]))
    return [(name, num_units) for _, name, num_units in sorted(found)]


def _print_training(store: Store, console: Console) -> None:
    logs = [entry.path for entry in store.find("metrics") if entry.path.endswith("rank0.jsonl")]
    text = store.read_bytes(logs[0]).decode() if logs else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # what follows the last line break is still being written
    if not lines:
        console.print("no step has been logged yet")
        return
    last: dict[str, Any] = json.loads(lines[-1])
    table = Table("metric", "last value")
    for name, value in last.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    console.print(table)
    if isinstance(last.get("time"), float):
        console.print(f"last step logged {time.time() - last['time']:.0f} s ago", highlight=False)
    checkpoints = [entry.path for entry in store.find("checkpoints") if entry.path.endswith(".json")]
    published = [path for path in checkpoints if path.count("/") == 1]
    console.print(f"checkpoints: {', '.join(published) or 'none yet'}", highlight=False)
