"""Every recipe that is installed is a request that can be run as it is, and with the methods that it names."""

import re
from pathlib import Path

import pytest

import training
from cluster.config import parse
from training.config import TrainConfig
from training.methods import METHODS

RECIPES = sorted((Path(training.__file__).parent / "recipes").glob("*.yaml"))


def read(recipe: Path, *words: str) -> TrainConfig:
    return parse(TrainConfig, [str(recipe), "data.dataset=unused", "output=unused", *words])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_valid_request(recipe: Path) -> None:
    config = read(recipe)
    METHODS[config.method].check(config.method_config, config.model, part_size=16, has_labels=True)


@pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if path.stem.startswith("demo_")], ids=lambda path: path.stem
)
def test_a_demo_recipe_is_of_the_method_in_its_name(recipe: Path) -> None:
    assert read(recipe).method == recipe.stem.removeprefix("demo_")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_overrides_that_a_recipe_speaks_of_exist(recipe: Path) -> None:
    comments = " ".join(line for line in recipe.read_text().splitlines() if line.startswith("#"))
    for word in re.findall(r"(?<![\w.'])[a-z_]+(?:\.[a-z_]+)*=[\w-]+", comments):
        if not word.startswith(("data.", "output", "method=")):
            read(recipe, word)
    for method in re.findall(r"method=(\w+)", comments):
        read(recipe, f"method={method}")
