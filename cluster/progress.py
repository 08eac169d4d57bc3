"""What a person sees while units are being done: a live display on a terminal, plain lines elsewhere.

Units report counts in their markers; those called `rows` and `reason:<name>` are shown as a rate and as counts by
reason, whatever the stage.
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.journal import Marker

logger = logging.getLogger(__name__)

REASON_PREFIX = "reason:"
LINE_INTERVAL_S = 10.0


class Progress:
    """Progress of one stage after the other. Use as a context manager around `run_stage` calls."""

    def __init__(self, console: Console | None = None, title: str = "") -> None:
        self._console = console or Console(file=sys.stderr)
        self._title = title
        self._finished: list[str] = []
        self._live: Live | None = None
        self._stage = ""
        self._started = 0.0
        self._last_line = 0.0
        self._reset(0)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self._render)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def start(self, stage: str, num_units: int, done: Sequence[Marker] = ()) -> None:
        """Begin a stage; `done` are the markers that an earlier run left."""
        self._stage = stage
        self._reset(num_units)
        self._num_resumed = len(done)
        for marker in done:
            self._add(marker)
        self._rows_at_start = self._rows
        resumed = f" ({len(done)} already done)" if done else ""
        self._line(f"{stage}: {num_units} units{resumed}")

    def advance(self, marker: Marker) -> None:
        """One more unit is done."""
        self._add(marker)
        now = time.monotonic()
        if now - self._last_line >= LINE_INTERVAL_S:
            self._last_line = now
            self._line(f"{self._stage}: {self._summary()}")

    def finish(self) -> None:
        """The stage is done."""
        self._finished.append(f"{self._stage}: {self._summary()}")
        self._line(f"{self._stage}: done, {self._summary()}")
        self._stage = ""

    def _reset(self, num_units: int) -> None:
        self._num_units = num_units
        self._num_done = 0
        self._num_resumed = 0
        self._rows = 0
        self._rows_at_start = 0
        self._reasons: Counter[str] = Counter()
        self._started = time.monotonic()
        self._last_line = self._started

    def _add(self, marker: Marker) -> None:
        self._num_done += 1
        self._rows += marker.counts.get("rows", 0)
        for name, number in marker.counts.items():
            if name.startswith(REASON_PREFIX):
                self._reasons[name.removeprefix(REASON_PREFIX)] += number

    def _summary(self) -> str:
        elapsed_s = time.monotonic() - self._started
        parts = [f"{self._num_done}/{self._num_units} units"]
        new_rows = self._rows - self._rows_at_start
        if self._rows:
            parts.append(f"{self._rows:,} rows")
        if new_rows and elapsed_s > 0.1:
            parts.append(f"{new_rows / elapsed_s:,.0f} rows/s")
        done_here = self._num_done - self._num_resumed
        if done_here > 0 and self._num_done < self._num_units:
            left_s = elapsed_s / done_here * (self._num_units - self._num_done)
            parts.append(f"ETA {_clock(left_s)}")
        parts.append(_clock(elapsed_s))
        parts += [f"{name} {number:,}" for name, number in self._reasons.most_common(8)]
        return ", ".join(parts)

    def _line(self, text: str) -> None:
        if self._live is None:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _render(self) -> Table:
        table = Table.grid(padding=(0, 1))
        if self._title:
            table.add_row("", Text(self._title, style="bold"))
        for line in self._finished:
            table.add_row(Text("✓", style="green"), Text(line, style="dim"))
        if self._stage:
            share = self._num_done / self._num_units if self._num_units else 1.0
            bar = "█" * round(share * 24) + "░" * (24 - round(share * 24))
            table.add_row(Text("▸", style="cyan"), Text(f"{self._stage} {bar} {self._summary()}"))
        return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
