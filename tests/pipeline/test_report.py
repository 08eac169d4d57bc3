"""The report is one page that needs nothing else, counts every row and shows what was dropped."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cluster.report import (
    Section,
    figure_html,
    group_by_run,
    new_figure,
    read_sections,
    render_page,
    sections_json,
    table_html,
)
from cluster.store import Store
from pipeline.__main__ import main
from pipeline.manifest import read_manifest
from pipeline.report.data import sample_rows, steps_of
from pipeline.report.duplicates import Twins
from pipeline.report.semantic_map import arrange, project


class Page(HTMLParser):
    """Collects what a page loads and whether its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [str(values[name]) for name in ("src", "xlink:href") if values.get(name)]
        if tag == "link":
            self.loads.append(str(values["href"]))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Nothing stays open."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"


def test_the_page_loads_nothing_and_is_well_formed(dataset: Path) -> None:
    text = (dataset / "report/index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(address.startswith(("data:", "#")) for address in page.loads)
    assert "<script" not in text
    assert "url(http" not in text


def test_every_reason_is_told_with_its_number_and_sentence(dataset: Path, counts: dict[str, int]) -> None:
    text = (dataset / "report/index.html").read_text()
    for reason, number in counts.items():
        row = re.search(rf'<div class="row[^>]*><span><code>{reason}</code> (.*?)</span>.*?<b>(\d+)</b>', text)
        assert row, reason
        assert int(row.group(2)) == number
        assert len(row.group(1)) > 10


def test_the_funnel_ends_with_what_was_kept(dataset: Path) -> None:
    store, manifest = read_manifest(str(dataset))
    steps = steps_of(store, manifest)
    assert steps[-1].num_left == manifest.num_samples
    phases = [step.phase for step in steps]
    assert list(dict.fromkeys(phases)) == ["before the download", "download", "rules on images", "duplicates"]
    assert phases == sorted(phases, key=phases.index)


def test_dropped_pairs_are_shown_with_pictures_where_there_are_any(dataset: Path) -> None:
    text = (dataset / "report/index.html").read_text()
    dropped = text[text.index('id="dropped-pairs"') : text.index('id="distributions"')]
    groups = dict(re.findall(r"<h3><code>(\w+)</code>(.*?)(?=<h3>|$)", dropped, re.S))
    assert groups["duplicate_bytes"].count("<img") == 10
    assert groups["image_too_small"].count("<img") == groups["image_blank"].count("<img") == 1
    assert groups["http_404"].count("<img") == 0
    assert groups["http_404"].count("/gone/g") == 3
    assert "curate.min_side_px: 12, limit 16" in groups["image_too_small"]


def test_the_report_is_written_again_without_the_downloads(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    for path in (folder / "work").rglob("images.tar"):
        path.write_bytes(b"")
    assert main(["report", str(folder)]) == 0
    shutil.rmtree(folder / "work")
    shutil.rmtree(folder / "report")
    assert main(["report", str(folder)]) == 0
    assert "27" in (folder / "report/index.html").read_text()
    shutil.rmtree(folder / "journal")
    assert main(["report", str(folder)]) == 2
    assert "journal/record/ is not there" in capsys.readouterr().err


def test_sections_are_left_for_joined_pages(dataset: Path) -> None:
    sections = read_sections((dataset / "report/sections.json").read_bytes())
    assert [section.title for section in sections][:3] == ["Totals", "What became of every row", "Kept samples"]
    assert read_sections(sections_json(sections)) == sections


def test_large_datasets_are_sampled_by_whole_units(dataset: Path) -> None:
    sampled = sample_rows(Store(str(dataset)), max_rows=8)
    assert sampled.rows.num_rows == 14
    assert not sampled.is_all


def test_sections_of_a_run_stand_under_its_name_with_a_link_each() -> None:
    titles = ["Compared: e", "data: Totals", "data: Größe", "clip: Curves", "clip: Evaluation: x", "clip: Curves", "!"]
    page = render_page("joined", [Section(title=title, html="<p>text</p>") for title in titles])
    assert re.findall(r'<h2 class="run">(.*?)</h2>', page) == ["data", "clip"]
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        *("Compared: e", "Totals", "Größe", "Curves", "Evaluation: x", "Curves", "!"),
    ]
    anchors = re.findall(r'<section id="(.*?)">', page)
    assert re.findall(r'<a href="#(.*?)">', page) == anchors
    assert len(set(anchors)) == len(titles)
    assert Page(page).open == []


def test_sections_of_one_report_are_not_grouped() -> None:
    assert [group.name for group in group_by_run([Section(title=title, html="") for title in ("a", "b", "c: d")])] == [
        "",
        "",
    ]
    assert "<nav" not in render_page("one", [Section(title="a", html="")])


def test_what_users_wrote_cannot_become_markup() -> None:
    page = render_page("<b>t", [Section(title="<i>s", html=table_html(["<u>h"], [["<script>x</script>"]]))], lead="&")
    assert "<script>" not in page
    assert "<b>t" not in page
    assert "<i>s" not in page
    assert "<u>h" not in page


def test_captions_cannot_become_markup(dataset: Path, tmp_path: Path, site: object, words: object) -> None:
    path = tmp_path / "list.csv"
    path.write_text(f"url,caption\n{site.url}/image/x,<script>alert(1)</script>\n")  # type: ignore[attr-defined]
    assert main(["build", *words(tmp_path / "out", f"input={path}")]) == 0  # type: ignore[operator]
    text = (tmp_path / "out/report/index.html").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_figures_take_the_colours_of_the_page() -> None:
    figure, axes = new_figure()
    axes.plot([0, 1], [0, 1], label="line")
    axes.set_title("A title")
    axes.legend()
    svg = figure_html(figure, alt="a & b")
    assert "currentColor" in svg
    assert "#01fe02" not in svg
    assert "<title>a &amp; b</title>" in svg
    assert svg == figure_html(figure, alt="a & b")


def test_columns_of_numbers_are_aligned_right() -> None:
    html = table_html(["name", "n"], [["a", 1234], ["b", 5.5]])
    assert '<th>name</th><th class="n">n</th>' in html
    assert '<td class="n">1,234</td>' in html
    assert "class" not in table_html(["host"], [["127.0.0.1"]]).replace('class="scroll"', "")


@pytest.mark.parametrize("rows", [[], [["", ""]]])
def test_tables_may_be_empty(rows: list[list[str]]) -> None:
    assert "<table>" in table_html(["a", "b"], rows)


@pytest.fixture(scope="module")
def curated(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build that uses the steps after the rules, too."""
    folder = tmp_path_factory.mktemp("curated") / "out"
    balance = ("balance.concepts=[picture,moved]", "balance.per_concept=12", "balance.unmatched=keep")
    assert main(["build", *words(folder, *balance, "dedup.near_distance=0", "curate.min_caption_words=2")]) == 0
    return folder


def test_steps_and_rules_are_told_in_sections_of_their_own(curated: Path) -> None:
    read = read_sections((curated / "report/sections.json").read_bytes())
    sections = {section.title: section.html for section in read}
    assert '<code>curate.min_caption_words</code></span></td><td class="n">' in sections["Overlap of rules"]
    found = re.search(r'<td>picture</td><td class="n">(\d+)</td><td class="n">(\d+)</td>', sections["Balance"])
    assert found
    assert 12 < int(found[1]) < 25
    assert int(found[2]) < int(found[1])
    assert sections["Map"].count("<img") > 8
    assert f"chance to stay: {12 / int(found[1]):.4g}" in sections["Dropped pairs"]
    assert "Semantic similarity" not in sections  # nothing was compared
    steps = steps_of(*read_manifest(str(curated)))
    assert steps[-1].phase == "balance"


def test_a_duplicate_is_shown_beside_its_representative_in_another_fetch_unit(dataset: Path) -> None:
    store = Store(str(dataset))
    everything, first = sample_rows(store), sample_rows(store, max_rows=1)
    found = []
    for index in everything.find("dropped", "duplicate_bytes"):
        row = everything.row(index)
        alone = replace(everything, rows=everything.rows.slice(0, 0))  # the sample does not have the other one
        twin = Twins(store=store, sampled=alone).of(row)
        assert twin is not None
        assert twin["uid"] == row["duplicate_of"]
        found.append(twin["unit"])
    assert set(found) - set(first.units)


@pytest.mark.parametrize("count", [1, 2, 30, 5_000])
def test_a_map_has_one_picture_a_cell_and_keeps_the_order(count: int) -> None:
    plane = np.random.default_rng(0).normal(size=(count, 2))
    cells = arrange(plane, 22, 13)
    shown = cells[cells[:, 0] >= 0]
    assert len({tuple(cell) for cell in shown.tolist()}) == len(shown) == min(count, 22 * 13) or count == 30
    order = np.argsort(plane[cells[:, 0] >= 0, 0], kind="stable")
    assert (np.diff(shown[order, 0]) >= 0).all()


def test_a_projection_keeps_most_of_what_two_numbers_can() -> None:
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(50, 2)) @ draw.normal(size=(2, 30)) + 5
    plane = project(vectors.astype(np.float16))
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    assert np.allclose(np.linalg.norm(plane[:, None] - plane[None], axis=2), distances, atol=0.1)
