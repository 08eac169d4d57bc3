"""A marker says what its unit was made from, whatever form the stage refers to it in."""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.executor import InlineExecutor, Unit, run_stage
from cluster.journal import Journal, Marker, UnitOutput
from cluster.lineage import WHOLE_STAGE_FROM, lineage, output_sha256, stage_digest
from cluster.progress import Progress
from cluster.store import Store


@dataclass(frozen=True, kw_only=True)
class Letters:
    """Writes a letter a unit, or those of the files it is given."""

    store: Store
    letters: str
    paths: tuple[str, ...] = ()
    first: Marker | None = None
    name: str = "letters"
    num_cpus: float = 1.0
    memory_bytes: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "letters": ""}

    def units(self) -> list[Unit]:
        return [Unit(id=f"{place:05}", params={"letter": letter}) for place, letter in enumerate(self.letters)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        read = [self.store.read_bytes(path) for path in (*self.paths, *unit.params.get("paths", ()))]
        output.path("text").write_bytes(unit.params["letter"].encode() + b"".join(read))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(Store(str(tmp_path / "run")))


def run(stage: Any, journal: Journal) -> dict[str, Marker]:
    return run_stage(stage, journal, InlineExecutor(), Progress(Console(file=io.StringIO())))


def paths(markers: dict[str, Marker]) -> tuple[str, ...]:
    return tuple(marker.path_of("text") for marker in markers.values())


def test_what_a_stage_refers_to_by_path_or_marker_is_named_with_its_content(journal: Journal) -> None:
    first = run(Letters(store=journal.store, letters="abc"), journal)
    assert [marker.inputs for marker in first.values()] == [{}, {}, {}]
    second = Letters(store=journal.store, letters="de", paths=paths(first)[:1], first=first["00002"], name="second")
    for marker in run(second, journal).values():
        assert marker.inputs == {f"letters/{unit}/text": first[unit].outputs[0].sha256 for unit in ("00000", "00002")}
        assert Marker.read(journal.store, f"journal/second/{marker.unit}.json") == marker


def test_a_unit_depends_on_its_own_parameters_and_not_on_its_neighbours(journal: Journal) -> None:
    first = paths(run(Letters(store=journal.store, letters="abc"), journal))

    class Each(Letters):
        def units(self) -> list[Unit]:
            return [
                replace(unit, params={**unit.params, "paths": first[i : i + 1]})
                for i, unit in enumerate(super().units())
            ]

    made = run(Each(store=journal.store, letters="xyz", name="each"), journal)
    assert [list(marker.inputs or {}) for marker in made.values()] == [[f"letters/0000{n}/text"] for n in range(3)]


def test_a_whole_stage_is_one_digest_that_tells_a_changed_unit(journal: Journal) -> None:
    first = run(Letters(store=journal.store, letters="a" * WHOLE_STAGE_FROM), journal)
    (made,) = run(Letters(store=journal.store, letters="x", paths=paths(first), name="all"), journal).values()
    assert made.inputs == {"letters/*/text": stage_digest(first, "text")}
    other = replace(first["00007"], outputs=(replace(first["00007"].outputs[0], sha256="0" * 64),))
    assert stage_digest({**first, "00007": other}, "text") != stage_digest(first, "text")


def test_made_again_with_the_same_bytes_is_the_same_input(journal: Journal) -> None:
    stage = Letters(store=journal.store, letters="ab")
    first = run(stage, journal)
    second = Letters(store=journal.store, letters="c", paths=paths(first), name="second")
    (made,) = run(second, journal).values()
    journal.store.remove("journal/letters/00001.json")
    again = run(stage, journal)
    assert again["00001"].attempt != first["00001"].attempt
    follow = Letters(store=journal.store, letters="c", paths=paths(again), name="second")
    assert lineage(journal, follow)(follow.units()[0]) == made.inputs
    assert output_sha256(again["00001"], "text") == made.inputs["letters/00001/text"]  # type: ignore[index]


def test_markers_of_earlier_versions_are_read_and_flipped_bits_in_new_ones_noticed(journal: Journal) -> None:
    (marker,) = run(Letters(store=journal.store, letters="a"), journal).values()
    old = b'{"stage": "s", "unit": "u", "attempt": "a", "outputs": [], "counts": {"rows": 1}, "seconds": 0.5}'
    assert Marker.from_json(old).inputs is None
    data = marker.to_json()
    assert Marker.from_json(data) == marker
    with pytest.raises(ValueError, match="check sum"):
        Marker.from_json(data.replace(b'"size_bytes": 1', b'"size_bytes": 3'))


def test_what_was_made_from_a_unit_is_made_again_with_it(journal: Journal) -> None:
    first = run(Letters(store=journal.store, letters="ab"), journal)
    both = Letters(store=journal.store, letters="c", paths=paths(first), name="both")
    assert journal.store.read_bytes(paths(run(both, journal))[0]) == b"cab"
    journal.store.remove("journal/letters/00001.json")
    now = run(Letters(store=journal.store, letters="ax"), journal)
    both = replace(both, paths=paths(now))
    assert journal.store.read_bytes(paths(run(both, journal))[0]) == b"cax"
