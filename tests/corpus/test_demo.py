"""`make demo`, on less: every command of the main job, in order, on the real corpus."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).with_name("demo.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_builds_trains_evaluates_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(DEMO), "--output", str(out), "--pairs", "350", "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr

    manifest = json.loads((out / "data" / "manifest.json").read_text())
    assert sum(manifest["counts"].values()) == manifest["num_input_rows"] > 350
    assert {"kept", "http_404", "not_an_image", "timeout", "duplicate_bytes"} <= set(manifest["counts"])

    results = dict(re.findall(r"^zeroshot\.(\w+): ([\d.]+)$", done.stdout.split("=== Done")[1], re.MULTILINE))
    assert list(results) == ["clip", "rils", "chance", "pixels"]
    assert float(results["pixels"]) > 5 * float(results["chance"]) > 0

    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page needs no network"
    for part in ("Compared: held-out-style", "What became of every row", 'id="clip-curves"', 'id="rils-curves"'):
        assert part in page
    for method in ("clip", "rils"):
        assert list((out / method / "tensorboard").iterdir())
        assert len((out / method / "metrics" / "rank1.jsonl").read_text().splitlines()) >= 1
