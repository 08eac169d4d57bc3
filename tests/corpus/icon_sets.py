"""Reads what the corpus is made from: emoji icon sets (SVG) and the names of emoji. For `make_corpus.py` only.

Inputs are unpacked npm packages: `@iconify-json/<set>` (drawings) and `emojibase-data` (names, keywords, groups).
A drawing and a name meet in the emoji's code points, written as `1f34e` or `1f469-200d-1f33e` (no `fe0f`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The first six are trained on. `fluent-emoji-flat` is left out on purpose: it is the held-out set's own artwork without
# shading, and a 16x16-pixel nearest neighbour names 96 % of the held-out pictures as soon as it may look there.
TRAINING_STYLES = ("noto", "twemoji", "openmoji", "noto-v1", "emojione", "fxemoji")
HELD_OUT_STYLE = "fluent-emoji"
LANGUAGES = ("de", "fr", "ja", "ru")
NUM_TONED_CONCEPTS = 6
TONED_STYLES = ("noto", "twemoji")
_PEOPLE, _COMPONENT, _FLAGS = 1, 2, 9
# Concepts that even a person cannot tell apart by drawing, or whose picture is its own name in letters.
_LEFT_OUT = re.compile(
    r"o’clock|thirty$|-thirty|^keycap|^input |^Japanese “|(small|medium|large|button)\b.* (square|diamond)|"
    r"^(red|blue|black|white|large|small) (circle|blue diamond|orange diamond|square button)|triangle pointed"
)


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One emoji: its code points, English name (the class text), keywords, group names and names in other languages."""

    code: str
    name: str
    keywords: tuple[str, ...]
    category: str
    subgroup: str
    other_names: tuple[str, ...]
    is_toned: bool = False


class IconSet:
    """One style's drawings, found by code points or, where the set has no such table, by the icon's name."""

    def __init__(self, node_modules: Path, style: str) -> None:
        folder = node_modules / "@iconify-json" / style
        self.style = style
        self.info: dict[str, Any] = _load(folder / "info.json")
        self.package_version = str(_load(folder / "package.json")["version"])
        self._icons = _load(folder / "icons.json")
        self.name_by_code = {_plain_code(code): name for code, name in _load(folder / "chars.json").items()}

    def svg(self, names: list[str], size_px: int) -> str | None:
        """The drawing under the first name that exists, as an SVG document of size_px; None when there is none."""
        for name in names:
            icon = self._icon(name)
            if icon is not None:
                return self._document(icon, size_px)
        return None

    def _icon(self, name: str) -> dict[str, Any] | None:
        icon: dict[str, Any] | None = self._icons["icons"].get(name)
        if icon is None:
            alias = self._icons.get("aliases", {}).get(name)
            if alias is None or set(alias) != {"parent"}:  # a flipped or turned copy is not that drawing
                return None
            return self._icon(alias["parent"])
        # Letters would be drawn with whatever fonts the machine has.
        return None if "<text" in icon["body"] else icon

    def _document(self, icon: dict[str, Any], size_px: int) -> str:
        box = [icon.get("left", 0), icon.get("top", 0)]
        box += [icon.get(side, self._icons.get(side, 16)) for side in ("width", "height")]
        view_box = " ".join(str(number) for number in box)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{view_box}" width="{size_px}" height="{size_px}">{icon["body"]}</svg>'
        )


class NameBook:
    """Says under which icon names a set may keep an emoji."""

    def __init__(self, node_modules: Path, sets: list[IconSet]) -> None:
        self._by_code: dict[str, list[str]] = {}
        for icon_set in sets:
            for code, name in icon_set.name_by_code.items():
                self._by_code.setdefault(code, []).append(name)
        shortcodes = node_modules / "emojibase-data" / "en" / "shortcodes"
        self._shortcodes = [_load(shortcodes / f"{name}.json") for name in ("cldr", "joypixels", "iamcal")]

    def names(self, icon_set: IconSet, concept: Concept) -> list[str]:
        """Candidate names, best first; a set with a code table is asked by code only."""
        if icon_set.name_by_code:
            name = icon_set.name_by_code.get(concept.code)
            return [name] if name else []
        if icon_set.style == "fxemoji":  # its names are run together: `deciduoustree`
            return [_run_together(name) for name in self._spoken_names(concept)]
        return list(dict.fromkeys(self._by_code.get(concept.code, [])))

    def _spoken_names(self, concept: Concept) -> Iterator[str]:
        yield concept.name
        if "-" not in concept.code:
            yield unicodedata.name(chr(int(concept.code, 16)), concept.name)
        for table in self._shortcodes:
            found = table.get(concept.code.upper(), [])
            yield from [found] if isinstance(found, str) else found


def load_concepts(node_modules: Path) -> list[Concept]:
    """Every emoji that could be a class, in code point order: no flags, no gendered copies, few skin tones."""
    data = node_modules / "emojibase-data"
    groups = _load(data / "meta" / "groups.json")
    other_names = [_labels(_load(data / language / "data.json")) for language in LANGUAGES]
    concepts: list[Concept] = []
    num_toned = 0
    for emoji in sorted(_load(data / "en" / "data.json"), key=lambda emoji: str(emoji["hexcode"])):
        group = emoji.get("group")
        is_gendered_copy = group == _PEOPLE and "200D" in emoji["hexcode"]
        if group in (None, _COMPONENT, _FLAGS) or is_gendered_copy or _LEFT_OUT.search(emoji["label"]):
            continue
        variants = [emoji]
        if group == _PEOPLE and len(emoji.get("skins", [])) == 5 and num_toned < NUM_TONED_CONCEPTS:
            variants += emoji["skins"]
            num_toned += 1
        concepts.extend(
            Concept(
                code=_plain_code(variant["hexcode"]),
                name=variant["label"],
                keywords=tuple(tag for tag in emoji.get("tags", []) if re.fullmatch(r"[A-Za-z][A-Za-z '-]+", tag)),
                category=groups["groups"][str(group)],
                subgroup=groups["subgroups"][str(emoji["subgroup"])],
                other_names=tuple(labels.get(variant["hexcode"], "") for labels in other_names),
                is_toned=variant is not emoji,
            )
            for variant in variants
        )
    return concepts


def _labels(emojis: list[dict[str, Any]]) -> dict[str, str]:
    everything = emojis + [skin for emoji in emojis for skin in emoji.get("skins", [])]
    return {emoji["hexcode"]: emoji["label"] for emoji in everything}


def _plain_code(code: str) -> str:
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def _run_together(name: str) -> str:
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", ascii_name)


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
