"""Every recipe is a configuration that parses, fits its method, and builds."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from cluster.config import parse
from cluster.errors import RequestError
from training.__main__ import main
from training.config import TrainConfig
from training.data.tokenizer import Tokenizer
from training.methods import METHODS, build_method
from training.recipe import FOLDER, find_recipe, recipe_names

PLACES = ["data.dataset=data", "output=out"]
CLASSES = ("cat", "dog")


def recipe(name: str, *words: str) -> TrainConfig:
    """As if typed, with the earlier run that a second stage needs."""
    first_stage = ["init.checkpoint=first"] if "_then_" in name else []
    return parse(TrainConfig, [find_recipe(name), *PLACES, *first_stage, *words])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_its_method_without_memory(name: str) -> None:
    config = recipe(name)
    method = METHODS[config.method]
    part_size = config.train.batch_size // (config.train.num_ranks or 1)
    method.check(config.method_config, config.model, part_size=part_size, has_labels=False)
    tokenizer = Tokenizer(context_length=config.model.text.context_length)
    with torch.device("meta"):
        built = build_method(config.method, config.method_config, config.model, tokenizer)
    assert all(parameter.is_meta for parameter in built.parameters())
    assert any(parameter.requires_grad for parameter in built.parameters())


def test_every_method_has_a_papers_recipe_and_a_toy() -> None:
    methods = {name: recipe(name).method for name in recipe_names()}
    assert {method for name, method in methods.items() if name.startswith("demo_")} == set(METHODS)
    assert {method for name, method in methods.items() if not name.startswith("demo_")} == set(METHODS)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_first_what_it_is_and_names_no_place(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert not {"output", "ray"} & yaml.safe_load(text).keys()
    if name.startswith("demo_"):
        assert recipe(name).method == name.removeprefix("demo_")


@pytest.mark.parametrize("name", recipe_names())
def test_the_overrides_and_recipes_that_a_recipe_speaks_of_exist(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    comments = " ".join(line for line in lines if line.startswith("#"))
    for word in re.findall(r"(?<![\w.'])[a-z_0-9]+(?:\.[a-z_0-9]+)*=[\w.-]*\w", comments):
        if not word.startswith(("data.", "output", "init.")):
            recipe(name, word)
    for other in re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)*_(?:b16|cc|web|in1k|then_\w+)\b", comments):
        assert other in recipe_names()


def test_the_billion_parameter_recipe_is_of_a_billion_parameters() -> None:
    config = recipe("m3i_internimage_h")
    with torch.device("meta"):
        built = build_method("m3i", config.m3i, config.model, Tokenizer(), CLASSES)
    backbone = sum(parameter.numel() for parameter in built.get_submodule("towers.image").parameters())
    assert backbone / 1e9 == pytest.approx(1.08, abs=0.01)


def test_words_after_a_recipes_name_override_it() -> None:
    config = recipe("rils_b16", "model.vision.patch_size=32", "rils.mask_ratio=0.9", "optim.warmup_epochs=2")
    assert (config.model.vision.patch_size, config.rils.mask_ratio, config.optim.warmup_epochs) == (32, 0.9, 2)
    assert config.model.vision.size == "B"


def test_a_recipe_that_does_not_exist_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match="no such recipe; did you mean rils_b16"):
        find_recipe("rils_b61")
    assert find_recipe("mine.yaml") == "mine.yaml"
    assert main(["train", "--help"]) == 0
    assert "mae_clip_cc" in capsys.readouterr().out


def test_recipes_are_installed_with_the_package() -> None:
    assert {Path(file).name for file in map(find_recipe, recipe_names())} >= {"demo_clip.yaml", "rils_b16.yaml"}
