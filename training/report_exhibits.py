"""The report's pictures of what a generative method makes: the newest exhibit whole, and how it came about."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from cluster.report import Section, image_url
from cluster.store import Store
from training.exhibits import read_all

MOST_STEPS = 6
"""Columns of the table that shows how the pictures came about."""
MOST_FOLLOWED = 3
"""Its rows."""


def exhibit_sections(store: Store) -> Iterator[Section]:
    """A table of the newest exhibit, and one of its first examples over the steps. None if the run has no exhibits."""
    exhibits = read_all(store)
    if not exhibits:
        return
    newest = exhibits[-1]
    lead = Markup("<p>The same samples of the training data after {} steps.</p>").format(f"{newest['step']:,}")
    yield Section(title="What the model sees and makes", html=str(lead + _newest_html(store, newest)))
    chosen = _spread(exhibits, MOST_STEPS)
    changing = _changing(store, chosen)
    if changing:
        yield Section(
            title="How it came about", html=str(Markup().join(_over_steps(store, chosen, t) for t in changing))
        )


def _newest_html(store: Store, exhibit: dict[str, Any]) -> Markup:
    """A row an example: its pictures, then its texts."""
    pictures, captions = exhibit["pictures"], exhibit["captions"]
    num_examples = max(len(column) for column in (*pictures.values(), *captions.values()))
    rows = []
    for number in range(num_examples):
        cells = [_picture(store, files[number], title) for title, files in pictures.items()]
        rows.append(cells + [Markup("{}").format(texts[number]) for texts in captions.values()])
    return _table([*pictures, *captions], rows)


def _over_steps(store: Store, exhibits: Sequence[dict[str, Any]], title: str) -> Markup:
    """A column a step: what one column of the exhibits was then."""
    rows = []
    for number in range(MOST_FOLLOWED):
        cells = []
        for exhibit in exhibits:
            files, texts = exhibit["pictures"].get(title), exhibit["captions"].get(title)
            column = files or texts or []
            if number < len(column):
                cells.append(_picture(store, files[number], title) if files else Markup("{}").format(texts[number]))
        if cells:
            rows.append(cells)
    return Markup("<h3>{}</h3>{}").format(title, _table([f"step {e['step']:,}" for e in exhibits], rows))


def _changing(store: Store, exhibits: Sequence[dict[str, Any]]) -> list[str]:
    """The columns that the model makes: those that differ between the first exhibit and the last."""
    if len(exhibits) < 2:
        return []
    first, last = exhibits[0], exhibits[-1]
    found = [title for title, texts in last["captions"].items() if texts != first["captions"].get(title)]
    for title, files in last["pictures"].items():
        before = first["pictures"].get(title, [])
        if [store.read_bytes(path) for path in files] != [store.read_bytes(path) for path in before]:
            found.insert(0, title)
    return found


def _spread(exhibits: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many, evenly over the steps, the first and the last among them."""
    if len(exhibits) <= most:
        return exhibits
    stride = (len(exhibits) - 1) / (most - 1)
    return [exhibits[math.floor(place * stride + 0.5)] for place in range(most)]


def _picture(store: Store, path: str, title: str) -> Markup:
    url = image_url(store.read_bytes(path), "image/png")
    return Markup('<img class="exhibit" alt="{}" src="{}">').format(title, url)


def _table(header: Sequence[str], rows: Sequence[Sequence[Markup]]) -> Markup:
    head = Markup().join(Markup("<th>{}</th>").format(name) for name in header)
    body = Markup().join(
        Markup("<tr>{}</tr>").format(Markup().join(Markup("<td>{}</td>").format(cell) for cell in row)) for row in rows
    )
    return Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(
        head, body
    )
