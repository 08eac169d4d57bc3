"""`pairmill curate`: decisions taken again in a new folder, as a build from nothing would; no request is made."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pytest

from cluster.journal import Journal
from cluster.store import Store
from pipeline.__main__ import main
from pipeline.adopt import overlaid
from pipeline.fetch import with_outcomes
from pipeline.manifest import read_manifest
from pipeline.plan import PLANNED
from pipeline.timings import read_timings
from pipeline.verify import verify


def published(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset whose bytes are promised."""
    files = [*sorted((folder / "shards").iterdir()), folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def record_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(folder / "record").to_table().to_pylist()
    return rows


def test_other_thresholds_give_what_a_new_build_would_and_ask_nobody(
    dataset: Path, site: Any, words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["curate.min_side_px=0", "dedup.exact=false", "curate.drop_blank=false", "pack.samples_per_shard=7"]
    before, requests = contents(dataset), site.num_requests
    assert main(["curate", str(dataset), f"output={tmp_path / 'new'}", *changes]) == 0
    assert site.num_requests == requests
    assert contents(dataset) == before
    store, manifest = read_manifest(str(tmp_path / "new"))
    assert manifest.counts["kept"] == 27 + 5 + 1 + 1
    assert not [timing for timing in read_timings(store) if timing.stage == "fetch"]
    assert sum(marker.counts.get("requests", 0) for marker in Journal(store).markers("fetch").values()) == 0
    assert main(["build", *words(tmp_path / "fresh", *changes)]) == 0
    assert published(tmp_path / "new") == published(tmp_path / "fresh")
    assert verify(store, manifest) == []
    assert main(["status", str(tmp_path / "new")]) == 0
    assert main(["report", str(tmp_path / "new")]) == 0
    capsys.readouterr()
    assert main(["explain", str(tmp_path / "new"), f"{site.url}/small/small"]) == 0
    assert "kept: shards/" in capsys.readouterr().out


def test_new_caption_rules_drop_what_was_downloaded_and_tell_what_was_not(
    site: Any, words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    assert main(["build", *words(old, "curate.min_caption_words=3")]) == 0  # only "picture number N" and few more
    requests = site.num_requests
    assert main(["curate", str(old), f"output={new}", "curate.min_caption_words=0", "curate.max_caption_chars=16"]) == 0
    out = capsys.readouterr().out
    assert site.num_requests == requests
    _, manifest = read_manifest(str(new))
    missing = manifest.counts["not_downloaded"]
    assert f"not downloaded: {missing:,} rows" in out
    assert "fetch_missing=true" in out
    rows = {(row["url"], row["caption"]): row for row in record_of(new)}
    twenty = rows[f"{site.url}/image/n20", "picture number 20"]
    assert (twenty["reason"], twenty["rule"]) == ("caption_too_long", "curate.max_caption_chars")
    moved = rows[f"{site.url}/moved/m1", "moved 1"]
    assert (moved["status"], moved["reason"]) == ("dropped", "not_downloaded")
    assert "caption_too_short" in moved["detail"]
    assert sum(row["num_rows"] for row in rows.values()) == manifest.num_input_rows

    assert (
        main(["curate", str(old), f"output={tmp_path / 'all'}", "curate.min_caption_words=0", "fetch_missing=true"])
        == 0
    )
    store, everything = read_manifest(str(tmp_path / "all"))
    assert main(["build", *words(tmp_path / "fresh")]) == 0
    assert everything.counts == read_manifest(str(tmp_path / "fresh"))[1].counts
    assert site.num_requests > requests
    assert verify(store, everything) == []
    assert {(row["uid"], row["reason"]) for row in record_of(tmp_path / "all")} == {
        (row["uid"], row["reason"]) for row in record_of(tmp_path / "fresh")
    }


def test_a_curated_dataset_is_curated_again(dataset: Path, words: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["curate", str(dataset), f"output={first}", "curate.min_side_px=0"]) == 0
    assert main(["curate", str(first), f"output={second}", "curate.min_side_px=16"]) == 0
    assert published(second) == published(dataset)


def test_what_one_curation_drops_the_next_can_have_back(dataset: Path, tmp_path: Path) -> None:
    """Downloads that a caption rule dropped are there still, and so are the reasons of those that had failed."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["curate", str(dataset), f"output={first}", "curate.max_caption_chars=9"]) == 0
    assert {row["reason"] for row in record_of(first)} >= {"caption_too_long", None}
    assert main(["curate", str(first), f"output={second}", "curate.max_caption_chars=null"]) == 0
    assert published(second) == published(dataset)
    told = ("uid", "status", "reason", "rule", "score", "threshold", "detail")
    assert [[row[name] for name in told] for row in record_of(second)] == [
        [row[name] for name in told] for row in record_of(dataset)
    ]


def test_a_download_that_killed_its_worker_is_none_that_was_left_out() -> None:
    outcomes = [{"status": "dropped", "reason": reason, "attempts": 0} for reason in ("worker_killed", None)]
    old = pa.table([pa.nulls(2, field.type) for field in PLANNED], schema=PLANNED)
    old = old.set_column(5, PLANNED.field("reason"), pa.array([None, "caption_too_short"]))
    table = overlaid(with_outcomes(old, outcomes), pa.table([pa.nulls(2, each.type) for each in PLANNED], PLANNED))
    assert table["reason"].to_pylist() == ["worker_killed", "not_downloaded"]


def test_other_workers_and_a_kill_change_no_byte(dataset: Path, tmp_path: Path, far_workers: Any) -> None:
    settings = ["curate.min_side_px=0", "pack.samples_per_shard=4"]
    assert main(["curate", str(dataset), f"output={tmp_path / 'one'}", *settings]) == 0
    command = [sys.executable, "-P", "-m", "pipeline", "curate", str(dataset), f"output={tmp_path / 'two'}", *settings]
    killed = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "two/journal/revisit").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "two/manifest.json").exists()
    far_workers()
    assert main(["curate", str(dataset), f"output={tmp_path / 'two'}", *settings]) == 0
    assert published(tmp_path / "one") == published(tmp_path / "two")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["output={new}", "image.size=128"], "image.size: it has 256, this request has 128"),
        (["output={new}", "seed=1"], "seed: it has 0, this request has 1"),
        (["output={new}", "columns.keep=[]"], "columns.keep"),
        (["output={new}", "fetch.max_redirects=1"], "fetch.max_redirects"),
        (["output={new}", "curate.min_sid_px=1"], "did you mean curate.min_side_px"),
        ([], "output: required, and not given"),
        (["output=memory://other"], "on another file system"),
        (["output={old}"], "lies in the dataset"),
        (["output={old}/again"], "lies in the dataset"),
    ],
)
def test_what_cannot_be_revisited_is_refused_by_name(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    before = contents(dataset)
    settings = [word.format(new=tmp_path / "new", old=dataset) for word in more]
    assert main(["curate", str(dataset), *settings]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pairmill curate: ")
    assert message in error
    assert not (tmp_path / "new").exists()
    assert contents(dataset) == before


def test_a_base_without_its_downloads_is_refused_with_what_to_do(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    shutil.copytree(dataset, old)
    shutil.rmtree(old / "work/fetch")
    assert main(["curate", str(old), f"output={tmp_path / 'new'}"]) == 2
    assert f"pairmill build input={old} output=NEW" in capsys.readouterr().err
    assert main(["curate", str(tmp_path / "none"), f"output={tmp_path / 'new'}"]) == 2
    assert main(["curate", f"output={tmp_path / 'new'}"]) == 2
    assert "pairmill curate OLD output=NEW" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_markers_of_models_are_taken_over(dataset: Path, tmp_path: Path) -> None:
    """A stage whose name tells the model and its settings is done for every unit whose rows are where they were."""
    old = tmp_path / "old"
    shutil.copytree(dataset, old)
    journal = Journal(Store(str(old)))
    for unit, fetched in journal.markers("fetch").items():
        with journal.attempt("score-nsfw-1a2b", unit) as output:
            output.path("scores.npy").write_bytes(unit.encode())
            output.count("images", fetched.counts["images"])
            journal.commit("score-nsfw-1a2b", unit, output)
    assert main(["curate", str(old), f"output={tmp_path / 'new'}", "curate.min_side_px=0"]) == 0
    new = Journal(Store(str(tmp_path / "new")))
    adopted = new.markers("score-nsfw-1a2b")
    assert adopted.keys() == new.markers("fetch").keys()
    for unit, marker in adopted.items():
        assert new.store.read_bytes(marker.path_of("scores.npy")) == unit.encode()
    assert json.loads((tmp_path / "new/manifest.json").read_text())["num_samples"] == 28


def test_models_look_at_what_an_earlier_curation_had_dropped(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model = "curate.nsfw_model=plugin_models:MeanColour"
    strict = ["curate.max_nsfw_score=1", "curate.max_caption_chars=9"]
    lax = ["curate.max_nsfw_score=0.5", "curate.max_caption_chars=null"]
    assert main(["curate", str(dataset), f"output={tmp_path / 'strict'}", model, *strict]) == 0
    assert main(["curate", str(tmp_path / "strict"), f"output={tmp_path / 'back'}", *lax]) == 0
    assert main(["curate", str(dataset), f"output={tmp_path / 'at once'}", model, *lax]) == 0
    assert published(tmp_path / "back") == published(tmp_path / "at once")
    assert read_manifest(str(tmp_path / "back"))[1].counts["image_unsafe"] > 5


def test_what_a_repair_of_the_base_recovered_is_kept_and_repaired_further(
    site: Any, words: Any, tmp_path: Path
) -> None:
    """The repair's samples stand behind the others; pairs that still fail can be repaired in the new dataset."""
    old, new = tmp_path / "old", tmp_path / "new"
    lists = tmp_path / "list.csv"
    rows = [*((f"image/r{n}", "short") for n in range(9)), *((f"later/l{n}", "it is long") for n in range(5))]
    lists.write_text(
        "url,caption\n" + "".join(f"{site.url}/{path},{text}\n" for path, text in (*rows, ("never/x", "x")))
    )
    hurried = ["fetch.retries=0", "fetch.host_failures=1000", "plan.rows_per_unit=4"]
    assert main(["build", *words(old, f"input={lists}", *hurried)]) == 0
    assert read_manifest(str(old))[1].counts == {"http_503": 6, "kept": 9}
    site.well = {"later"}
    assert main(["repair", str(old)]) == 0
    assert read_manifest(str(old))[1].counts == {"http_503": 1, "kept": 14}
    requests = site.num_requests
    assert main(["curate", str(old), f"output={new}", "pack.samples_per_shard=6", "curate.max_caption_chars=10"]) == 0
    assert site.num_requests == requests
    store, manifest = read_manifest(str(new))
    assert manifest.counts == {"http_503": 1, "kept": 14}
    assert manifest.repairs == ()
    assert verify(store, manifest) == []
    again = tmp_path / "again"
    assert main(["curate", str(new), f"output={again}", "curate.max_caption_chars=7"]) == 0
    assert read_manifest(str(again))[1].counts == {"caption_too_long": 5, "http_503": 1, "kept": 9}
    site.well = {"later", "never"}
    assert main(["repair", str(new)]) == 0
    assert read_manifest(str(new))[1].counts == {"kept": 15}
    assert main(["curate", str(new), f"output={tmp_path / 'last'}", "curate.max_caption_chars=7"]) == 0
    assert read_manifest(str(tmp_path / "last"))[1].counts == {"caption_too_long": 5, "kept": 10}
