"""`OUT/card/README.md`: the dataset card, as Hugging Face has them, made of what the build knows.

Its bytes are a function of the manifest, of the records' first units and of what people say of the dataset
(`report.name`, `report.license`, ...): no times, no speeds.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from pipeline.about import AboutConfig
from pipeline.manifest import MANIFEST_FILE, Manifest
from pipeline.reasons import Reason
from pipeline.report.croissant import COLUMNS, CROISSANT_FILE
from pipeline.report.data import meaning

CARD_FILE = "card/README.md"
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B")
MIN_LANGUAGE_SHARE = 0.01
_DUPLICATES = {
    Reason.DUPLICATE_BYTES: "dedup.exact",
    Reason.DUPLICATE_URL: "dedup.by_url",
    Reason.DUPLICATE_PAIR: "dedup.by_bytes_and_caption",
    Reason.NEAR_DUPLICATE: "dedup.near_distance",
    Reason.SEMANTIC_DUPLICATE: "dedup.semantic_similarity",
}
_ASKED_FIRST = {
    "fetch.robots": "robots.txt (obey: asked before every site's images)",
    "fetch.tdm_reservation": "reservations of text and data mining (TDM-Reservation)",
    "fetch.disallowed_header_directives": "directives of X-Robots-Tag that exclude an image",
}
_REFUSED = (Reason.ROBOTS_DISALLOWED, Reason.ROBOTS_UNAVAILABLE, Reason.OPTED_OUT)


def card_markdown(manifest: Manifest, said: AboutConfig, languages: Counter[str], version: str) -> bytes:
    """The whole card.

    languages: captions by language, empty if nobody told them. version: of pairmill.
    """
    parts = [
        _header(manifest, said, languages),
        f"# {said.name}",
        said.about or f"{manifest.num_samples:,} image-text pairs, collected from the web by pairmill.",
        *_contents(manifest),
        *_kept(manifest),
        *_languages(languages),
        *_sources(manifest),
        *_rules(manifest),
        *_duplicates(manifest),
        *_evaluation_sets(manifest),
        *_balance(manifest),
        *_refusals(manifest),
        *_making(manifest, version),
        *_limits(manifest),
    ]
    return ("\n\n".join(part for part in parts if part) + "\n").encode()


def size_category(count: int) -> str:
    """Hugging Face's name for a number of samples."""
    return SIZES[min(len(SIZES) - 1, max(0, len(str(count)) - 3))]


def _header(manifest: Manifest, said: AboutConfig, languages: Counter[str]) -> str:
    total = languages.total()
    frequent = [name for name, number in languages.most_common() if number >= MIN_LANGUAGE_SHARE * total]
    kept = manifest.config.get("curate.languages")
    values = {
        "pretty_name": said.name,
        "license": said.license,
        **({"language": list(kept) if kept else frequent} if kept or frequent else {}),
        "task_categories": ["image-to-text", "text-to-image", "zero-shot-image-classification"],
        "size_categories": [size_category(manifest.num_samples)],
        "tags": ["image-text", "webdataset", "croissant", "pairmill"],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "shards/*.tar"}]},
            {"config_name": "table", "data_files": [{"split": "train", "path": "shards/*.parquet"}]},
        ],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _contents(manifest: Manifest) -> list[str]:
    first, last = manifest.shards[0].index, manifest.shards[-1].index
    size_gb = sum(shard.tar.size_bytes + shard.parquet.size_bytes for shard in manifest.shards) / 1e9
    columns = [
        (f"`{name}`", f"`{kind}`", COLUMNS.get(name, "as in the lists")) for name, kind in manifest.columns.items()
    ]
    return [
        "## Contents",
        f"{manifest.num_samples:,} samples in {len(manifest.shards):,} shards, {size_gb:,.3g} GB, in random order.",
        _table(
            ["file", "what it is"],
            [
                ("`shards/*.tar`", "images, captions and JSON in webdataset form"),
                ("`shards/*.parquet`", "a row for each sample of the tar, in its order"),
                ("`record/*.parquet`", "what became of every pair of the lists"),
                (f"`{MANIFEST_FILE}`", "sizes and sha256 of all files, settings, sources, counts"),
                (f"`{CROISSANT_FILE}`", "the same for tools that read Croissant 1.0"),
            ],
        ),
        "```python\nimport webdataset\n\n"
        f'samples = webdataset.WebDataset("shards/{{{first:05}..{last:05}}}.tar")\n'
        'pairs = samples.decode("pil").to_tuple("jpg;png;webp", "txt")\n```',
        _table(["column", "type", "meaning"], columns),
    ]


def _kept(manifest: Manifest) -> list[str]:
    ordered = sorted(manifest.counts.items(), key=lambda item: (item[0] != "kept", -item[1], item[0]))
    rows = [
        (f"`{name}`", "in the dataset" if name == "kept" else meaning(name), f"{number:,}", _share(number, manifest))
        for name, number in ordered
    ]
    return [
        "## What became of every row",
        f"The lists have {manifest.num_input_rows:,} rows. Each is in one line:",
        _table(["", "", "rows", "share"], rows),
    ]


def _languages(languages: Counter[str]) -> list[str]:
    if not languages:
        return []
    total = languages.total()
    rows = [(name, f"{number / total:.1%}") for name, number in languages.most_common(20)]
    return [
        "## Languages",
        f"Of {total:,} captions of the lists (a random sample if the dataset is large), before any was dropped for it:",
        _table(["language", "share"], rows),
    ]


def _sources(manifest: Manifest) -> list[str]:
    rows = [
        (f"`{source['path']}`", f"{source['num_rows']:,}", f"{source['size_bytes']:,}", f"`{source['sha256'] or '-'}`")
        for source in manifest.sources
    ]
    return ["## Sources", _table(["list", "rows", "bytes", "sha256"], rows)]


def _rules(manifest: Manifest) -> list[str]:
    chosen = {name: value for name, value in _group(manifest, "curate.").items() if value not in (None, False, 0, [])}
    return [
        "## Rules",
        "A pair is kept if every rule keeps it. Settings of the rules; what is off is left out:",
        _settings(chosen),
    ]


def _duplicates(manifest: Manifest) -> list[str]:
    rows = [
        (meaning(reason), f"`{key}={_value(manifest.config.get(key))}`", f"{manifest.counts.get(reason, 0):,}")
        for reason, key in _DUPLICATES.items()
    ]
    return ["## Duplicates", _table(["dropped because", "setting", "rows"], rows)]


def _evaluation_sets(manifest: Manifest) -> list[str]:
    sets = manifest.config.get("curate.evaluation_sets") or []
    if not sets:
        text = "The images were **not** compared with those of any evaluation set."
    else:
        names = ", ".join(f"`{_value(name)}`" for name in sets)
        limits = ", ".join(
            f"`{key}={_value(manifest.config.get(key))}`"
            for key in ("curate.evaluation_distance", "curate.evaluation_similarity")
        )
        number = manifest.counts.get(Reason.EVALUATION_SET, 0)
        text = f"Compared with {names} ({limits}): {number:,} rows were dropped."
    return ["## Decontamination", text]


def _balance(manifest: Manifest) -> list[str]:
    limit = manifest.config.get("balance.per_concept")
    if limit is None:
        return ["## Balance", "The frequency of concepts was left as it is."]
    number = manifest.counts.get(Reason.BALANCED_OUT, 0)
    return [
        "## Balance",
        f"As MetaCLIP does: of the captions that have a frequent concept about {limit:,} are kept; {number:,} rows "
        "were dropped. Settings:",
        _settings(_group(manifest, "balance.")),
    ]


def _refusals(manifest: Manifest) -> list[str]:
    asked = [(text, f"`{key}={_value(manifest.config.get(key))}`") for key, text in _ASKED_FIRST.items()]
    refused = [(f"`{reason}`", meaning(reason), f"{manifest.counts.get(reason, 0):,}") for reason in _REFUSED]
    return [
        "## Opt-out",
        _table(["asked", "setting"], asked),
        _table(["", "", "rows"], refused),
        "To have an image taken out, name its URL: `record/` tells which sample it is.",
    ]


def _making(manifest: Manifest, version: str) -> list[str]:
    repairs = f" {len(manifest.repairs):,} repairs added pairs later." if manifest.repairs else ""
    return [
        "## How it was made",
        f"`pairmill build CONFIG.yaml input=... output=...` (pairmill {version}) with these settings; the same lists "
        f"and the same answers of the servers give the same bytes.{repairs}",
        f"```yaml\n{yaml.safe_dump(_nested(manifest.config), sort_keys=False, allow_unicode=True)}```",
    ]


def _limits(manifest: Manifest) -> list[str]:
    config = manifest.config
    points = [
        "Captions are what stood beside the images in the lists. Nobody has checked that they are true.",
        "Images belong to their owners; the licence above is of the collection.",
        "People may be recognisable in images, and captions may name them.",
    ]
    if config.get("curate.max_nsfw_score") is None:
        points.append("No model has looked for images that are not safe for work.")
    if config.get("dedup.near_distance") is None and config.get("dedup.semantic_similarity") is None:
        points.append("Only exact duplicates were looked for: re-encoded and resized copies are still there.")
    elif config.get("dedup.semantic_similarity") is None:
        points.append("Perceptual hashes miss most copies that were cropped, turned or written on.")
    if not config.get("curate.evaluation_sets"):
        points.append("Results on public benchmarks may profit from their images being in this dataset.")
    return ["## Known limits", "\n".join(f"- {point}" for point in points)]


def _share(number: int, manifest: Manifest) -> str:
    return f"{number / manifest.num_input_rows:.2%}"


def _group(manifest: Manifest, prefix: str) -> dict[str, Any]:
    return {name: value for name, value in manifest.config.items() if name.startswith(prefix)}


def _settings(settings: Mapping[str, Any]) -> str:
    return _table(["setting", "value"], [(f"`{name}`", f"`{_value(value)}`") for name, value in settings.items()])


def _value(value: Any) -> str:
    """As it is written in a configuration."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return nested


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
