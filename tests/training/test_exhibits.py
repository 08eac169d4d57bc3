"""What a method shows is stored with the run's checkpoints and stands in its report."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from cluster.store import Store
from training.exhibits import read_all, write
from training.methods import Shown
from training.report import write_report
from training.report_exhibits import exhibit_sections

Trainer = Callable[..., Any]


def shown(value: int, text: str) -> Shown:
    fixed = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    made = torch.full((2, 4, 4, 3), value, dtype=torch.uint8)
    return Shown(
        pictures={"picture": fixed, "Made up": made}, captions={"caption": ["a", "<b>"], "generated": [text, "y"]}
    )


def test_pictures_and_texts_come_back_as_they_were(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write(store, 20, shown(9, "x"))
    write(store, 3, shown(1, "x"))
    first, second = read_all(store)
    assert (first["step"], second["step"]) == (3, 20)
    assert second["captions"] == {"caption": ["a", "<b>"], "generated": ["x", "y"]}
    path = second["pictures"]["picture"][1]
    assert second["pictures"]["Made up"][0] == "exhibits/step-00000020/0-made-up.png"
    stored = cv2.cvtColor(cv2.imread(str(tmp_path / path)), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(stored, shown(9, "x").pictures["picture"][1].numpy())


def test_report_shows_the_newest_and_how_what_is_made_came_about(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert list(exhibit_sections(store)) == []
    for step in range(1, 9):
        write(store, step, shown(step, f"text {step}"))
    newest, course = exhibit_sections(store)
    assert newest.title == "What the model sees and makes"
    assert newest.html.count("<img") == 4
    assert "text 8" in newest.html
    assert "text 7" not in newest.html
    assert "&lt;b&gt;" in newest.html
    # What never changes is not followed; of eight steps six are shown, the first and the last among them.
    assert re.findall("<h3>(.*?)</h3>", course.html) == ["Made up", "generated"]
    assert re.findall("step (\\d)</th>", course.html)[:6] == ["1", "2", "4", "5", "7", "8"]
    assert course.html.count("<img") == 2 * 6


@pytest.mark.parametrize(
    ("method", "columns", "words"),
    [
        ("mug", {"picture", "visible", "reconstruction", "caption", "generated"}, [
            "mug.decoder.width=32", "mug.decoder.heads=2", "mug.decoder.depth=1",
            "mug.caption_decoder.width=32", "mug.caption_decoder.heads=2",
        ]),
        ("m3i", {"target view", "other view", "second picture", "mask", "input", "caption"}, [
            "m3i.predictor.width=32", "m3i.predictor.heads=2",
        ]),
        ("clip", set(), []),
    ],
)  # fmt: skip
def test_a_run_leaves_exhibits_of_fixed_samples_with_its_checkpoints(
    train_tiny: Trainer, tmp_path: Path, method: str, columns: set[str], words: list[str]
) -> None:
    run = tmp_path / "run"
    train_tiny(run, f"method={method}", "train.num_steps=4", "checkpoint.every_steps=2", *words)
    exhibits = read_all(Store(str(run)))
    assert [exhibit["step"] for exhibit in exhibits] == ([2, 4] if columns else [])
    for exhibit in exhibits:
        assert set(exhibit["pictures"]) | set(exhibit["captions"]) == columns
        assert exhibit["captions"]["caption"] == exhibits[0]["captions"]["caption"]
        for files in exhibit["pictures"].values():
            assert len(files) == 8
            assert all(cv2.imread(str(run / file)).shape == (32, 32, 3) for file in files)
    write_report(str(run))
    titles = [section["title"] for section in json.loads((run / "report/sections.json").read_text())]
    assert ("What the model sees and makes" in titles) == bool(columns)
