"""Lists of words, URLs and hosts: read once when a build begins, then from a copy in its own folder.

Stage `rule-lists`, a unit for each key that has a list: entries.txt, one a line. So workers need not reach the file
that the user named, and a build that goes on uses the list that it began with.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec

from cluster.errors import RequestError
from cluster.executor import Unit
from cluster.journal import Journal, Marker, UnitOutput
from cluster.store import Store
from pipeline.rules.config import LIST_KEYS, CurateConfig
from pipeline.workfile import WorkFile

logger = logging.getLogger(__name__)
FILE = "file:"
STAGE = "rule-lists"


@dataclass(frozen=True, kw_only=True)
class Entries:
    """A list in the folder of its build."""

    store: Store = field(compare=False)  # another object in every task: what is cached by list stays valid
    file: WorkFile

    def read(self) -> list[str]:
        """Every entry once. RunError if the copy is missing or damaged."""
        return self.file.read(self.store).decode().split("\n")[:-1]


def read_lists(config: CurateConfig) -> dict[str, tuple[str, ...]]:
    """{key of CurateConfig: its entries}. RequestError when a file is missing, unreadable or without entries."""
    return {name: _read(f"curate.{name}", getattr(config, name)) for name in LIST_KEYS if getattr(config, name)}


def _read(key: str, values: Sequence[str]) -> tuple[str, ...]:
    found: list[str] = []
    for value in values:
        found += _file_entries(key, value.removeprefix(FILE)) if value.startswith(FILE) else [value.strip()]
    entries = {" ".join(entry.split()) for entry in found} - {""}
    if not entries:
        raise RequestError(f"{key}: holds no entry; name some, or leave it out")
    return tuple(sorted(entries))


def _file_entries(key: str, url: str) -> list[str]:
    try:
        with fsspec.open(url, "rt", encoding="utf-8-sig", compression="infer") as file:
            lines = [line.strip() for line in file]
    except FileNotFoundError:
        raise RequestError(f"{key}: {url}: no such file; give a file with one entry a line") from None
    except (OSError, ValueError, ImportError) as error:
        raise RequestError(f"{key}: {url}: cannot be read as text ({error}); give a UTF-8 file") from None
    if not any(lines):
        raise RequestError(f"{key}: {url}: holds no entry; give a file with one entry a line, or leave it out")
    return lines


@dataclass(frozen=True, kw_only=True)
class ListStage:
    """Copies of lists. `lists`: the entries by key."""

    lists: Mapping[str, tuple[str, ...]]
    name: str = STAGE
    num_cpus: float = 1.0
    memory_bytes: int = 512 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        """A worker gets its list with the unit."""
        return {**self.__dict__, "lists": {}}

    def units(self) -> Sequence[Unit]:
        return [Unit(id=key, params={"entries": entries}) for key, entries in sorted(self.lists.items())]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        output.path("entries.txt").write_bytes(_content(unit.params["entries"]))
        output.count("entries", len(unit.params["entries"]))


def copy_lists(
    config: CurateConfig, store: Store, run_stage: Callable[[Any], Mapping[str, Marker]]
) -> dict[str, Entries]:
    """The lists of a build by key, copied into its folder unless they are there.

    RequestError as `read_lists`, and when a file has changed since the build began.
    """
    there = Journal(store).markers(STAGE)
    if not (wanted := {name for name in LIST_KEYS if getattr(config, name)}):
        return {}
    try:
        lists = read_lists(config)
    except RequestError:
        if wanted - there.keys():
            raise
        logger.warning("a file of curate.* is gone; this build has a copy of it")
    else:
        _refuse_changed(there, lists, store)
        there = dict(run_stage(ListStage(lists=lists)))
    return {name: Entries(store=store, file=WorkFile.of(there[name], "entries.txt")) for name in wanted}


def _refuse_changed(there: Mapping[str, Marker], lists: Mapping[str, tuple[str, ...]], store: Store) -> None:
    for name, marker in there.items():
        if name in lists and WorkFile.of(marker, "entries.txt").read(store) != _content(lists[name]):
            raise RequestError(
                f"curate.{name}: its file has other entries than when this build began; put it back, or choose another "
                "output"
            )


def _content(entries: Sequence[str]) -> bytes:
    return "".join(f"{entry}\n" for entry in entries).encode()
