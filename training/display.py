"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_INTERVAL_S = 10.0


class TrainDisplay:
    """Shows the progress that rank 0 posts. Use as a context manager; on stderr unless a console is given."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console(file=sys.stderr)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = -LINE_INTERVAL_S
        self._shown: tuple[Any, Any] = (None, None)
        self._said: set[str] = set()

    def __enter__(self) -> "TrainDisplay":
        if self._console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rest]}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None, rest="starting ranks")
        else:
            self._say("starting ranks")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, progress: dict[str, Any]) -> None:
        """Show the newest progress; the same one again is ignored."""
        for note in progress.get("notes", []):
            if note not in self._said:
                self._said.add(note)
                self._say(note)
        state = (progress["done_steps"], progress["resumed_at"])
        if state == self._shown:
            return
        restarted = self._shown[1] is not None and state[1] != self._shown[1]
        first, self._shown = self._shown[0] is None or restarted, state
        done, total = progress["done_steps"], progress["num_steps"]
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, rest=describe(progress))
            return
        now = time.monotonic()
        if first or done == total or now - self._last_line >= LINE_INTERVAL_S:
            self._last_line = now
            resumed = f", resumed at step {progress['resumed_at']}" if first and progress["resumed_at"] else ""
            self._say(f"step {done}/{total} {describe(progress)}".rstrip() + resumed)

    def say(self, text: str) -> None:
        """A line that stays, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        self.say(f"{self._title}: {text}")


def describe(progress: dict[str, Any]) -> str:
    """Loss terms, speed and time left of one progress record."""
    parts = [f"loss {progress['loss']:.4f}"] if "loss" in progress else []
    terms = {name.partition("/")[2]: value for name, value in progress.items() if name.startswith("loss/")}
    if len(terms) > 1:
        parts += [f"{name} {value:.4f}" for name, value in terms.items()]
    if "samples_per_s" in progress:
        parts.append(f"{progress['samples_per_s']:,.0f} samples/s")
    if progress.get("eta_s") and progress["done_steps"] < progress["num_steps"]:
        parts.append(f"ETA {clock(progress['eta_s'])}")
    return " ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
