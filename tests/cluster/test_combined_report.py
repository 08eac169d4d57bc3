"""Several runs on one page: those evaluated alike side by side, then what each run says of itself."""

import json
from pathlib import Path

from cluster.combined_report import compare_evaluations, write_joined


def evaluated(folder: Path, top1: float) -> str:
    (folder / "eval" / "held-out").mkdir(parents=True)
    (folder / "report").mkdir()
    record = {"scores": {"zeroshot.top1": top1, "zeroshot.chance": 0.01}, "chance": {"zeroshot.top1": 0.01}}
    (folder / "eval" / "held-out" / "eval.json").write_text(json.dumps(record))
    (folder / "report" / "sections.json").write_text(json.dumps([{"title": "Curves", "html": f"<p>{folder.name}</p>"}]))
    return str(folder)


def test_runs_with_the_same_evaluation_are_columns_of_one_table(tmp_path: Path) -> None:
    (section,) = compare_evaluations([evaluated(tmp_path / "clip", 0.25), evaluated(tmp_path / "rils", 0.5)])
    assert section.title == "Compared: held-out"
    for text in (">clip<", ">rils<", ">chance<", ">0.25<", ">0.5<", ">0.01<"):
        assert text in section.html
    assert section.html.count("<tr>") == 2


def test_one_evaluated_run_has_nothing_to_compare_with(tmp_path: Path) -> None:
    assert compare_evaluations([evaluated(tmp_path / "clip", 0.25)]) == []


def test_the_page_holds_every_runs_sections_under_its_name(tmp_path: Path) -> None:
    folders = [evaluated(tmp_path / "clip", 0.25), evaluated(tmp_path / "rils", 0.5)]
    write_joined(folders, tmp_path / "new" / "page.html", "Both")
    page = (tmp_path / "new" / "page.html").read_text()
    assert "clip: Curves" in page
    assert "<p>rils</p>" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
