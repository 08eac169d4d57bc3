"""Frequent concepts keep about their limit, rare ones everything; a draw depends on the pair and the concept alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.config import parse
from cluster.errors import RequestError
from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.store import Store
from pipeline.__main__ import main
from pipeline.balance import sample
from pipeline.balance.concepts import Matcher, concept_words, read_concepts
from pipeline.balance.sample import MATCH, NO_CONCEPT, Matches, draw, probabilities
from pipeline.balance.step import balance
from pipeline.config import BuildConfig
from pipeline.curation.context import Context, Curated
from pipeline.duplicates.facts import needed_facts
from pipeline.selection import DecidedUnit, Groups

Words = Callable[..., list[str]]
CONCEPTS = [" cat ", " hot dog ", " dog ", " st . bernard "]


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("a cat", [0]),
        ("Cat, asleep", [0]),
        ("category: catalogue", []),
        ("dog  eats hot\tdog.", [1, 2]),
        ("cat cat cat", [0]),
        ("a St. Bernard!", [3]),
        ("", []),
    ],
)
def test_concepts_are_found_between_spaces_and_marks(caption: str, found: list[int]) -> None:
    assert Matcher(CONCEPTS, ignore_case=True).find(caption) == found


def test_case_may_matter() -> None:
    assert Matcher(CONCEPTS, ignore_case=False).find("Cat and cat") == [0]
    assert Matcher(CONCEPTS, ignore_case=False).find("CAT") == []


def test_concepts_come_from_a_list_or_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("Cat\n\n hot   dog \ncat\nSt. Bernard\n")
    assert read_concepts([str(path)], ignore_case=True) == [" cat ", " hot dog ", " st . bernard "]
    assert read_concepts(["Cat", "cat"], ignore_case=False) == [" Cat ", " cat "]
    path.write_text(" \n")
    with pytest.raises(RequestError, match="there is no concept"):
        read_concepts([str(path)], ignore_case=True)
    with pytest.raises(RequestError, match=r"balance\.concepts=.*missing.txt: cannot be read"):
        read_concepts([str(tmp_path / "missing.txt")], ignore_case=True)


def matches_of(rows: list[list[int]]) -> Matches:
    """Matches of rows 0, 1, ... of fetch unit 0, given their concepts."""
    found = [(row, concept) for row, concepts in enumerate(rows) for concept in concepts or [NO_CONCEPT]]
    matches = np.zeros(len(found), MATCH)
    matches["row"], matches["concept"] = zip(*found, strict=True)
    matches["uid_low"] = matches["row"] * 7919 + 1
    return matches


def test_probabilities_are_those_of_the_paper() -> None:
    """By hand: t = 10; found 40, 20 and 5 times -> 1/4, 1/2, 1; in both of the first: 1 - 3/4 * 1/2 = 5/8."""
    probability = probabilities(np.array([40, 20, 5]), 10)
    assert probability.tolist() == [0.25, 0.5, 1.0]
    drawn = draw(matches_of([[0], [0, 1], [0, 2], []]), probability, concept_words(list("abc")), 0, False)
    assert drawn.probability.tolist() == [0.25, 0.625, 1.0, 0.0]
    assert drawn.stays[2]
    assert not drawn.stays[3]
    kept = draw(matches_of([[], [2]]), probability, concept_words(list("abc")), 0, True)
    assert kept.stays.all()


def test_as_many_stay_as_expected_and_which_depends_on_pair_concept_and_seed_alone() -> None:
    rows = [[0]] * 20_000 + [[1]] * 4_000 + [[0, 1]] * 4_000
    matches, probability = matches_of(rows), probabilities(np.array([24_000, 8_000]), 2_400)
    words = concept_words(["a", "b"])
    drawn = draw(matches, probability, words, 0, False)
    for first, end, chance in ((0, 20_000, 0.1), (20_000, 24_000, 0.3), (24_000, 28_000, 1 - 0.9 * 0.7)):
        deviation = (chance * (1 - chance) / (end - first)) ** 0.5
        assert drawn.stays[first:end].mean() == pytest.approx(chance, abs=5 * deviation)
    some = draw(matches[30_000:], probability, words, 0, False)
    assert (some.stays == drawn.stays[27_000:]).all()
    other = draw(matches, probability, words, 1, False)
    same = (20_000 * (0.1**2 + 0.9**2) + 4_000 * (0.3**2 + 0.7**2) + 4_000 * (0.37**2 + 0.63**2)) / 28_000
    assert (other.stays == drawn.stays).mean() == pytest.approx(same, abs=0.015)  # as of independent draws


def test_draws_are_the_same_however_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matches, probability = matches_of([[0, 1], [], [1], [0, 1, 2]] * 50), np.array([0.1, 0.3, 0.2])
    at_once = draw(matches, probability, concept_words(list("abc")), 0, False)
    monkeypatch.setattr(sample, "DRAWN_AT_ONCE", 4)
    drawn = draw(matches, probability, concept_words(list("abc")), 0, False)
    assert 0 < drawn.stays.sum() < 150
    assert (drawn.stays == at_once.stays).all()
    assert (drawn.probability == at_once.probability).all()


def test_no_rows_are_no_draws() -> None:
    assert len(draw(np.empty(0, MATCH), np.ones(1), concept_words(["a"]), 0, False).stays) == 0


CHOICES = ("balance.concepts=[picture,copy,moved]", "balance.per_concept=8")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The record, every pair."""
    tables = [pq.read_table(path) for path in sorted((folder / "record").glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*(folder / "shards").iterdir(), folder / "manifest.json"]}


@pytest.fixture(scope="module")
def balanced(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("balanced") / "out"
    assert main(["build", *words(folder, *CHOICES)]) == 0
    return folder


def test_a_build_limits_frequent_concepts_and_tells_of_each_pair(balanced: Path, dataset: Path) -> None:
    before = {row["uid"]: row for row in rows_of(dataset) if row["status"] == "kept"}
    has = {name: [uid for uid, row in before.items() if name in row["caption"]] for name in ("picture", "moved")}
    after = {row["uid"]: row for row in rows_of(balanced) if row["uid"] in before}
    assert sum(after[uid]["status"] == "kept" for uid in has["moved"]) == len(has["moved"]) == 3
    scores = {row["score"] for row in after.values() if row["reason"] == "balanced_out" and "picture" in row["caption"]}
    assert [pytest.approx(score) for score in scores] == [8 / len(has["picture"])]
    assert {row["rule"] for row in after.values() if row["reason"] == "balanced_out"} == {"balance.per_concept"}
    kept = sum(after[uid]["status"] == "kept" for uid in has["picture"])
    assert 0 < kept < len(has["picture"])
    (path,) = (balanced / "work/balance-result").rglob("concepts.parquet")
    table = {row["concept"]: row for row in pq.read_table(path).to_pylist()}
    assert (table["picture"]["found"], table["picture"]["kept"]) == (len(has["picture"]), kept)
    assert (table["moved"]["found"], table["moved"]["probability"]) == (3, 1.0)


def test_pairs_without_a_concept_may_stay(words: Words, tmp_path: Path) -> None:
    settings = ("balance.concepts=[no,such]", "balance.per_concept=1", "balance.unmatched=keep")
    assert main(["build", *words(tmp_path / "out", *settings)]) == 0
    assert not [row for row in rows_of(tmp_path / "out") if row["reason"] == "balanced_out"]


def test_other_groups_give_the_same_bytes(
    balanced: Path, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Groups, "of", staticmethod(lambda num_rows: Groups(starts=tuple(range(len(num_rows) + 1)))))
    assert main(["build", *words(tmp_path / "out", *CHOICES)]) == 0
    assert files_of(tmp_path / "out") == files_of(balanced)


def test_concepts_are_asked_for(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", *words(tmp_path / "out", "balance.per_concept=5")]) == 2
    assert "Set balance.concepts" in capsys.readouterr().err
    missing = ("balance.per_concept=5", f"balance.concepts={tmp_path}/missing.txt")
    assert main(["build", *words(tmp_path / "out", *missing)]) == 2
    assert "missing.txt: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_repair_draws_with_the_probabilities_of_the_build(words: Words, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    settings = words(folder, *CHOICES, "dedup.exact=false")
    assert main(["build", *settings]) == 0
    store = Store(str(folder))
    journal, ran = Journal(store), []

    def run(stage: Any) -> dict[str, Marker]:
        ran.append(stage.name)
        return run_stage(stage, journal, InlineExecutor(), Progress())

    config = parse(BuildConfig, settings)
    fetched, decided = journal.markers("fetch"), journal.markers("decide")
    first = next(iter(fetched))  # a repair of this unit alone
    curated = Curated(
        units=(DecidedUnit.of(0, fetched[first], decided[first]),),
        num_kept=(decided[first].counts["kept"],),
        groups=Groups(starts=(0, 1)),
        facts_dtype=needed_facts(config),
    )
    drops = balance(Context(config=config, store=store, run_stage=run, generation=1), curated)
    assert drops is not None
    assert ran == ["repair-0001-balance-count", "repair-0001-balance-draw"]
    record = pq.read_table(folder / "record/00000.parquet").to_pylist()
    of_build = [(row, pair["score"]) for row, pair in enumerate(record) if pair["reason"] == "balanced_out"]
    assert of_build
    assert [(int(drop["row"]), float(drop["score"])) for drop in drops.of_unit(store, 0)] == of_build
