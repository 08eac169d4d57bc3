"""Rules by import path: found before any work, held to what they promise, and told of like any other."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
import yaml

from cluster.errors import RequestError, RunError
from pipeline.__main__ import main
from pipeline.reasons import is_transient, sentence
from pipeline.rules.chosen import image_rules, text_rules
from pipeline.rules.config import CurateConfig
from pipeline.rules.decisions import judge
from pipeline.rules.require import require_rules
from pipeline.rules.user import require_on_workers, user_rules

MODULE = '''
from dataclasses import dataclass
import numpy as np
import pyarrow.compute as pc
from pipeline.rules import Rule, ScoreRule, Verdicts, numbers

@dataclass(frozen=True, kw_only=True)
class NoShouting(ScoreRule):
    """The part of the caption's characters that are capitals."""
    threshold: float
    reason = "shouting"
    columns = ("caption",)
    keeps = "at_most"
    def scores(self, rows):
        texts = rows.column("caption").combine_chunks()
        return pc.divide(pc.count_substring_regex(texts, "[A-Z]"), pc.cast(pc.utf8_length(texts), "double"))

@dataclass(frozen=True, kw_only=True)
class Licensed(Rule):
    licences: tuple[str, ...] = ("CC0",)
    reason = "licence"
    columns = ("licence",)
    def judge(self, rows):
        given = rows.column("licence").to_pylist()
        return Verdicts(keep=np.array([one in self.licences for one in given], bool), details=given)

@dataclass(frozen=True, kw_only=True)
class NotMoved(Rule):
    reason = "moved"
    columns = ("url",)
    def judge(self, rows):
        return Verdicts(keep=np.array(["/moved/" not in url for url in rows.column("url").to_pylist()], bool))

@dataclass(frozen=True, kw_only=True)
class Tall(ScoreRule):
    threshold: float = 1.0
    reason = "image_too_elongated"
    columns = ("width", "height")
    needs_image = True
    keeps = "at_most"
    def scores(self, rows):
        return numbers(rows, "height") / numbers(rows, "width")

@dataclass(frozen=True, kw_only=True)
class Hasty(Tall):
    needs_image = False

class Scored(Tall):
    columns = ("nsfw_score",)

class Packed(Tall):
    columns = ("shard",)

@dataclass(frozen=True, kw_only=True)
class Misspelt(ScoreRule):
    threshold: float = 1.0
    reason = "misspelt"
    columns = ("captoin",)
    keeps = "at_most"
    def scores(self, rows):
        return np.zeros(rows.num_rows)

@dataclass(frozen=True, kw_only=True)
class Raises(NoShouting):
    def scores(self, rows):
        raise KeyError("boom")

@dataclass(frozen=True, kw_only=True)
class WrongShape(NoShouting):
    def scores(self, rows):
        return np.zeros((rows.num_rows, 2))

@dataclass(frozen=True, kw_only=True)
class NoVerdict(Licensed):
    def judge(self, rows):
        return [True] * rows.num_rows

@dataclass(frozen=True, kw_only=True)
class Numbers(Licensed):
    def judge(self, rows):
        return Verdicts(keep=np.zeros(rows.num_rows))

@dataclass(frozen=True, kw_only=True)
class Choosy(NoShouting):
    def __post_init__(self):
        if self.threshold > 1:
            raise ValueError("a part is at most 1")

class Bare(ScoreRule):
    reason = "bare"
    columns = ("caption",)
    threshold = 1.0
    keeps = "at_most"
    def scores(self, rows):
        return np.zeros(rows.num_rows)

@dataclass(frozen=True, kw_only=True)
class NoReason(Licensed):
    reason = "Not a name"

@dataclass(frozen=True, kw_only=True)
class NoSide(NoShouting):
    keeps = "over"

class Abstract(ScoreRule):
    pass

def function():
    pass
'''
ROWS = pa.table({"uid": ["a", "b", "c"], "caption": ["LOUD", "Not", "so"], "licence": ["CC0", None, "MIT"]})


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's, importable in this process."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "my_rules.py").write_text(MODULE)
    (tmp_path / "lib" / "my_broken.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    yield "my_rules"
    for name in ("my_rules", "my_broken"):
        sys.modules.pop(name, None)


def config(*uses: Any) -> CurateConfig:
    return CurateConfig.model_validate({"rules": list(uses)})


def test_a_score_and_a_reason_without_number(mine: str) -> None:
    chosen = config({"use": f"{mine}:NoShouting", "threshold": "0.4"}, {"use": f"{mine}:Licensed", "licences": ["MIT"]})
    judged = judge(ROWS, np.arange(3), text_rules(chosen, {}))
    assert judged.fails.tolist() == [[True, False, False], [True, True, False]]
    told = judged.decisions.select(["rule", "score", "keeps", "threshold", "reason", "detail"]).to_pylist()
    assert tuple(told[0].values()) == ("curate.rules.NoShouting", 1.0, "at_most", 0.4, "rule_shouting", None)
    assert tuple(told[3].values()) == ("curate.rules.Licensed", None, None, None, "rule_licence", "CC0")
    assert tuple(told[5].values()) == ("curate.rules.Licensed", None, None, None, None, "MIT")
    assert sentence("rule_shouting").endswith("shouting")
    assert not is_transient("rule_shouting")


def test_rules_about_images_work_after_the_download(mine: str) -> None:
    chosen = config({"use": f"{mine}:Tall"}, {"use": f"{mine}:Tall", "threshold": 3})
    assert text_rules(chosen, {}) == ()
    first, second = image_rules(chosen)[-2:]
    assert (first.name, second.name) == ("curate.rules.Tall", "curate.rules.Tall#2")
    assert first.reason == "image_too_elongated"
    rows = pa.table({"uid": ["a", "b"], "width": [10, 10], "height": [20, None]})
    assert judge(rows, np.arange(2), (first, second)).fails.tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ({"use": "my_rules"}, "not an import path; write package.module:Class"),
        ("my_rules", "not an import path; write package.module:Class"),
        ({"use": "no_such_module:Rule"}, "cannot be imported .*PYTHONPATH"),
        ({"use": "my_broken:Rule"}, "cannot be imported .*no_such_library"),
        ({"use": "my_rules:NoRule"}, "cannot be imported .*NoRule"),
        ({"use": "my_rules:function"}, "is no rule; derive it from pipeline.rules.ScoreRule"),
        ({"use": "my_rules:Abstract"}, "lacks the method scores"),
        ({"use": "my_rules:Bare"}, "is no dataclass"),
        ({"use": "my_rules:NoShouting"}, "its parameter threshold is required"),
        (
            {"use": "my_rules:NoShouting", "treshold": 0.3},
            r"curate.rules\[0\]: .*no parameter treshold; did you mean thr",
        ),
        ({"use": "my_rules:NoShouting", "threshold": "much"}, "threshold=much: .*valid number"),
        ({"use": "my_rules:Choosy", "threshold": 2}, "a part is at most 1"),
        ({"use": "my_rules:NoReason"}, "its reason is 'Not a name'"),
        ({"use": "my_rules:NoSide", "threshold": 1}, "keeps is 'over'; set it to one of at_least"),
        ({"use": "my_rules:Hasty"}, "reads the column width, which is known after the download only; set needs_image"),
        ({"use": "my_rules:Scored"}, "reads the column nsfw_score; set curate.max_nsfw_score, which makes it"),
        ({"use": "my_rules:Packed"}, "reads the column shard, which the rows do not have"),
        ({"use": "my_rules:Misspelt"}, "reads the column captoin, which the rows do not have; did you mean caption"),
    ],
)
def test_what_cannot_be_used_is_refused(mine: str, tmp_path: Path, use: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        require_rules(config(use), str(tmp_path / "out"), ["url", "caption", "licence"])
    require_rules(config({"use": "my_rules:Licensed"}), str(tmp_path / "out"), ["url", "caption", "licence"])


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ({"use": "my_rules:Raises", "threshold": 1}, "my_rules:Raises: KeyError: 'boom'"),
        ({"use": "my_rules:WrongShape", "threshold": 1}, r"scores has the shape \(3, 2\), not \(3,\)"),
        ({"use": "my_rules:NoVerdict"}, "judge gave a list"),
        ({"use": "my_rules:Numbers"}, "keep has values of type float64, not bool"),
    ],
)
def test_a_rule_that_does_not_keep_its_promise_ends_the_run(mine: str, use: dict[str, Any], message: str) -> None:
    (rule,) = user_rules(config(use))
    with pytest.raises(RunError, match=f"curate.rules: my_rules.*{message.partition(': ')[2] or message}"):
        rule.judge(ROWS)
    with pytest.raises(RunError, match="reads the column"):
        rule.judge(ROWS.select(["uid"]))


class Elsewhere:
    """An executor whose worker is a process of its own that knows nothing of this one's import path."""

    def map_unordered(
        self, function: Callable[[Any], Any], items: Sequence[Any], *, num_cpus: float, memory_bytes: int
    ) -> Iterator[Any]:
        code = "import pickle, sys; f, x = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(pickle.dumps(f(x)))"
        for item in items:
            sent = pickle.dumps((function, item))
            done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True, timeout=60)
            yield pickle.loads(done.stdout)


def test_a_rule_that_workers_cannot_import_is_refused(mine: str) -> None:
    with pytest.raises(RequestError, match=r"my_rules:Tall: cannot be imported.*This is said by a worker"):
        require_on_workers(config({"use": f"{mine}:Tall"}), Elsewhere())
    require_on_workers(CurateConfig(), Elsewhere())


def test_a_build_with_rules_of_the_user(
    mine: str, words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = json.dumps([{"use": f"{mine}:NotMoved"}, {"use": f"{mine}:Tall", "threshold": 0.8}])
    assert main(["build", *words(tmp_path / "out", f"curate.rules={rules}")]) == 0
    rows = pyarrow.dataset.dataset(tmp_path / "out" / "record").to_table().to_pylist()
    moved = [row for row in rows if "/moved/" in (row["url"] or "")]
    assert {(row["reason"], row["rule"], row["attempts"]) for row in moved} == {
        ("rule_moved", "curate.rules.NotMoved", 0)
    }
    capsys.readouterr()
    assert main(["explain", str(tmp_path / "out"), moved[0]["uid"]]) == 0
    assert "curate.rules.NotMoved, dropped: rule_moved" in capsys.readouterr().out
    assert main(["explain", str(tmp_path / "out"), next(row["uid"] for row in rows if row["status"] == "kept")]) == 0
    story = capsys.readouterr().out
    assert "curate.rules.NotMoved, kept" in story
    assert "curate.rules.Tall: 0.75 (keeps at most 0.8), kept" in story


def test_the_example_of_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "curation.md").read_text()
    code, settings = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "yaml"))
    assert code
    assert settings
    (tmp_path / "my_rules.py").write_text(code[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        chosen = CurateConfig.model_validate(yaml.safe_load(settings[1])["curate"])
        judged = judge(ROWS, np.arange(3), text_rules(chosen, {}))
    finally:
        sys.modules.pop("my_rules", None)
    assert judged.decisions["score"].to_pylist()[:3] == [1, 1 / 3, 0]
    assert judged.fails.tolist() == [[True, True, False], [False, True, True]]
