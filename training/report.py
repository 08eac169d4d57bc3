"""`pairmill report RUN`: curves, settings and evaluations of a train run (or of one evaluation) on one page."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from cluster.config import flatten, validate
from cluster.errors import RequestError
from cluster.report import (
    SECTIONS_FILE,
    Card,
    Section,
    cards_html,
    figure_html,
    new_figure,
    render_page,
    sections_json,
    table_html,
)
from cluster.run import require_run
from cluster.store import Store
from training.config import TrainConfig
from training.display import clock
from training.evaluate.command import EVAL_FILE, EXAMPLES_FILE
from training.metrics import read_lines, read_progress
from training.report_exhibits import exhibit_sections

PAGE_FILE = "report/index.html"


def write_report(url: str) -> str:
    """Write report/index.html and report/sections.json of a train or eval run; returns the page's URL.

    Raises RequestError when the folder holds neither, or nothing to show yet.
    """
    store, record = require_run(url, "train", "eval")
    if record["kind"] == "train":
        sections = train_sections(store, record)
        title = f"Training: {record['config']['method']}"
    else:
        sections = list(eval_sections(store, ""))
        title = "Evaluation"
    if not sections:
        raise RequestError(f"{store.url}: nothing to report yet; the run has not recorded anything")
    store.write_bytes(SECTIONS_FILE, sections_json(sections))
    store.write_bytes(PAGE_FILE, render_page(title, sections, lead=store.url).encode())
    return store.url_of(PAGE_FILE)


def train_sections(store: Store, record: dict[str, Any]) -> list[Section]:
    """The sections of a train run, those of its evaluations included; none if no step was recorded."""
    lines = read_lines(store)
    if not lines:
        return []
    config = validate(TrainConfig, record["config"])
    sections = [
        Section(title="Training", html=cards_html(_cards(store, config, lines))),
        Section(title="Curves", html=f'<div class="figures">{"".join(_curves(lines))}</div>'),
    ]
    sections += exhibit_sections(store)
    for folder in _evaluations(store):
        sections += eval_sections(store, folder)
    rows = [(Markup("<code>{}</code>").format(name), _plain(value)) for name, value in flatten(config).items()]
    sections.append(Section(title="Settings", html=_folded("every key", table_html(("key", "value"), rows))))
    return sections


def eval_sections(store: Store, folder: str) -> Iterator[Section]:
    """The sections of one evaluation below `folder` of a store."""
    prefix = f"{folder}/" if folder else ""
    try:
        result = json.loads(store.read_bytes(prefix + EVAL_FILE))
        examples = json.loads(store.read_bytes(prefix + EXAMPLES_FILE))
    except FileNotFoundError:
        return
    name = result["config"]["name"]
    yield Section(title=f"Evaluation {name}", html=_scores_html(result))
    if examples:
        yield Section(title=f"Zero-shot answers {name}", html=_examples_html(examples))


def _cards(store: Store, config: TrainConfig, lines: list[dict[str, Any]]) -> list[Card]:
    last, progress = lines[-1], read_progress(store) or {}
    steps = f"{last['step'] + 1:,} of {progress['num_steps']:,}" if "num_steps" in progress else f"{last['step'] + 1:,}"
    rates = [line["samples_per_s"] for line in lines[1:]] or [last["samples_per_s"]]
    mean_rate = len(rates) / sum(1 / rate for rate in rates)  # harmonic: of equal numbers of samples
    samples = (last["step"] + 1) * config.train.batch_size
    return [
        Card(label="method", value=config.method, note=f"ViT {config.model.vision.size}"),
        Card(label="steps", value=steps, note=f"batch {config.train.batch_size:,}, {last['epoch']:.1f} epochs"),
        Card(label="loss", value=f"{last['loss']:.4f}", note=f"first {lines[0]['loss']:.4f}"),
        Card(label="samples/s", value=f"{mean_rate:,.0f}", note=f"{clock(samples / mean_rate)} of steps"),
        Card(
            label="waiting for data",
            value=f"{100 * sum(line['data_wait_share'] for line in lines) / len(lines):.1f} %",
            note=f"{last['num_replaced']:,} bad images replaced",
        ),
    ]


def _curves(lines: list[dict[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for line in lines for name in line))
    terms = [name for name in names if name.startswith("loss/")]
    yield _figure(lines, ["loss", *terms] if len(terms) > 1 else ["loss"], "Loss", "by step, over all ranks")
    for name in (name for name in names if name.startswith("metric/")):
        yield _figure(lines, [name], name.partition("/")[2].replace("_", " ").capitalize(), "")
    yield _figure(lines, ["lr"], "Learning rate", "")
    yield _figure(lines, ["grad_norm"], "Gradient norm", "before clipping")
    yield _figure(lines, ["samples_per_s"], "Throughput", "samples/s")


def _figure(lines: Sequence[dict[str, Any]], names: Sequence[str], title: str, unit: str) -> str:
    figure, axes = new_figure()
    for name in names:
        points = [(line["step"] + 1, line[name]) for line in lines if name in line]
        axes.plot([step for step, _ in points], [value for _, value in points], label=name.partition("/")[2] or "total")
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    if len(names) > 1:
        axes.legend()
    return figure_html(figure, alt=title)


def _scores_html(result: dict[str, Any]) -> str:
    scores, chance = result["scores"], result["chance"]
    rows = [
        (name, f"{value:.4f}", f"{chance[name]:.4f}" if name in chance else "", result["num_queries"].get(name, ""))
        for name, value in scores.items()
        if name not in ("zeroshot.num_classes", "zeroshot.chance")
    ]
    caption = f"{result['num_samples']:,} samples, step {result['step']:,}"
    if classes := scores.get("zeroshot.num_classes"):
        caption += f", {classes:,.0f} classes"
    if conditions := result["config"]["select"]:
        caption += f", where {' and '.join(conditions)}"
    return table_html(("measure", "share right", "chance", "queries"), rows, caption=caption)


def _examples_html(examples: list[dict[str, Any]]) -> str:
    parts = []
    for right, title in ((True, "right"), (False, "wrong")):
        figures = Markup().join(_example(example) for example in examples if example["right"] == right)
        parts.append(Markup('<h3>{}</h3><div class="pictures">{}</div>').format(title, figures))
    return str(Markup().join(parts))


def _example(example: dict[str, Any]) -> Markup:
    answer, label = example["predicted"][0], example["label"]
    below = Markup("{}").format(label)
    if not example["right"]:
        place = example["predicted"].index(label) + 1 if label in example["predicted"] else None
        note = f"right answer is number {place}" if place else "right answer not among five"
        below = Markup("<b>{}</b><br>is {}<br><small>{}</small>").format(answer, label, note)
    return Markup(
        '<figure class="picture"><img alt="{}" src="data:image/jpeg;base64,{}"><figcaption>{}</figcaption></figure>'
    ).format(label, example["jpeg"], below)


def _evaluations(store: Store) -> list[str]:
    found = [entry.path for entry in store.find("eval") if entry.path.endswith(f"/{EVAL_FILE}")]
    return [path.removesuffix(f"/{EVAL_FILE}") for path in found]


def _folded(summary: str, html: str) -> str:
    return f"<details><summary>{summary}</summary>{html}</details>"


def _plain(value: Any) -> str:
    return "" if value is None else json.dumps(value) if isinstance(value, (list, dict)) else str(value)
