"""`python -m training train|eval|export|report ...`: what `pairmill train` and its neighbours run."""

import logging
import sys
import time
from collections.abc import Callable, Sequence

from cluster.cli import run_reporting_errors
from cluster.config import help_text, parse
from cluster.errors import EXIT_DONE, RequestError
from cluster.interrupt import catch_interrupts

USAGE = """usage: pairmill {train,eval} [CONFIG.yaml ...] [key=value ...]
       pairmill export RUN format=timm|open_clip|huggingface|mae|pairmill output=FOLDER
       pairmill report RUN

  train    train a model on a dataset that pairmill build made
  eval     zero-shot classification and retrieval of a trained model
  export   a trained model's weights as another library reads them
  report   HTML page of a train run

`pairmill COMMAND --help` lists every key of a command."""


TELL_S = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 refused, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    if not words or words[0] in ("--help", "-h", "help"):
        print(USAGE)
        return EXIT_DONE if words else RequestError.exit_status
    command, rest = words[0], words[1:]
    catch_interrupts()
    return run_reporting_errors(f"pairmill {command}", lambda: _run(command, rest))


def _run(command: str, words: Sequence[str]) -> int:
    try:
        return _command(command)(words)
    except RequestError as error:
        if _is_first_rank():
            raise
        time.sleep(TELL_S)  # all ranks were refused alike, rank 0 says why, and torchrun ends it when we end
        return error.exit_status


def train_command(words: Sequence[str]) -> int:
    """`pairmill train`."""
    from training.config import TrainConfig
    from training.methods import METHODS
    from training.recipe import find_recipe, recipe_names

    if _wants_help(words):
        print(f"usage: pairmill train [RECIPE|CONFIG.yaml ...] [key=value ...]\n\n{help_text(TrainConfig)}")
        print(f"\nrecipes: {', '.join(recipe_names())}")
        return EXIT_DONE
    config = parse(TrainConfig, [find_recipe(word) for word in words])
    started = time.monotonic()
    from training.command import run_train

    result = run_train(config)
    if result.outcome == "stopped":
        raise KeyboardInterrupt
    if _is_first_rank():
        state = "was already done" if result.already_done else f"done in {time.monotonic() - started:.1f} s"
        print(f"train {config.method}: {result.plan.num_steps} steps {state}")
        print(f"run: {result.store.url}")
        can_eval = METHODS[config.method].has_text_features(config.method_config)
        evaluate = f"pairmill eval checkpoint={result.store.url}; " if can_eval else ""
        print(f"next: {evaluate}pairmill report {result.store.url}")
    return EXIT_DONE


def eval_command(words: Sequence[str]) -> int:
    """`pairmill eval`."""
    from training.config import EvalConfig

    if _wants_help(words):
        print(f"usage: pairmill eval [CONFIG.yaml ...] [key=value ...]\n\n{help_text(EvalConfig)}")
        return EXIT_DONE
    config = parse(EvalConfig, words)
    from training.evaluate.command import run_eval

    run_eval(config)
    return EXIT_DONE


def export_command(words: Sequence[str]) -> int:
    """`pairmill export`."""
    from training.weights.export import ExportConfig, run_export

    if _wants_help(words):
        print(f"usage: pairmill export RUN [key=value ...]\n\n{help_text(ExportConfig)}")
        return EXIT_DONE
    if words and "=" not in words[0] and not words[0].endswith((".yaml", ".yml")):
        words = [f"checkpoint={words[0]}", *words[1:]]
    config = parse(ExportConfig, words)
    done = run_export(config)
    print(f"export {config.format}: step {done.step}, {done.num_tensors} tensors, {done.num_parameters:,} parameters")
    print(f"weights: {done.store.url}")
    print(f"next: {done.hint}")
    return EXIT_DONE


def report_command(words: Sequence[str]) -> int:
    """`pairmill report` of a train run."""
    if _wants_help(words):
        print("usage: pairmill report RUN\n\nWrites RUN/report/index.html and RUN/report/sections.json.")
        return EXIT_DONE
    if len(words) != 1:
        raise RequestError("give one folder: pairmill report RUN")
    from training.report import write_report

    print(f"report: {write_report(words[0])}")
    return EXIT_DONE


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command,
    "eval": eval_command,
    "export": export_command,
    "report": report_command,
}


def _command(name: str) -> Callable[[Sequence[str]], int]:
    import difflib

    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(COMMANDS)}"
        raise RequestError(f"no such command; {hint}")
    return COMMANDS[name]


def _wants_help(words: Sequence[str]) -> bool:
    return any(word in ("--help", "-h") for word in words)


def _is_first_rank() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
