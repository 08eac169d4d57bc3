"""The shipped pictures and their captions, read from the archives beside this file."""

import csv
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
HELD_OUT_STYLE = "fluent-emoji"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One row of pairs.tsv. `path` is the member's name in an archive, and the picture's path on the server."""

    path: str
    style: str
    concept: str
    caption: str
    category: str
    subgroup: str
    licence: str
    author: str


@cache
def read_pairs() -> tuple[Pair, ...]:
    """Every pair, in the order of pairs.tsv."""
    with open(HERE / "pairs.tsv", encoding="utf-8", newline="") as file:
        return tuple(Pair(**row) for row in csv.DictReader(file, delimiter="\t"))


@cache
def read_images() -> dict[str, bytes]:
    """The encoded pictures by path."""
    images: dict[str, bytes] = {}
    for path in sorted(HERE.glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            images.update((name, archive.read(name)) for name in archive.namelist())
    return images


@cache
def read_translations() -> dict[str, dict[str, str]]:
    """concept -> {language: its name}, for some concepts."""
    with open(HERE / "labels.tsv", encoding="utf-8", newline="") as file:
        return {row.pop("concept"): row for row in csv.DictReader(file, delimiter="\t")}
