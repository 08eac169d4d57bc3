"""The page and its sections, in order."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from markupsafe import Markup, escape

from cluster.config import REQUIRED, Config, flatten, key
from cluster.errors import EXIT_DONE
from cluster.journal import Journal
from cluster.report import SECTIONS_FILE, Card, Section, cards_html, environment, render_page, sections_json, table_html
from cluster.run import read_run
from cluster.store import Store
from pipeline.about import AboutConfig
from pipeline.config import BuildConfig
from pipeline.downloads import Tally, Totals, size_text, status_name, tally_downloads
from pipeline.generations import all_markers
from pipeline.manifest import Manifest, read_manifest
from pipeline.report.card import CARD_FILE, card_markdown
from pipeline.report.croissant import CROISSANT_FILE, croissant_json
from pipeline.report.curation import balance_html, evaluation_html, overlap_html, sweep_html
from pipeline.report.data import TEMPLATES, Sampled, Step, sample_rows, steps_of
from pipeline.report.dropped import dropped_html
from pipeline.report.duplicates import Twins
from pipeline.report.figures import count_languages, distributions_html
from pipeline.report.pictures import Album
from pipeline.report.semantic_map import map_html
from pipeline.timings import images_per_s, read_timings

REPORT_FILE = "report/index.html"
NUM_KEPT_SHOWN = 32
STAGES = ("plan-read", "plan-order", "fetch", "decide", "pack", "record")
_TEMPLATES = environment(TEMPLATES)


class ReportConfig(Config):
    """`pairmill report OUT`."""

    dataset: str = key(REQUIRED, "folder or URL of a finished dataset", min_length=1)
    name: str | None = key(None, "what the card calls the dataset; null: report.name of the build", min_length=1)
    about: str | None = key(None, "what the card says that it is for; null: report.about of the build")
    license: str | None = key(None, "licence that the card gives; null: report.license of the build", min_length=1)
    url: str | None = key(None, "where the dataset can be found; null: report.url of the build")


def report_command(config: ReportConfig) -> int:
    """Write a dataset's report again and say where it is."""
    store, _ = read_manifest(config.dataset)
    write_report(store, config.model_dump(exclude={"dataset"}, exclude_none=True))
    print(f"report: {store.url_of(REPORT_FILE)}")
    print(f"card: {store.url_of(CARD_FILE)}")
    return EXIT_DONE


def write_report(store: Store, said: Mapping[str, Any] | None = None) -> None:
    """Make the page, its sections for pages that join several reports, the dataset card and croissant.json.

    said: what `AboutConfig` has, where it is not as the build's configuration says.
    """
    _, manifest = read_manifest(store.url)
    run = read_run(store) or {}
    about = AboutConfig(**{**run.get("config", {}).get("report", {}), **(said or {})})
    sampled = sample_rows(store)
    languages = count_languages(store, sampled, manifest)
    store.write_bytes(CARD_FILE, card_markdown(manifest, about, languages, str(run.get("pairmill", ""))))
    store.write_bytes(CROISSANT_FILE, croissant_json(manifest, about))
    sections = dataset_sections(store, manifest, sampled, languages)
    lead = f"{manifest.num_samples:,} image-text pairs in {store.url}"
    store.write_bytes(SECTIONS_FILE, sections_json(sections))
    store.write_bytes(REPORT_FILE, render_page("Dataset report", sections, lead=lead).encode())


def dataset_sections(store: Store, manifest: Manifest, sampled: Sampled, languages: Counter[str]) -> list[Section]:
    """Every section of the page, in order."""
    steps, album = steps_of(store, manifest), Album(store)
    twins = Twins(store=store, sampled=sampled)
    sections = {
        "Totals": _totals(store, manifest),
        "What became of every row": _funnel(manifest, steps),
        "Kept samples": _kept(album, sampled),
        "Map": map_html(store, album, sampled),
        "Dropped pairs": _note(sampled, "pairs") + dropped_html(album, twins, steps),
        "Overlap of rules": overlap_html(store),
        "Semantic similarity": sweep_html(store),
        "Evaluation sets": evaluation_html(album, sampled, manifest),
        "Balance": balance_html(store),
        "Distributions": _note(sampled, "pairs") + distributions_html(sampled, languages),
        "Downloads": _downloads(store, sampled),
        "Speed": _speed(store),
        "Settings": _settings(store, manifest),
    }
    return [Section(title=title, html=html) for title, html in sections.items() if html]


def _totals(store: Store, manifest: Manifest) -> str:
    size_bytes = sum(shard.tar.size_bytes + shard.parquet.size_bytes for shard in manifest.shards)
    share = manifest.num_samples / manifest.num_input_rows
    rate = images_per_s(read_timings(store))
    per_shard = max(shard.num_samples for shard in manifest.shards)
    return cards_html(
        [
            Card(label="rows in the lists", value=f"{manifest.num_input_rows:,}", note=_lists(manifest)),
            Card(label="samples kept", value=f"{manifest.num_samples:,}", note=f"{share:.1%} of the rows"),
            Card(label="shards", value=f"{len(manifest.shards):,}", note=f"{per_shard:,} samples each"),
            Card(
                label="on disk",
                value=size_text(size_bytes),
                note=f"{size_text(size_bytes / manifest.num_samples)} a pair",
            ),
            Card(label="images/s", value=f"{rate:,.0f}" if rate else "-", note="downloaded and decoded"),
        ]
    )


def _funnel(manifest: Manifest, steps: list[Step]) -> str:
    phases = [(phase, list(group)) for phase, group in groupby(steps, key=lambda step: step.phase)]
    kept, total = manifest.counts["kept"], manifest.num_input_rows
    page = _TEMPLATES.get_template("funnel.html").render(total=total, kept=kept, phases=phases)
    return (
        "<p>Every row of the lists is in exactly one line. <code>pairmill explain OUT URL</code> "
        f"tells the story of a single one.</p>{page}"
    )


def _kept(album: Album, sampled: Sampled) -> str:
    rows = [sampled.row(index) for index in sampled.find("kept")[:NUM_KEPT_SHOWN]]
    pictures = [picture for row in rows if (picture := album.picture(row, _size_note(row))).image]
    if not pictures:
        return '<p class="quiet">The downloaded images are not in work/ any more; see the shards.</p>'
    return _TEMPLATES.get_template("pictures.html").render(pictures=pictures)


def _downloads(store: Store, sampled: Sampled) -> str:
    totals = Totals.of(all_markers(Journal(store), "fetch"), read_timings(store))
    retried = totals.num_retries / max(1, totals.num_requests)
    cards = [
        Card(label="images", value=f"{totals.num_images:,}", note="downloaded and decoded"),
        Card(label="requests", value=f"{totals.num_requests:,}", note=f"{retried:.1%} of them retries"),
        Card(label="downloaded", value=size_text(totals.size_bytes), note=_each(totals)),
        Card(label="images/s", value=_rate(totals.images_per_s), note=f"{_rate(totals.images_per_worker_s)} a worker"),
        Card(label="bytes/s", value=size_text(totals.bytes_per_s) if totals.bytes_per_s else "-"),
    ]
    downloads = tally_downloads([sampled.rows])
    statuses = [(status_name(status), tally) for status, tally in downloads.statuses()]
    attempts = [(str(number), tally) for number, tally in downloads.attempts()]
    tables = [_tally_table("last answer", statuses), _tally_table("attempts", attempts)]
    hosts = [_tally_table("host", downloads.largest_hosts(), "The hosts with most pairs")]
    if failing := downloads.failing_hosts():
        hosts.append(_tally_table("host", failing, "The hosts with most failures"))
    return cards_html(cards) + _note(sampled, "pairs") + "".join([*tables, *hosts])


def _tally_table(title: str, tallies: Iterable[tuple[str, Tally]], caption: str = "") -> str:
    header = [title, "pairs", "images", "share", "failed", "requests", "downloaded", "most frequent reason"]
    rows = []
    for name, tally in tallies:
        share = f"{tally.image_share:.1%}"
        numbers = (tally.num_pairs, tally.num_images, share, tally.num_failed, tally.num_requests)
        rows.append((name, *numbers, size_text(tally.size_bytes), tally.main_reason))
    return table_html(header, rows, caption)


def _each(totals: Totals) -> str:
    return f"{size_text(totals.size_bytes / totals.num_images)} an image" if totals.num_images else ""


def _rate(per_s: float) -> str:
    return f"{per_s:,.1f}" if per_s else "-"


def _speed(store: Store) -> str:
    journal, timings, rows = Journal(store), read_timings(store), []
    for stage in dict.fromkeys([*STAGES, *(timing.stage for timing in timings)]):  # repairs have stages of their own
        markers = journal.markers(stage).values()
        if not markers:
            continue
        wall_s = sum(timing.wall_s for timing in timings if timing.stage == stage)
        done = sum(timing.num_rows for timing in timings if timing.stage == stage)
        busy_s = sum(marker.seconds for marker in markers)
        rate = f"{done / wall_s:,.0f}" if wall_s and done else ""
        rows.append((stage, len(markers), done or "", f"{wall_s:,.1f}", f"{busy_s:,.1f}", rate))
    return (
        table_html(["stage", "units", "rows", "seconds", "seconds of all workers", "rows/s"], rows)
        + f'<p class="quiet">Downloaded and decoded: {images_per_s(timings):,.1f} images/s. Seconds are of commands '
        "that finished the stage; what an interrupted command did is in its workers' seconds only.</p>"
    )


def _settings(store: Store, manifest: Manifest) -> str:
    run = read_run(store) or {}
    defaults = flatten(BuildConfig(input=["-"], output="-"))
    chosen = [item for item in manifest.config.items() if defaults.get(item[0]) != item[1]]
    left = [item for item in manifest.config.items() if item not in chosen]
    lists = [(source["path"], source["num_rows"], source["size_bytes"]) for source in manifest.sources]
    version, created = escape(run.get("pairmill", "")), escape(run.get("created", ""))
    return (
        f'<p class="quiet">Built by pairmill {version}, begun {created}. '
        "These are the settings that affect the result; run.json has all of them.</p>"
        + '<div class="columns"><div>'
        + table_html(["set for this build", "value"], [(name, _code(value)) for name, value in chosen])
        + table_html(["list", "rows", "bytes"], lists)
        + "</div><div>"
        + table_html(["at its default", "value"], [(name, _code(value)) for name, value in left])
        + "</div></div>"
    )


def _size_note(row: dict[str, Any]) -> str:
    return f"{row['original_width']}×{row['original_height']}, {size_text(row['size_bytes'])}"


def _lists(manifest: Manifest) -> str:
    return f"{len(manifest.sources):,} list{'s' if len(manifest.sources) != 1 else ''}"


def _note(sampled: Sampled, what: str) -> str:
    if sampled.is_all:
        return ""
    return f'<p class="quiet">From a random sample of {sampled.rows.num_rows:,} {what}.</p>'


def _code(value: Any) -> Markup:
    """A setting's value the way it is written in a configuration."""
    items = value if isinstance(value, list) else [value]
    texts = [json.dumps(item) if item is None or isinstance(item, bool) else str(item) for item in items]
    return Markup(" ").join(Markup("<code>{}</code>").format(text) for text in texts)
