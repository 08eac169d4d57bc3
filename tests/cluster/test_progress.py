"""Progress: a live display on a terminal, plain lines elsewhere."""

import io

from rich.console import Console

from cluster.journal import Marker
from cluster.progress import Progress


def marker(unit: str, **counts: int) -> Marker:
    return Marker(stage="fetch", unit=unit, attempt="a", outputs=(), counts=counts)


def fetch_two_of_three(progress: Progress) -> None:
    with progress:
        progress.start("fetch", num_units=3, done=[marker("0", rows=100, **{"reason:ok": 90})])
        progress.advance(marker("1", rows=100, **{"reason:ok": 80, "reason:timeout": 20}))


def test_elsewhere_plain_lines_count_by_reason() -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=60))
    fetch_two_of_three(progress)
    progress.finish()
    lines = out.getvalue().splitlines()
    assert lines[0] == "fetch: 3 units (1 already done)"
    assert lines[1].startswith("fetch: done, 2/3 units, 200 rows, ")
    assert lines[1].endswith("ok 170, timeout 20")


def test_on_a_terminal_a_bar_moves() -> None:
    out = io.StringIO()
    fetch_two_of_three(Progress(Console(file=out, force_terminal=True, width=160), title="pairmill build"))
    shown = out.getvalue()
    assert "pairmill build" in shown
    assert "█" * 16 + "░" * 8 in shown
    assert "2/3 units, 200 rows" in shown


def test_rows_of_an_earlier_run_do_not_count_as_speed() -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out))
    with progress:
        progress.start("fetch", num_units=1, done=[marker("0", rows=1000)])
        progress.finish()
    assert "rows/s" not in out.getvalue()
