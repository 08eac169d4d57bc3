"""The dataset card and croissant.json say what the manifest says, in the same bytes every time."""

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.__main__ import main
from pipeline.about import AboutConfig
from pipeline.manifest import read_manifest
from pipeline.report.card import card_markdown, size_category
from pipeline.report.croissant import data_type


@pytest.fixture
def again(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset without its card and croissant.json."""
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    shutil.rmtree(folder / "card")
    (folder / "croissant.json").unlink()
    return folder


def header_of(folder: Path) -> dict[str, Any]:
    _, header, _ = (folder / "card/README.md").read_text().split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(header)
    return values


def test_a_report_writes_the_same_bytes_again(dataset: Path, again: Path) -> None:
    assert main(["report", str(again)]) == 0
    for name in ("card/README.md", "croissant.json"):
        assert (again / name).read_bytes() == (dataset / name).read_bytes()


def test_the_card_accounts_for_every_row_and_source(dataset: Path, counts: dict[str, int]) -> None:
    text = (dataset / "card/README.md").read_text()
    for reason, number in counts.items():
        assert f"| `{reason}` |" in text
        assert f"| {number:,} | {number / sum(counts.values()):.2%} |" in text
    _, manifest = read_manifest(str(dataset))
    assert all(source["sha256"] in text for source in manifest.sources)
    assert "| `curate.min_side_px` | `16` |" in text
    assert "were **not** compared with those of any evaluation set" in text
    assert "`opted_out`" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["curate"]["min_side_px"] == 16
    assert header_of(dataset)["size_categories"] == ["n<1K"]
    assert header_of(dataset)["license"] == "unknown"


def test_people_say_what_the_build_cannot_know(again: Path) -> None:
    assert main(["report", str(again), "license=cc-by-4.0", "name=Birds | bees", "url=https://example.org/birds"]) == 0
    assert header_of(again)["license"] == "cc-by-4.0"
    assert header_of(again)["pretty_name"] == "Birds | bees"
    croissant = json.loads((again / "croissant.json").read_bytes())
    assert (croissant["license"], croissant["url"]) == ("cc-by-4.0", "https://example.org/birds")


def test_languages_with_a_share_are_named(dataset: Path) -> None:
    _, manifest = read_manifest(str(dataset))
    card = card_markdown(manifest, AboutConfig(), Counter(en=980, de=15, fr=5), "1.0").decode()
    assert yaml.safe_load(card.split("---\n")[1])["language"] == ["en", "de"]
    assert "| fr | 0.5% |" in card


def test_mlcroissant_reads_the_samples(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    with caplog.at_level(logging.ERROR):
        croissant = mlcroissant.Dataset(str(dataset / "croissant.json"))
    assert not croissant.metadata.ctx.issues.errors
    records = list(croissant.records("samples"))
    _, manifest = read_manifest(str(dataset))
    assert len(records) == manifest.num_samples
    assert {name.removeprefix("samples/") for name in records[0]} == set(manifest.columns)
    assert isinstance(records[0]["samples/width"], int)


@pytest.mark.parametrize(
    ("count", "name"), [(0, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (10**9, "1B<n<10B"), (10**15, "10B<n<100B")]
)
def test_sizes_have_hugging_faces_names(count: int, name: str) -> None:
    assert size_category(count) == name


@pytest.mark.parametrize(
    ("arrow", "name"),
    [("string", "Text"), ("uint64", "Integer"), ("double", "Float"), ("bool", "Boolean"), ("struct<a: int>", "Text")],
)
def test_arrow_types_have_croissants_names(arrow: str, name: str) -> None:
    assert data_type(arrow) == f"sc:{name}"
