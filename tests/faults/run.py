"""`make faults`: everything that can break is broken while pairmill works, and nothing may be lost, doubled or differ.

    python tests/faults/run.py [--minutes 20] [--kills 28] [--seed 0] [--only build|train|store|disk] [--output DIR]

Prints one `name: value unit` line per figure; exit 1 where a promise of docs/faults.md was broken. Every kill is in
OUTPUT/diary.jsonl with its moment. Runs on loopback addresses alone and leaves no process behind.
"""

import argparse
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from kills import Diary, Figures
from supervisor import supervised

sys.path.insert(0, str(Path(__file__).parents[1] / "corpus"))

PARTS = ("store", "disk", "build", "train")
SHARES = {"store": 0.09, "disk": 0.12, "build": 0.34, "train": 0.45}
"""Of the time, what each part may take, and what those before it have left."""
STORE_KILLS = 2
BUILD_SHARE = 0.65
NUM_PAIRS, NUM_PAIRS_DISK = 2_000, 150
REFERENCE_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description="break everything that can break, and see that nothing is lost")
    parser.add_argument("--seed", type=int, default=0, help="of what is broken when")
    parser.add_argument("--minutes", type=float, default=20.0, help="hard limit of the whole")
    parser.add_argument("--kills", type=int, default=28, help="SIGKILLs in builds and trainings together")
    parser.add_argument("--only", choices=PARTS, help="one part alone; all of the kills are its")
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS, help="pairs in the list of the build")
    parser.add_argument("--output", type=Path, default=Path("faults-out"), help="folder for the diary and the logs")
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    status = supervised(partial(work, options), options.minutes * 60)
    print(f"diary: {options.output / 'diary.jsonl'}", flush=True)
    return status


def end_s(part: str, options: argparse.Namespace) -> float:
    """When a part has to have ended."""
    shares = [1.0] if options.only else [SHARES[each] for each in PARTS[: PARTS.index(part) + 1]]
    return float(options.minutes * 60 * sum(shares))


def work(options: argparse.Namespace, folder: Path) -> int:
    """All parts, in a folder that goes; the exit status."""
    diary, figures, started = Diary(options.output), Figures(), time.monotonic()
    parts = (options.only,) if options.only else PARTS
    for part in parts:
        limit_s = end_s(part, options) - (time.monotonic() - started) - 20
        diary.note("begins", part=part)
        try:
            (folder / part).mkdir()
            run_part(part, options, folder, limit_s, diary, figures)
        except Exception as error:  # the other parts still have something to tell
            diary.note("failed", part=part, error=repr(error))
            figures.promise(False, f"{part}: {error!r}")
        diary.note("ended", part=part)
    figures.set("faults.kills", diary.kills.total())
    figures.set("faults.seconds", round(time.monotonic() - started), "s")
    print("\n".join(figures.lines()), flush=True)
    for what in figures.broken:
        print(f"broken: {what}", flush=True)
    return 1 if figures.broken else 0


def run_part(
    part: str, options: argparse.Namespace, folder: Path, limit_s: float, diary: Diary, figures: Figures
) -> None:
    # Here, as each part is slow to import and works alone.
    here, seed = folder / part, options.seed
    num_build = options.kills if options.only else round(BUILD_SHARE * options.kills)
    if part == "store":
        from drill_store import StoreDrill

        StoreDrill(seed=seed, num_kills=STORE_KILLS, limit_s=limit_s).run(here, diary, figures)
        return
    from drill_build import BuildDrill, write_short_list
    from server import start_server

    deadline = time.monotonic() + limit_s
    with start_server() as port:
        url_list = folder / f"{part}.parquet"
        num_rows = write_short_list(url_list, port, NUM_PAIRS_DISK if part == "disk" else options.pairs)
        reference = undisturbed_build(url_list, here / "reference")
        diary.note("undisturbed build", rows=num_rows)
        limit_s = deadline - time.monotonic()
        if part == "disk":
            from drill_disk import DiskDrill

            DiskDrill(seed=seed, limit_s=limit_s).run(here, reference, url_list, diary, figures)
        elif part == "build":
            figures.set("faults.build.rows", num_rows, "rows")
            BuildDrill(seed=seed, num_kills=num_build, limit_s=limit_s).run(here, reference, url_list, diary, figures)
    if part == "train":
        from drill_train import TrainDrill

        num_train = options.kills if options.only else options.kills - num_build
        TrainDrill(seed=seed, num_kills=num_train, limit_s=limit_s).run(here, reference, diary, figures)


def undisturbed_build(url_list: Path, output: Path) -> Path:
    """A dataset on a local disk that nobody disturbed."""
    from drill_build import build_command

    done = subprocess.run(
        build_command(url_list, output, "inline"), capture_output=True, text=True, timeout=REFERENCE_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the undisturbed build ended with {done.returncode}: {done.stderr[-1000:]}")
    return output


if __name__ == "__main__":
    sys.exit(main())
