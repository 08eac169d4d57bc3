"""The shell of every HTML report: one self-contained page of titled sections, readable without a network.

    page = render_page("My run", [Section(title="Totals", html=cards_html([...]))], lead="What this is.")

Whoever fills a section is trusted to have escaped it: `cards_html`, `table_html` and `figure_html` do. The same
sections can be saved (`sections_json`) and joined with those of other reports on one page.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SECTIONS_FILE = "report/sections.json"
"""Where a run's report leaves its sections, in the run's folder, for pages that join several."""
TEMPLATES = Path(__file__).parent / "templates"
PALETTE = ("#3b82c4", "#e08a3c", "#4fa36b", "#c4567a", "#8a6fc0", "#a3873b", "#4aa3a3", "#8b8f98")
# Drawn in this colour, then turned into the page's own text colour, so that figures suit light and dark.
_INK = "#01fe02"
_FIGURE_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pairmill",
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=PALETTE),
}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled piece of a report; `html` is ready to be put on a page."""

    title: str
    html: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sections of one run under its name; no name: sections that stand alone. `parts`: (anchor, title, html)."""

    name: str
    parts: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One number to see at a glance, with what it counts and an optional remark."""

    label: str
    value: str
    note: str = ""


def render_page(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """The whole page as HTML text: styles and pictures are inside, nothing is loaded from elsewhere.

    Neighbours titled "run: first", "run: second" stand under one heading, "run".
    """
    css = Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))
    template = environment(TEMPLATES).get_template("page.html")
    return template.render(title=title, groups=group_by_run(sections), lead=lead, css=css)


def group_by_run(sections: Sequence[Section]) -> list[Group]:
    """Sections in order, neighbours with the same words before ": " in one group, under anchors that occur once."""
    groups, taken = [], Counter[str]()
    for run, found in groupby(sections, key=_run_of):
        members = list(found)
        name = run if len(members) > 1 else ""
        parts = []
        for section in members:
            anchor = re.sub(r"\W+", "-", section.title.lower()).strip("-") or "section"
            taken[anchor] += 1
            unique = anchor if taken[anchor] == 1 else f"{anchor}-{taken[anchor]}"
            parts.append((unique, section.title.removeprefix(f"{name}: ") if name else section.title, section.html))
        groups.append(Group(name=name, parts=tuple(parts)))
    return groups


def sections_json(sections: Sequence[Section]) -> bytes:
    """Sections as `[{"title": ..., "html": ...}]`, to be joined with others by `read_sections`."""
    return json.dumps([asdict(section) for section in sections], indent=1).encode()


def read_sections(data: bytes) -> list[Section]:
    """What `sections_json` wrote."""
    return [Section(title=str(plain["title"]), html=str(plain["html"])) for plain in json.loads(data)]


def _run_of(section: Section) -> str:
    run, colon, _ = section.title.partition(": ")
    return run if colon else ""


@cache
def environment(templates: Path) -> Environment:
    """A jinja2 environment for a folder of templates: everything is escaped unless marked safe."""
    loader = FileSystemLoader(str(templates))
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def cards_html(cards: Iterable[Card]) -> str:
    """A row of numbers to see at a glance."""
    parts = []
    for card in cards:
        note = Markup("<span>{}</span>").format(card.note) if card.note else Markup()
        parts.append(Markup('<div class="card"><b>{}</b><em>{}</em>{}</div>').format(card.value, card.label, note))
    return str(Markup('<div class="cards">{}</div>').format(Markup().join(parts)))


def table_html(header: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """A table; columns of numbers (and of text that reads as one) are aligned right, Markup cells are kept as is."""
    cells = [[_text(value) for value in row] for row in rows]
    kinds = [
        Markup(' class="n"') if _is_numeric([row[column] for row in cells]) else Markup()
        for column in range(len(header))
    ]
    head = Markup().join(Markup("<th{}>{}</th>").format(kind, name) for kind, name in zip(kinds, header, strict=True))
    body = Markup().join(
        Markup("<tr>{}</tr>").format(
            Markup().join(Markup("<td{}>{}</td>").format(kind, cell) for kind, cell in zip(kinds, row, strict=True))
        )
        for row in cells
    )
    title = Markup("<caption>{}</caption>").format(caption) if caption else Markup()
    table = Markup('<div class="scroll"><table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>')
    return str(table.format(title, head, body))


def new_figure(width_in: float = 5.2, height_in: float = 2.7) -> tuple[Figure, Axes]:
    """An empty figure in the page's style, outside pyplot: nothing global is touched."""
    with matplotlib.rc_context(_FIGURE_STYLE):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        return figure, figure.add_subplot()


def figure_html(figure: Figure, alt: str = "") -> str:
    """A matplotlib figure as inline SVG whose text and axes take the page's colours."""
    for axes in figure.axes:
        _ink(axes)
    figure.patch.set_alpha(0.0)
    buffer = io.StringIO()
    with matplotlib.rc_context(_FIGURE_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace("<svg", '<svg role="img"', 1)
    label = Markup("<title>{}</title>").format(alt) if alt else Markup()
    svg = re.sub(r"(<svg[^>]*>)", lambda match: match.group(1) + str(label), svg, count=1)
    return f'<div class="figure">{svg}</div>'


def image_url(data: bytes, media_type: str = "image/jpeg") -> str:
    """An encoded picture as a `data:` URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _ink(axes: Axes) -> None:
    axes.patch.set_alpha(0.0)
    if title := axes.get_title():
        axes.set_title("")
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.tick_params(colors=_INK, which="both")
    for spine in axes.spines.values():
        spine.set_edgecolor(_INK)
        spine.set_alpha(0.35)
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    if left_title := getattr(axes, "_left_title", None):
        texts.append(left_title)
    if legend := axes.get_legend():
        legend.set_frame_on(False)
        texts += [*legend.get_texts(), legend.get_title()]
    for text in texts:
        text.set_color(_INK)


def _text(value: Any) -> Markup:
    if isinstance(value, float):
        value = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return escape(value)


def _is_numeric(column: Sequence[Markup]) -> bool:
    filled = [cell for cell in column if cell]
    return bool(filled) and all(
        re.fullmatch(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]\d+)?(\s?%|\s?s|\s[KMGT]?B)?|nan", cell) for cell in filled
    )
