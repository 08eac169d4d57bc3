"""`pairmill report`: each folder's own package writes its report; several folders are joined in one page."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import EXIT_DONE, RequestError
from cluster.run import require_run
from cluster.store import Store

REPORT_OWNERS = {"build": "pipeline", "train": "training", "eval": "training"}
SECTIONS_FILE = "report/sections.json"
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
    """One self-contained HTML page from the sections that each run's report left beside its own page."""
    from cluster.report import Section, render_page

    sections = []
    for folder in folders:
        for part in json.loads(Store(folder).read_bytes(SECTIONS_FILE)):
            name = part["title"] if len(folders) == 1 else f"{Path(folder).name}: {part['title']}"
            sections.append(Section(title=name, html=part["html"]))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render_page(title, sections), encoding="utf-8")
