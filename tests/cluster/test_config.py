"""Configuration is checked before work starts, and says what is wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import model_validator

from cluster.config import REQUIRED, Config, StringList, flatten, help_text, key, parse, validate
from cluster.errors import RequestError


class Fetch(Config):
    timeout_s: float = key(10.0, "time allowed for one URL", unit="s", affects_result=False, gt=0)
    retries: int = key(2, "times a transient error is tried again", ge=0)


class Example(Config):
    input: StringList = key(REQUIRED, "lists to read")
    mode: Literal["fast", "exact"] = key("fast", "how to decode")
    seed: int = key(0, "seed of the order")
    fetch: Fetch = key(Fetch(), "downloading")
    probe: Fetch = key(Fetch(timeout_s=2.5), "a short look first")

    @model_validator(mode="after")
    def _related(self) -> "Example":
        if self.mode == "exact" and self.seed < 0:
            raise ValueError("seed=-1 needs mode=fast; set mode or seed")
        return self


def refusal(*words: str) -> str:
    with pytest.raises(RequestError) as caught:
        parse(Example, words)
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_later_words_win_over_the_file_and_earlier_words(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("input: [a.parquet, b.parquet]\nfetch: {retries: 5}\nfetch.timeout_s: 3\n")
    config = parse(Example, [str(file), "fetch.retries=1", "seed=4", "seed=7"])
    assert config.input == ["a.parquet", "b.parquet"]
    assert (config.fetch.retries, config.fetch.timeout_s, config.seed) == (1, 3.0, 7)


def test_one_word_is_a_list_of_one_and_a_number_may_be_a_name() -> None:
    assert parse(Example, ["input=2024"]).input == ["2024"]
    assert parse(Example, ["input=[a,b]"]).input == ["a", "b"]


@pytest.mark.parametrize("text", ["2024-01-01", "010", "1.10", "1_000", "12:30", "true", "on", "0x10"])
def test_words_are_taken_as_they_are_written(tmp_path: Path, text: str) -> None:
    assert parse(Example, [f"input={text}"]).input == [text]


@pytest.mark.parametrize("text", ["2024-01-01", "010", "12:30", "on", "no", "0x10"])
def test_words_of_a_file_are_taken_as_people_mean_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(f"input: [{text}, en]\nseed: 1_000\nfetch: {{timeout_s: 1e-3}}\n")
    config = parse(Example, [str(tmp_path / "run.yaml")])
    assert (config.input, config.seed, config.fetch.timeout_s) == ([text, "en"], 1_000, 0.001)


def test_true_false_and_null_keep_their_meaning() -> None:
    class Switches(Config):
        on: bool = key(False, "a switch")
        names: StringList | None = key(["a"], "names")

    assert parse(Switches, ["on=true", "names=null"]) == Switches(on=True, names=None)
    assert parse(Switches, ["on=false", "names=truest"]) == Switches(on=False, names=["truest"])


def test_a_value_that_a_group_would_hide_is_refused(tmp_path: Path) -> None:
    assert "fetch=3: given beside fetch.retries" in refusal("input=a", "fetch=3", "fetch.retries=1")


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("fetch.retrys=3", "did you mean fetch.retries?"),
        ("retries=3", "did you mean fetch.retries?"),
        ("sed=3", "did you mean seed?"),
        ("fetch.wxyz=3", "valid here: fetch.timeout_s, fetch.retries"),
        ("fetch=3", "this is a group of keys (fetch.timeout_s"),
        ("mode=quick", "mode=quick: Input should be 'fast' or 'exact'"),
        ("seed=many", "seed=many: Input should be a valid integer"),
        ("fetch.timeout_s=0", "fetch.timeout_s=0: Input should be greater than 0"),
        ("missing.yaml", "missing.yaml: no such configuration file"),
        ("list.parquet", "list.parquet: not understood"),
        ("--fast", "--fast: unknown option"),
    ],
)
def test_a_wrong_word_is_named_with_what_would_be_right(word: str, wanted: str) -> None:
    assert wanted in refusal("input=a", word)


def test_a_required_key_is_asked_for() -> None:
    assert "input: required, and not given" in refusal("seed=1")


def test_every_problem_is_told_at_once() -> None:
    message = refusal("input=a", "seed=x", "mode=y")
    assert "seed=x" in message
    assert "mode=y" in message


def test_related_keys_are_checked_together() -> None:
    assert refusal("input=a", "mode=exact", "seed=-1") == "seed=-1 needs mode=fast; set mode or seed"


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "\x00"])
def test_an_unreadable_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    assert "bad.yaml" in refusal(str(file))


def test_only_keys_that_change_results_are_compared_on_resume() -> None:
    flat = flatten(parse(Example, ["input=a"]), only_result=True)
    assert "fetch.timeout_s" not in flat
    assert flat["fetch.retries"] == 2


def test_help_shows_default_unit_and_choices() -> None:
    text = help_text(Example)
    assert "fetch.timeout_s=10.0 s\n        time allowed for one URL" in text
    assert "input=(required)" in text
    assert "[fast|exact]" in text


def test_setting_one_key_of_a_group_keeps_the_groups_own_defaults() -> None:
    assert parse(Example, ["input=a", "probe.retries=0"]).probe == Fetch(timeout_s=2.5, retries=0)
    assert "probe.timeout_s=2.5 s" in help_text(Example)


class Engine(Config):
    shorthand: ClassVar[str] = "kind"

    kind: str = key("small", "name of an engine")
    power: int = key(1, "horses")

    @classmethod
    def expand(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"power": 9, **values} if values.get("kind") == "large" else values


class Car(Config):
    engine: Engine = key(Engine(), "the engine")


def test_a_word_given_for_a_group_goes_to_its_shorthand_and_single_keys_override_it(tmp_path: Path) -> None:
    file = tmp_path / "car.yaml"
    file.write_text("engine: large\n")
    assert parse(Car, ["engine=large"]).engine.power == 9
    assert parse(Car, ["engine.power=3", "engine=large"]).engine.power == 3
    assert parse(Car, [str(file), "engine.power=4"]).engine == Engine(kind="large", power=4)
    assert parse(Car, [str(file), "engine=small"]).engine == Engine()
    again = parse(Car, [str(file)])
    assert validate(Car, again.model_dump()) == again


def test_a_group_without_a_shorthand_still_refuses_a_word() -> None:
    class Garage(Config):
        car: Car = key(Car(), "a car")

    with pytest.raises(RequestError, match="car=red: this is a group of keys"):
        parse(Garage, ["car=red"])


@pytest.mark.parametrize("word", ["inf", "nan", "1e999"])
def test_numbers_are_finite(word: str) -> None:
    assert refusal("input=a", f"fetch.timeout_s={word}").startswith(f"fetch.timeout_s={word}: Input should be a finite")


class Source(Config):
    place: str = key(REQUIRED, "where it is")
    column: str = key("caption", "what is read")


class Reader(Config):
    source: Source = key({}, "what is read")


def test_help_shows_the_defaults_of_a_group_that_has_a_required_key() -> None:
    lines = help_text(Reader).splitlines()
    assert "  source.place=(required)" in lines
    assert "  source.column=caption" in lines
