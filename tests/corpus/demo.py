"""`make demo`: the main job on real input, command by command, as a person would type it.

A local web server offers the corpus together with what a web list really has; `pairmill` does the rest. With --pairs
and --steps the same is done on less.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from corpus import HELD_OUT_STYLE
from lists import write_list
from server import start_server

HERE = Path(__file__).parent
METHODS = ("clip", "rils")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder of the demo's results")
    parser.add_argument("--pairs", type=int, help="pairs of the corpus to use (default: all)")
    parser.add_argument("--steps", type=int, help="training steps (default: as in the recipes)")
    options = parser.parse_args()
    started = time.monotonic()
    out: Path = options.output
    if out.exists():
        print(f"removing {out} of an earlier demo")
        shutil.rmtree(out)
    out.mkdir(parents=True)

    with start_server() as port:
        write_list(out / "urls.parquet", port, num_pairs=options.pairs)
        say("1. Build a dataset from a list of URLs, some of which are dead, wrong, slow or doubled")
        pairmill("build", HERE / "demo_build.yaml", f"input={out / 'urls.parquet'}", f"output={out / 'data'}")
    pairmill("verify", out / "data")
    for number, method in enumerate(METHODS, start=2):
        say(f"{number}. Train {method.upper()} on every drawing style but one, evaluate it on that: {HELD_OUT_STYLE}")
        steps = [f"train.num_steps={options.steps}", "optim.warmup_steps=1"] if options.steps else []
        data = [f"data.dataset={out / 'data'}", f"data.select=style!={HELD_OUT_STYLE}"]
        pairmill("train", recipe(method), *data, *steps, f"output={out / method}")
        pairmill("eval", HERE / "demo_eval.yaml", f"checkpoint={out / method}")
    say("4. One page about all of it")
    page = out / "report.html"
    pairmill("report", out / "data", *(out / method for method in METHODS), f"output={page}", "title=pairmill demo")
    print_results(out, time.monotonic() - started)
    return 0


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def recipe(method: str) -> Path:
    """The demo's recipe, from the installed package."""
    import training

    return Path(training.__file__).parent / "recipes" / f"demo_{method}.yaml"


def pairmill(*words: str | Path) -> None:
    """Run one pairmill command; the demo ends where a command fails."""
    shown = ["pairmill", *(str(word) for word in words)]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-P", "-m", "cluster.cli", *shown[1:]], check=False)
    print(f"[{time.monotonic() - started:.1f} s]", flush=True)
    if done.returncode:
        sys.exit(done.returncode)


def print_results(out: Path, elapsed_s: float) -> None:
    """Where everything is, and how well the models recognise a style that they have not seen."""
    scores = {
        method: json.loads((out / method / "eval" / "held-out-style" / "eval.json").read_text())["scores"]
        for method in METHODS
    }
    manifest = json.loads((out / "data" / "manifest.json").read_text())
    say(f"Done in {elapsed_s:.0f} s")
    print(f"list       {out / 'urls.parquet'}   {manifest['num_input_rows']:,} rows")
    print(f"dataset    {out / 'data'}   {manifest['num_samples']:,} samples in {len(manifest['shards'])} shards")
    for method in METHODS:
        print(f"{method:10} {out / method}   checkpoints, metrics, TensorBoard curves, evaluation")
    print(f"report     {out / 'report.html'}   open it in a browser")
    for method in METHODS:
        print(f"zeroshot.{method}: {scores[method]['zeroshot.top1']:.4f}")
    print(f"zeroshot.chance: {scores['clip']['zeroshot.chance']:.4f}")
    print(f"zeroshot.pixels: {scores['clip']['zeroshot.pixels']:.4f}")


if __name__ == "__main__":
    sys.exit(main())
