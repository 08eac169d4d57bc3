"""A dry run decides everything, publishes nothing, and the same command goes on from it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main

RULES = (
    "curate.min_caption_words=2",
    "curate.min_caption_chars=8",
    "curate.blocked_words=moved",
    "curate.min_sharpness=1",
)


def table(out: str) -> dict[str, list[str]]:
    """{first column: numbers of the line} of what was printed."""
    lines = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 1}


def test_what_would_be_kept_is_what_is_kept(
    words: Any, site: Any, tmp_path: Path, counts: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["build", *words(folder, "curate.dry_run=true")]) == 0
    told = capsys.readouterr().out
    assert not (folder / "manifest.json").exists()
    assert not (folder / "shards").exists()
    assert not (folder / "record").exists()
    lines = table(told)
    pairs = sum(counts.values()) - 2  # of two pairs there were two rows
    assert lines[f"in the lists ({sum(counts.values())} rows)"] == [str(pairs)]
    assert lines["curate.min_side_px=16"] == ["1", "1", "1", "33"]
    assert lines["curate.blank_threshold=1.0"] == ["1", "1", "1", "32"]
    assert lines["dedup.exact=true"][-2:] == [str(counts["duplicate_bytes"]), str(counts["kept"])]
    assert lines[f"would be kept ({counts['kept'] / pairs:.1%})"] == [str(counts["kept"])]
    requests = site.num_requests
    assert main(["build", *words(folder)]) == 0
    assert site.num_requests == requests, "it goes on from there"
    assert json.loads((folder / "manifest.json").read_text())["counts"]["kept"] == counts["kept"]
    capsys.readouterr()
    written = sorted(path for path in folder.rglob("*"))
    assert main(["build", *words(folder, "curate.dry_run=true")]) == 0
    again = table(capsys.readouterr().out)
    assert {name: line for name, line in again.items() if name in lines} == {
        name: line for name, line in lines.items() if name in again
    }
    assert again["dedup.exact=true"] == lines["dedup.exact=true"]
    assert sorted(path for path in folder.rglob("*")) == written, "without any work"
    shutil.rmtree(folder / "work")
    assert main(["build", *words(folder, "curate.dry_run=true")]) == 0
    assert re.search(rf"{counts['kept']}  kept", capsys.readouterr().out)


def test_overlaps_are_counted(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", *words(tmp_path / "out", *RULES, "curate.dry_run=true")]) == 0
    told = capsys.readouterr().out
    lines = table(told)
    # "a page" has 6 characters, "nothing" and "grey" are one word, shorter than 8, "moved 0" to "moved 2" have 7
    assert lines["curate.min_caption_chars=8"][:3] == ["9", "4", "9"]
    assert lines["curate.min_caption_words=2"][:3] == ["2", "0", "0"]
    assert lines["curate.blocked_words (0)"][:3] == ["3", "0", "0"]
    assert lines["curate.min_caption_chars and curate.blocked_words"] == ["3", "33%", "100%"]
    assert lines["curate.min_caption_chars and curate.min_caption_words"] == ["2", "22%", "100%"]
    assert "curate.min_caption_words and curate.blocked_words" not in lines
