"""Zero-shot, retrieval and pixel baseline: hand-computed cases, then a trained model end to end."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cluster.config import parse
from cluster.errors import RequestError, RunError
from training.__main__ import main
from training.config import EvalConfig
from training.evaluate.command import run_eval
from training.evaluate.model import load_model
from training.evaluate.pixels import nearest_label_accuracy, pixel_features
from training.evaluate.retrieval import distinct, image_to_text, text_to_image
from training.evaluate.zeroshot import class_features, classify


def test_zero_shot_counts_first_and_first_five() -> None:
    classes = torch.eye(6)
    images = normalize(torch.tensor([[9.0, 1, 0, 0, 0, 0], [1, 9, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1]]))
    result = classify(images, classes, torch.tensor([0, 0, 5]))
    assert result.top1 == pytest.approx(1 / 3)  # the first is right, the second second, the third last of six
    assert result.top5 == pytest.approx(2 / 3)
    assert result.predicted[2].tolist() == [0, 1, 2, 3, 4]
    assert (result.chance, result.chance5) == (1 / 6, 5 / 6)


def test_class_feature_is_the_normalised_mean_of_its_templates() -> None:
    seen: list[str] = []

    def encode(texts: Sequence[str]) -> Tensor:
        seen.extend(texts)
        return torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0]])

    features = class_features(["cat", "dog"], ["a {}", "two {}s"], encode)
    assert seen == ["a cat", "two cats", "a dog", "two dogs"]
    torch.testing.assert_close(features, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))


def test_equal_captions_all_count_as_right() -> None:
    texts, owner = distinct(["x", "y", "x", "z"])
    assert texts == ["x", "y", "z"]
    assert owner.tolist() == [0, 1, 0, 2]
    text_features = torch.eye(3)
    images = normalize(torch.tensor([[1.0, 0, 0], [0.9, 0.8, 0], [0, 1, 0.1], [0, 0.1, 1]]))
    # Pictures 0 and 3 find their caption first, pictures 1 (y) and 2 (x) find the other's first.
    forward = image_to_text(images, text_features, owner)
    assert forward.at[1] == pytest.approx(2 / 4)
    assert forward.at[5] == 1.0
    assert forward.chance[1] == pytest.approx(1 / 3)
    # x finds picture 0 (right), y finds picture 2 (an x: wrong), z finds picture 3 (right).
    backward = text_to_image(text_features, images, owner)
    assert backward.at[1] == pytest.approx(2 / 3)
    assert (backward.num_queries, backward.num_candidates) == (3, 4)
    # Two of four pictures carry x, one each y and z.
    assert backward.chance[1] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)


def test_random_features_score_at_chance() -> None:
    torch.manual_seed(0)
    images, texts = normalize(torch.randn(2000, 32)), normalize(torch.randn(100, 32))
    owner = torch.arange(2000) % 100
    for recall in (image_to_text(images, texts, owner), text_to_image(texts, images, owner)):
        for k, value in recall.at.items():
            # Three standard errors of a share, plus one for queries that are not independent.
            slack = 4 * math.sqrt(recall.chance[k] * (1 - recall.chance[k]) / recall.num_queries)
            assert abs(value - recall.chance[k]) < slack


def test_pixel_baseline_ignores_brightness_and_finds_the_same_picture() -> None:
    torch.manual_seed(0)
    pictures = torch.randint(60, 160, (5, 32, 32, 3), dtype=torch.uint8)
    brighter = pictures + 50
    features = pixel_features(brighter)
    assert features.shape == (5, 768)
    labels = list("abcde")
    assert nearest_label_accuracy(features, labels, pixel_features(pictures), labels) == 1.0
    assert nearest_label_accuracy(features, labels, pixel_features(pictures), list("abcxy")) == 0.6


def test_model_beats_chance_and_command_prints_the_numbers(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["select=style=held-out", "class_column=concept", "reference_select=style=plain", "templates=a {}"]
    assert main(["eval", f"checkpoint={finished_run}", f"output={tmp_path / 'eval'}", *words]) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    record = json.loads((tmp_path / "eval/eval.json").read_text())
    assert float(printed["zeroshot.top1"]) == pytest.approx(record["scores"]["zeroshot.top1"], abs=1e-5)
    assert record["num_samples"] == 32
    assert float(printed["zeroshot.chance"]) == pytest.approx(1 / 16)
    # Nine steps on coloured shapes: colour alone gives four of sixteen classes, 0.25.
    assert float(printed["zeroshot.top5"]) > 0.5
    assert 0 <= float(printed["zeroshot.pixels"]) <= 1
    assert {f"retrieval.{way}.r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} <= printed.keys()
    assert printed["eval"] == str(tmp_path / "eval/eval.json")
    examples = json.loads((tmp_path / "eval/examples.json").read_text())
    assert sum(example["right"] for example in examples) == round(32 * record["scores"]["zeroshot.top1"])


def test_checkpoint_of_a_step_can_be_named(finished_run: Path) -> None:
    assert load_model(str(finished_run)).step == 9
    assert load_model(f"{finished_run}/checkpoints/step-00000003").step == 3
    with pytest.raises(RequestError, match="no checkpoint step-00000004; there is step-00000009, step-00000006"):
        load_model(f"{finished_run}/checkpoints/step-00000004")


def test_damaged_checkpoint_is_not_evaluated(finished_run: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    weights = run / "checkpoints/step-00000009/weights.pt"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert load_model(str(run)).step == 6
    with pytest.raises(RunError, match=r"weights\.pt: missing, or its size or sha256"):
        load_model(f"{run}/checkpoints/step-00000009")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["class_column=conzept"], "did you mean concept"),
        (["select=style=nobody"], "no sample of"),
        (["reference_select=style=plain"], "set class_column as well"),
        (["class_column=concept", "templates=a thing"], "every template needs {}"),
        (["clas_column=concept"], "did you mean class_column"),
    ],
)
def test_bad_request_is_refused(finished_run: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run_eval(parse(EvalConfig, [f"checkpoint={finished_run}", f"output={tmp_path / 'eval'}", *words]))
    assert not (tmp_path / "eval").exists()


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no pairmill run"):
        load_model(str(tmp_path))


def test_report_shows_curves_scores_and_answers(
    train_tiny: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train_tiny(run, "method=rils")
    assert main(["eval", f"checkpoint={run}", "class_column=concept", "name=held-out"]) == 0
    assert main(["report", str(run)]) == 0
    assert f"report: {run}/report/index.html" in capsys.readouterr().out
    sections = json.loads((run / "report/sections.json").read_text())
    titles = [section["title"] for section in sections]
    seen = "What the model sees and makes"
    assert titles == ["Training", "Curves", seen, "Evaluation held-out", "Zero-shot answers held-out", "Settings"]
    page = (run / "report/index.html").read_text()
    assert "reconstruction" in page
    assert page.count("data:image/jpeg;base64,") > 10
    assert not re.search(r"(src|href)=.?https?:", page)  # nothing is loaded from a network
    assert main(["report", f"{run}/eval/held-out"]) == 0
