"""The demo's URL list: every pair of the corpus, and a tenth more rows that are wrong in the ways of the web."""

import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from corpus import HELD_OUT_STYLE, Pair, read_pairs, read_translations
from server import CLOSED_HOST, HOSTS

# kind of URL -> (share of the clean rows, what a build with the demo's settings says of it)
DIRT: dict[str, tuple[float, str]] = {
    "missing": (0.020, "http_404"),
    "gone": (0.004, "http_410"),
    "denied": (0.004, "http_403"),
    "broken": (0.003, "http_500"),
    "page": (0.008, "not_an_image"),
    "empty": (0.003, "empty_body"),
    "short": (0.003, "truncated"),
    "cut": (0.003, "truncated_image"),
    "closed": (0.002, "connection_failed"),
    "never": (0.001, "timeout"),
    "loop": (0.002, "too_many_redirects"),
    "copy": (0.010, "duplicate_bytes"),
    "tiny": (0.005, "image_too_small"),
    "wide": (0.004, "image_too_elongated"),
    "blank": (0.003, "image_blank"),
    "near": (0.008, "ok"),
    "gif": (0.002, "ok"),
    "exif": (0.002, "ok"),
    "cmyk": (0.002, "ok"),
    "palette": (0.002, "ok"),
    "gray16": (0.002, "ok"),
}
# Ways to reach a picture that works in the end; these replace the plain URL of clean rows.
DETOURS = {"moved": 0.01, "found": 0.006, "temporary": 0.004, "flaky": 0.006, "slow": 0.008}
BAD_URLS = {
    None: "missing_url",
    "": "missing_url",
    "not a url": "invalid_url",
    "ftp://127.0.1.1/cat.jpg": "unsupported_scheme",
}
SHORT_CAPTIONS = ("", "a", "ok")
REPEATS_SHARE = 0.01
RENAMED_SHARE = 0.005
TRANSLATED_SHARE = 0.012


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the list and what should become of it: "ok", a reason, or "repeated_pair"."""

    url: str | None
    caption: str
    pair: Pair
    expected: str


def make_rows(port: int, num_pairs: int | None = None, seed: int = 0) -> list[Row]:
    """The list, in a fixed order: about num_pairs clean rows (all when None) of whole concepts, plus the dirt."""
    rng = random.Random(seed)
    pairs = _choose(rng, num_pairs)
    detours = rng.choices([*DETOURS, "img"], [*DETOURS.values(), 1 - sum(DETOURS.values())], k=len(pairs))
    rows = [
        Row(url=_url(port, kind, pair), caption=pair.caption, pair=pair, expected="ok")
        for pair, kind in zip(pairs, detours, strict=True)
    ]
    trained = [pair for pair in pairs if pair.style != HELD_OUT_STYLE]
    rows += _dirty_rows(rng, port, trained)
    rng.shuffle(rows)
    return rows


def write_list(path: Path, port: int, num_pairs: int | None = None, seed: int = 0) -> int:
    """Write the list as parquet with extra columns; returns the number of rows."""
    rows = make_rows(port, num_pairs, seed)
    columns = {
        "url": pa.array([row.url for row in rows], pa.string()),
        "caption": pa.array([row.caption for row in rows], pa.string()),
        "style": pa.array([row.pair.style for row in rows], pa.string()),
        "concept": pa.array([row.pair.concept for row in rows], pa.string()),
        "category": pa.array([row.pair.category for row in rows], pa.string()),
        "subgroup": pa.array([row.pair.subgroup for row in rows], pa.string()),
        "licence": pa.array([row.pair.licence for row in rows], pa.string()),
        "author": pa.array([row.pair.author for row in rows], pa.string()),
        "source_id": pa.array(range(len(rows)), pa.int64()),
    }
    pq.write_table(pa.table(columns), path)
    return len(rows)


def _choose(rng: random.Random, num_pairs: int | None) -> list[Pair]:
    pairs = list(read_pairs())
    if num_pairs is None or num_pairs >= len(pairs):
        return pairs
    concepts = sorted({pair.concept for pair in pairs if pair.style == HELD_OUT_STYLE})
    rng.shuffle(concepts)
    chosen: list[Pair] = []
    by_concept: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_concept.setdefault(pair.concept, []).append(pair)
    for concept in concepts:
        if len(chosen) >= num_pairs:
            break
        chosen += by_concept[concept]
    return chosen


def _dirty_rows(rng: random.Random, port: int, pairs: list[Pair]) -> list[Row]:
    rows: list[Row] = []

    def add(pair: Pair, expected: str, *, url: str | None, caption: str | None = None) -> None:
        rows.append(Row(url=url, caption=pair.caption if caption is None else caption, pair=pair, expected=expected))

    for kind, (share, expected) in DIRT.items():
        for pair in _sample(rng, pairs, share):
            add(pair, expected, url=_url(port, kind, pair))
    for pair in _sample(rng, pairs, REPEATS_SHARE):
        # A query makes another URL of the same picture; asking for it twice makes a repeated pair.
        for expected in ("duplicate_bytes", "repeated_pair"):
            add(pair, expected, url=_url(port, "img", pair) + "?again")
    translations = read_translations()
    known = [pair for pair in pairs if pair.concept in translations]
    for pair in _sample(rng, known, TRANSLATED_SHARE * len(pairs) / max(1, len(known))):
        language = rng.choice(("ja", "ru", "de", "fr"))
        caption = translations[pair.concept][language]
        add(pair, "caption_language", url=_url(port, "img", pair) + f"?{language}", caption=caption)
    for caption in SHORT_CAPTIONS:
        pair = rng.choice(pairs)
        add(pair, "caption_too_short", url=_url(port, "img", pair) + "?short", caption=caption)
    for bad, expected in BAD_URLS.items():
        add(rng.choice(pairs), expected, url=bad)
    for pair in _sample(rng, pairs, RENAMED_SHARE):
        add(pair, "duplicate_bytes", url=_url(port, "img", pair), caption=f"my photo of the {pair.concept}")
    return rows


def _sample(rng: random.Random, pairs: list[Pair], share: float) -> list[Pair]:
    """At least one, so that a short list has every kind of dirt too."""
    return rng.sample(pairs, min(len(pairs), max(1, round(share * len(pairs)))))


def _url(port: int, kind: str, pair: Pair) -> str:
    """Pictures are spread over hosts; slow and mute servers are hosts of their own."""
    if kind == "closed":
        return f"http://{CLOSED_HOST}:{port}/img/{pair.path}"
    hosts = {"slow": HOSTS[14:15], "never": HOSTS[15:]}.get(kind, HOSTS[:14])
    host = hosts[sum(pair.path.encode()) % len(hosts)]
    return f"http://{host}:{port}/{kind}/{pair.path}"
