"""`python -m pipeline build|curate|repair|verify|explain|report ...`, which the `pairmill` command runs."""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.cli import run_reporting_errors
from cluster.config import Config, help_text, parse
from cluster.errors import EXIT_DONE, RequestError
from cluster.interrupt import catch_interrupts


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand: its usage, the keys that plain words stand for, and where its code is."""

    usage: str
    about: str
    words: tuple[str, ...]
    load: Callable[[], tuple[type[Config], Callable[[Any], int]]]
    parse: Callable[[type[Config], Sequence[str]], Config] = parse
    flags: tuple[str, ...] = ()
    """Settings that are switched on by `--name` as well."""
    note: str = ""
    """What has to be known of the keys."""


def _build() -> tuple[type[Config], Callable[[Any], int]]:
    from pipeline.build import build_command
    from pipeline.config import BuildConfig

    return BuildConfig, build_command


def _curate() -> tuple[type[Config], Callable[[Any], int]]:
    from pipeline.config import BuildConfig
    from pipeline.curate import curate_command

    return BuildConfig, curate_command


def _parse_over_base(model: type[Config], words: Sequence[str]) -> Config:
    from pipeline.curate import settings_over_base

    return settings_over_base(words)


def _repair() -> tuple[type[Config], Callable[[Any], int]]:
    from pipeline.repair import RepairConfig, repair_command

    return RepairConfig, repair_command


def _verify() -> tuple[type[Config], Callable[[Any], int]]:
    from pipeline.verify import VerifyConfig, verify_command

    return VerifyConfig, verify_command


def _explain() -> tuple[type[Config], Callable[[Any], int]]:
    from pipeline.explain import ExplainConfig, explain_command

    return ExplainConfig, explain_command


def _report() -> tuple[type[Config], Callable[[Any], int]]:
    from pipeline.report import ReportConfig, report_command

    return ReportConfig, report_command


def _status() -> tuple[type[Config], Callable[[Any], int]]:
    from pipeline.status import StatusConfig, status_command

    return StatusConfig, status_command


COMMANDS = {
    "build": Command(
        usage="[CONFIG.yaml] input=LIST output=OUT [key=value ...]",
        about="Turns URL lists into a dataset. The same command goes on with a build that was stopped.",
        words=(),
        load=_build,
    ),
    "curate": Command(
        usage="OLD output=NEW [curate.KEY=... dedup.KEY=... balance.KEY=... pack.KEY=... fetch_missing=true]",
        about="Decides anew which pairs of a dataset are kept, into a new folder, without downloading them again.",
        words=("base",),
        load=_curate,
        parse=_parse_over_base,
        note=" (each is as OLD has it where it is not given; beside those above only `against`, `models`, a source's\n"
        "weight and priority, and what does not affect the result can be changed)",
    ),
    "repair": Command(
        usage="OUT [key=value ...]",
        about="Tries the pairs of a dataset again that failed for a reason that may pass, and adds what comes to it.",
        words=("dataset",),
        load=_repair,
    ),
    "verify": Command(
        usage="OUT [--repair] [key=value ...]",
        about="Checks every file of a dataset against its manifest and journal and says what is damaged and what to "
        "do. With --repair it makes again what is damaged, and nothing else.",
        words=("dataset",),
        load=_verify,
        flags=("repair",),
    ),
    "explain": Command(
        usage="OUT UID|URL",
        about="Tells what became of a pair, and why.",
        words=("dataset", "pair"),
        load=_explain,
    ),
    "report": Command(
        usage="OUT [key=value ...]",
        about="Writes OUT/report/index.html (a page that needs no network to view), the card and croissant.json.",
        words=("dataset",),
        load=_report,
    ),
    "status": Command(
        usage="OUT",
        about="Prints how the downloads of a build went: by reason, HTTP status and host. Part of `pairmill status`.",
        words=("dataset",),
        load=_status,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (0 done, 1 failed, 2 bad request, 130 interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words else ""
    if name not in COMMANDS:
        print(f"usage: python -m pipeline {'|'.join(COMMANDS)} ...", file=sys.stderr)
        return RequestError.exit_status
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    catch_interrupts()
    return run_reporting_errors(f"pairmill {name}", lambda: _run(name, COMMANDS[name], words))


def _run(name: str, command: Command, words: list[str]) -> int:
    model, action = command.load()
    if "--help" in words or "-h" in words:
        print(f"usage: pairmill {name} {command.usage}\n\n{command.about}\n\nkeys{command.note}:\n{help_text(model)}")
        return EXIT_DONE
    return action(command.parse(model, _as_settings(command, words)))


def _as_settings(command: Command, words: Sequence[str]) -> list[str]:
    """Plain words become the settings they stand for, in order: `explain OUT UID` is `dataset=OUT pair=UID`.

    They are quoted, so that a uid of digits stays text.
    """
    words = [f"{word[2:]}=true" if word[2:] in command.flags and word[:2] == "--" else word for word in words]
    if not command.words:
        return words
    free = list(command.words)
    return [f"{free.pop(0)}={json.dumps(word)}" if free and _is_plain(word, command) else word for word in words]


def _is_plain(word: str, command: Command) -> bool:
    """Whether a word is not a setting itself; a URL may hold an equals sign."""
    name = word.partition("=")[0]
    return "=" not in word or "/" in name or ":" in name


if __name__ == "__main__":
    sys.exit(main())
