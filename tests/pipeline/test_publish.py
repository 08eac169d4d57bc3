"""The manifest is made once, from markers, and accounts for every row."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import parse
from cluster.errors import RunError
from cluster.journal import Journal, Marker
from cluster.store import Store
from pipeline.config import BuildConfig
from pipeline.manifest import Manifest, read_manifest
from pipeline.publish import make_manifest, publish, refuse_empty


def remake(dataset: Path, words: Any, **changes: Any) -> Manifest:
    """The manifest of a finished build again, from its markers."""
    store = Store(str(dataset))
    journal = Journal(store)
    parts: dict[str, Any] = {
        "sources": list(journal.markers("plan-read").values()),
        "packed": list(journal.markers("pack").values()),
        "recorded": journal.markers("record"),
    }
    return make_manifest(store, parse(BuildConfig, words(dataset)), **{**parts, **changes})


def test_the_manifest_is_a_function_of_the_markers(dataset: Path, words: Any) -> None:
    assert remake(dataset, words).to_json() == (dataset / "manifest.json").read_bytes()
    assert read_manifest(str(dataset))[1] == Manifest.from_json((dataset / "manifest.json").read_bytes())


def test_sources_name_what_was_read(dataset: Path, url_list: Path) -> None:
    (source,) = read_manifest(str(dataset))[1].sources
    assert source["size_bytes"] == url_list.stat().st_size
    assert source["num_rows"] == len(url_list.read_text().splitlines()) - 1


def test_rows_that_are_not_accounted_for_are_never_published(dataset: Path, words: Any) -> None:
    recorded = dict(list(Journal(Store(str(dataset))).markers("record").items())[1:])
    with pytest.raises(RunError, match=r"do not account for .*remove .*journal/decide"):
        remake(dataset, words, recorded=recorded)


def test_samples_without_a_shard_are_never_published(dataset: Path, words: Any) -> None:
    packed: list[Marker] = list(Journal(Store(str(dataset))).markers("pack").values())[:-1]
    with pytest.raises(RunError, match="27 kept pairs, 20 samples in shards"):
        remake(dataset, words, packed=packed)


def test_publishing_twice_is_fine_and_something_else_is_refused(dataset: Path, words: Any, tmp_path: Path) -> None:
    manifest, store = remake(dataset, words), Store(str(tmp_path))
    publish(store, manifest)
    publish(store, manifest)
    (tmp_path / "manifest.json").write_bytes(json.dumps({"version": 1}).encode())
    with pytest.raises(RunError, match="another build"):
        publish(store, manifest)


def test_an_empty_dataset_is_refused_with_the_reasons_largest_first() -> None:
    refuse_empty({"kept": 1, "http_404": 5}, ["list.csv"])
    with pytest.raises(RunError, match=r"timeout 7, http_404 5.*list\.csv"):
        refuse_empty({"kept": 0, "http_404": 5, "timeout": 7}, ["list.csv"])
