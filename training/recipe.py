"""Recipes: configurations that come with the package, given by name where a file could be given."""

import difflib
from pathlib import Path

from cluster.errors import RequestError

FOLDER = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """The names of all recipes."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find_recipe(word: str) -> str:
    """Return a recipe's file for its name, and every other word as it is. Raises RequestError for a name unknown."""
    if "=" in word or word.startswith("-") or word.endswith((".yaml", ".yml")):
        return word
    if word not in recipe_names():
        close = difflib.get_close_matches(word, recipe_names(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(recipe_names())}"
        raise RequestError(f"{word}: no such recipe; {hint}")
    return str(FOLDER / f"{word}.yaml")
