"""The `pairmill` command: finds the package that owns a subcommand and becomes it.

The packages are launched by command line (`python -m pipeline ...`), never imported, so downloading never loads
torch, and a job on a cluster runs exactly what a person would type.
"""

import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from cluster.disk import full_disk, is_full
from cluster.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, PairmillError, RequestError
from cluster.redact import redact_logs, redact_text

logger = logging.getLogger(__name__)

OWNERS = {
    "build": ("pipeline", "URL lists -> downloaded, filtered, deduplicated shards"),
    "curate": ("pipeline", "decide anew what a dataset keeps, without downloading it again"),
    "repair": ("pipeline", "try again what failed for a reason that may pass, and add it to the dataset"),
    "verify": ("pipeline", "check every file of a dataset against its manifest"),
    "explain": ("pipeline", "the whole story of one pair, by uid or URL"),
    "report": ("", "HTML page of a dataset, a training run, or several together"),
    "train": ("training", "train a model on a dataset"),
    "eval": ("training", "zero-shot classification and retrieval of a trained model"),
    "export": ("training", "a trained model's weights for timm, open_clip, transformers or MAE's scripts"),
    "submit": ("", "send build, repair, train or eval to a cluster as a Ray job and follow it"),
    "status": ("", "how far a run is"),
    "doctor": ("", "check this machine: packages, versions, Ray, disk"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status (0 done, 1 failed, 2 bad request, 130 interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words else "--help"
    if command in ("--help", "-h", "help"):
        print(overview())
        return EXIT_DONE
    if command == "--version":
        print(f"pairmill {version('pairmill')}")
        return EXIT_DONE
    return run_reporting_errors(f"pairmill {command}", lambda: _dispatch(command, words))


def run_reporting_errors(name: str, action: Callable[[], int]) -> int:
    """Call `action`; print what it raises as one message on stderr and return the exit status it means."""
    redact_logs()
    try:
        return action()
    except PairmillError as error:
        _say(f"{name}: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        _say(f"{name}: interrupted; run the same command to go on")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has gone: nothing to tell anybody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except OSError as error:  # a full disk, a store that went away, a file that may not be read
        logger.debug("%s", name, exc_info=True)
        if is_full(error):
            _say(f"{name}: {full_disk(*filter(None, [error.filename]))}")
            return EXIT_FAILED
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{name}: {where}{error.strerror or error}; what is finished is kept")
        return EXIT_FAILED


def _say(text: str) -> None:
    print(redact_text(text), file=sys.stderr)


def module_command(package: str, words: Sequence[str]) -> list[str]:
    """The command line that runs a package. `-P` keeps a folder of the same name in the user's directory out."""
    return [sys.executable, "-P", "-m", package, *words]


def overview() -> str:
    """The text of `pairmill --help`."""
    commands = "\n".join(f"  {name:9} {line}" for name, (_, line) in OWNERS.items())
    return (
        f"pairmill {version('pairmill')}: from lists of URLs with captions to a trained, evaluated vision backbone\n\n"
        "usage: pairmill COMMAND [CONFIG.yaml] [dotted.key=value ...]\n\n"
        f"{commands}\n\n"
        "`pairmill COMMAND --help` prints every key with its default and unit.\n"
        "exit status: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted (same command resumes)\n\n"
        "first steps:\n"
        "  pairmill build input=urls.parquet output=out/data\n"
        "  pairmill train data.dataset=out/data output=out/clip method=clip\n"
        "  pairmill eval checkpoint=out/clip dataset=out/data"
    )


def _dispatch(command: str, words: list[str]) -> int:
    if command not in OWNERS:
        close = difflib.get_close_matches(command, OWNERS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(OWNERS)}"
        raise RequestError(f"unknown command; {hint}")
    package = OWNERS[command][0]
    if package:
        sys.stdout.flush()
        os.execv(sys.executable, module_command(package, [command, *words]))
    if command == "report":
        from cluster.combined_report import report_command

        return report_command(words)
    if command == "submit":
        from cluster.jobs import submit_command

        return submit_command(words)
    if command == "status":
        from cluster.status import status_command

        return status_command(words)
    from cluster.doctor import doctor_command

    return doctor_command(words)


if __name__ == "__main__":
    sys.exit(main())
