"""`pairmill report`: each folder's own package writes its report; several folders are joined in one page."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import EXIT_DONE, RequestError
from cluster.run import require_run
from cluster.store import Store

if TYPE_CHECKING:
    from cluster.report import Section

REPORT_OWNERS = {"build": "pipeline", "train": "training", "eval": "training"}
PIXELS_NOTE = (
    "<p>zeroshot.pixels is no model: it names the nearest of the reference pictures by 16×16 pixels, knowing their "
    "labels. Zero-shot models see neither a label nor a picture of the evaluated kind.</p>"
)
HELP = """usage: pairmill report RUN [RUN ...] [output=PAGE.html] [title=TEXT]

Writes RUN/report/index.html for each run (a dataset, a training run, an evaluation). With output= the sections of
all of them are joined in one page that needs no network to view."""


def report_command(words: Sequence[str]) -> int:
    """Write the report of each run, and the joined page when there are several or one is asked for."""
    from cluster.cli import module_command

    if not words or "--help" in words or "-h" in words:
        print(HELP)
        return EXIT_DONE
    settings = dict(word.split("=", 1) for word in words if word.startswith(("output=", "title=")))
    folders = [word for word in words if not word.startswith(("output=", "title="))]
    if not folders:
        raise RequestError("name at least one run: pairmill report OUT")
    if len(folders) > 1 and "output" not in settings:
        raise RequestError("several runs make one page: say where, with output=PAGE.html")
    kinds = [str(require_run(folder, *REPORT_OWNERS)[1]["kind"]) for folder in folders]
    for folder, kind in zip(folders, kinds, strict=True):
        done = subprocess.run(module_command(REPORT_OWNERS[kind], ["report", folder]), check=False)
        if done.returncode:
            return done.returncode
    if "output" in settings:
        write_joined(folders, Path(settings["output"]), settings.get("title", "pairmill report"))
        print(f"report: {settings['output']}")
    return EXIT_DONE


def write_joined(folders: Sequence[str], page: Path, title: str) -> None:
    """One self-contained HTML page: runs evaluated alike side by side, then the sections of each run's report."""
    from cluster.report import SECTIONS_FILE, Section, read_sections, render_page

    sections = compare_evaluations(folders)
    for folder in folders:
        parts = read_sections(Store(folder).read_bytes(SECTIONS_FILE))
        prefix = "" if len(folders) == 1 else f"{Path(folder).name}: "
        sections += [Section(title=prefix + part.title, html=part.html) for part in parts]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render_page(title, sections), encoding="utf-8")


def compare_evaluations(folders: Sequence[str]) -> list["Section"]:
    """A table for each evaluation that two or more of the runs have (same name): a column a run, and chance."""
    from cluster.report import Section, table_html

    records: dict[str, dict[str, dict[str, Any]]] = {}
    for folder in folders:
        store = Store(folder)
        for entry in store.find("eval"):
            if entry.path.endswith("/eval.json"):
                name = entry.path.split("/")[1]
                records.setdefault(name, {})[Path(folder).name] = json.loads(store.read_bytes(entry.path))
    sections = []
    for name, runs in records.items():
        if len(runs) > 1:
            first = next(iter(runs.values()))
            rows = [
                [measure, *(run["scores"].get(measure, "") for run in runs.values()), first["chance"].get(measure, "")]
                for measure in first["scores"]
                if measure != "zeroshot.chance"
            ]
            table = table_html(["measure", *runs, "chance"], rows)
            note = PIXELS_NOTE if "zeroshot.pixels" in first["scores"] else ""
            sections.append(Section(title=f"Compared: {name}", html=table + note))
    return sections
