"""Renders the shipped corpus from unpacked npm packages. A maintainer's script: see README.md; users never need it.

    python tests/corpus/make_corpus.py NODE_MODULES [OUTPUT_FOLDER]

The same packages and library versions give the same bytes. Needs `resvg-py` and Pillow.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from icon_sets import (
    HELD_OUT_STYLE,
    LANGUAGES,
    TONED_STYLES,
    TRAINING_STYLES,
    Concept,
    IconSet,
    NameBook,
    load_concepts,
)
from PIL import Image

SIZE_PX = 128
MIN_TRAINING_STYLES = 4
NUM_TRANSLATED = 300
ARCHIVE_LIMIT_BYTES = 1_000_000
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
COLUMNS = ("path", "style", "concept", "caption", "category", "subgroup", "licence", "author")
# How each style's captions are phrased; a real list mixes many habits too.
_PHRASES = {
    "noto": ("{name}: {words}", "{name}, {words}"),
    "twemoji": ("{name} ({words})", "{words}: {name}"),
    "openmoji": ("a drawing of {name}, {words}", "{name} drawn by hand, {words}"),
    "noto-v1": ("{name} with {words}", "{words}, {name}"),
    "emojione": ("a picture of {name}, {words}", "picture: {name}; {words}"),
    "fxemoji": ("icon of {name}, {words}", "{name} icon: {words}"),
    "fluent-emoji": ("{name}, {words}", "a picture of {name}: {words}"),
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One encoded picture and its row of pairs.tsv."""

    path: str
    concept: str
    data: bytes
    row: tuple[str, ...]


def main() -> None:
    """Writes archives, pairs.tsv, labels.tsv and LICENSES, and prints what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node_modules", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=Path(__file__).parent)
    arguments = parser.parse_args()
    styles = (*TRAINING_STYLES, HELD_OUT_STYLE)
    sets = [IconSet(arguments.node_modules, style) for style in styles]
    book = NameBook(arguments.node_modules, sets)
    concepts = [c for c in load_concepts(arguments.node_modules) if _is_common(c, sets, book)]
    drawn = _without_rare({icon_set.style: _draw_style(icon_set, concepts, book) for icon_set in sets})
    rows = []
    for icon_set in sets:
        pictures = drawn[icon_set.style]
        num_archives = _write_archives(arguments.output, icon_set.style, pictures)
        rows += [picture.row for picture in pictures]
        size_bytes = sum(len(picture.data) for picture in pictures)
        print(f"{icon_set.style}: {len(pictures)} pictures, {size_bytes} bytes, {num_archives} archives", flush=True)
    _write_licences(arguments.output / "LICENSES", arguments.node_modules, sets)
    _write_tsv(arguments.output / "pairs.tsv", COLUMNS, rows)
    translated = sorted(
        (c for c in concepts if all(c.other_names) and not c.is_toned), key=lambda c: _draw(c.code, "t")
    )
    label_rows = [(c.name, *c.other_names) for c in translated[:NUM_TRANSLATED]]
    _write_tsv(arguments.output / "labels.tsv", ("concept", *LANGUAGES), label_rows)
    print(f"{len({row[2] for row in rows})} concepts, {len(rows)} pairs, {dict(Counter(row[4] for row in rows))}")


def _is_common(concept: Concept, sets: list[IconSet], book: NameBook) -> bool:
    """True for a concept that the held-out style and enough training styles drew (skin tones: TONED_STYLES only)."""
    having = {s.style for s in sets if s.svg(book.names(s, concept), SIZE_PX) is not None}
    if concept.is_toned:
        return having.issuperset(TONED_STYLES)
    return HELD_OUT_STYLE in having and len(having) > MIN_TRAINING_STYLES


def _draw_style(icon_set: IconSet, concepts: list[Concept], book: NameBook) -> list[Picture]:
    """Every concept this set can draw; blank renderings and repeated ones are left out, so that dirt is only added."""
    pictures, seen = [], set()
    for concept in concepts:
        if concept.is_toned and icon_set.style not in TONED_STYLES:
            continue
        svg = icon_set.svg(book.names(icon_set, concept), SIZE_PX)
        if svg is None:
            continue
        drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))))
        extension, data = _encode(drawn.convert("RGBA"), _draw(f"{icon_set.style}/{concept.code}", "format"))
        pixels_sha256 = hashlib.sha256(drawn.tobytes()).digest()
        if pixels_sha256 in seen or float(np.asarray(_on_white(drawn.convert("RGBA"))).std()) < 4:
            continue
        seen.add(pixels_sha256)
        path = f"{icon_set.style}/{concept.code}.{extension}"
        licence, author = icon_set.info["license"]["spdx"], icon_set.info["author"]["name"]
        caption = _caption(icon_set.style, concept)
        row = (path, icon_set.style, concept.name, caption, concept.category, concept.subgroup, licence, author)
        pictures.append(Picture(path=path, concept=concept.name, data=data, row=row))
    return pictures


def _without_rare(drawn: dict[str, list[Picture]]) -> dict[str, list[Picture]]:
    """Leaves out held-out concepts that lost training styles because their drawing was blank or another concept's."""
    num_styles = Counter(picture.concept for pictures in drawn.values() for picture in pictures)
    held_out = {picture.concept for picture in drawn[HELD_OUT_STYLE]}
    rare = {concept for concept in held_out if num_styles[concept] <= MIN_TRAINING_STYLES}
    return {style: [p for p in pictures if p.concept not in rare] for style, pictures in drawn.items()}


def _encode(drawn: Image.Image, draw: float) -> tuple[str, bytes]:
    """Mostly WebP; some JPEG, palette PNG, and WebP with transparent ground, as the web has them."""
    encoded = io.BytesIO()
    if draw < 0.06:
        _on_white(drawn).save(encoded, "JPEG", quality=78, optimize=True)
        return "jpg", encoded.getvalue()
    if draw < 0.12:
        _on_white(drawn).quantize(32).save(encoded, "PNG", optimize=True)
        return "png", encoded.getvalue()
    ground = drawn if draw < 0.18 else _on_white(drawn)
    ground.save(encoded, "WEBP", quality=66, method=6)
    return "webp", encoded.getvalue()


def _on_white(drawn: Image.Image) -> Image.Image:
    ground = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
    ground.alpha_composite(drawn)
    return ground.convert("RGB")


def _caption(style: str, concept: Concept) -> str:
    """The name with up to three of the keywords that it does not already say, phrased in the style's habit."""
    said = set(concept.name.lower().replace(":", "").split())
    seed = f"{style}/{concept.code}"
    unsaid = sorted((word for word in concept.keywords if word not in said), key=lambda word: _draw(seed, word))
    num_words = max(int(_draw(seed, "count") * 4), int(len(concept.name) < 6))  # "ox" alone says too little
    words = ", ".join(unsaid[:num_words])
    phrases = _PHRASES[style]
    phrase = phrases[int(_draw(seed, "phrase") * len(phrases))]
    return phrase.format(name=concept.name, words=words) if words else concept.name


def _draw(seed: str, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:6], "big") / 2**48


def _write_archives(folder: Path, style: str, pictures: list[Picture]) -> int:
    """Stored (not compressed) zip files of bounded size: a tar's padding would cost 0.8 KB for each 1.3 KB picture."""
    for old in folder.glob(f"{style}.[0-9].zip"):
        old.unlink()
    batches: list[list[Picture]] = [[]]
    for picture in pictures:
        if sum(len(p.data) for p in batches[-1]) + len(picture.data) > ARCHIVE_LIMIT_BYTES:
            batches.append([])
        batches[-1].append(picture)
    for index, batch in enumerate(batches):
        with zipfile.ZipFile(folder / f"{style}.{index}.zip", "w", zipfile.ZIP_STORED) as archive:
            for picture in batch:
                archive.writestr(zipfile.ZipInfo(picture.path, _ZIP_DATE), picture.data)
    return len(batches)


def _write_licences(folder: Path, node_modules: Path, sets: list[IconSet]) -> None:
    """One file per style, and one for names and keywords. MIT asks for its text, the others for a link to it."""
    folder.mkdir(exist_ok=True)
    names_licence = (node_modules / "emojibase-data" / "LICENSE").read_text(encoding="utf-8")
    mit_text = names_licence[names_licence.index("Permission is hereby granted") :]
    for icon_set in sets:
        text = _attribution(icon_set)
        if icon_set.info["license"]["spdx"] == "MIT":
            text += f"\nCopyright (c) {icon_set.info['author']['name']}\n\n{mit_text}"
        (folder / f"{icon_set.style}.txt").write_text(text, encoding="utf-8")
    origin = (
        "Emoji names, keywords and groups in pairs.tsv, and names in labels.tsv\n"
        "Obtained from: npm package emojibase-data, https://github.com/milesj/emojibase\n"
        "It takes them from Unicode CLDR (Unicode-3.0), https://www.unicode.org/license.txt\n\n"
    )
    (folder / "emojibase-data.txt").write_text(origin + names_licence, encoding="utf-8")


def _attribution(icon_set: IconSet) -> str:
    """As CC-BY asks for it: title, author, source, licence, and what was changed."""
    info, style = icon_set.info, icon_set.style
    return f"""{info["name"]}
Author: {info["author"]["name"]}
Source: {info["author"]["url"]}
Licence: {info["license"]["title"]}
SPDX-License-Identifier: {info["license"]["spdx"]}
Licence text: {info["license"]["url"]}
Obtained from: npm package @iconify-json/{style} {icon_set.package_version}
Files: {style}.*.zip
Changes made: the vector drawings were rasterised to {SIZE_PX}x{SIZE_PX} pixels, most of them placed on a white ground,
and encoded as WebP, JPEG or PNG with loss. A selection of the drawings is included. Shared under the same licence.
"""


def _write_tsv(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    lines = ["\t".join(row) for row in [columns, *rows]]
    assert all(line.count("\t") == len(columns) - 1 and "\n" not in line for line in lines)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
