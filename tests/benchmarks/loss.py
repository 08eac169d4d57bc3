"""`make bench-loss`: memory and time of the losses over all pairs, in tiles and as the dense matrix, on the CPU.

    python tests/benchmarks/loss.py [--batch 32768] [--patches 9408] [--rounds 3] [--only infonce]

Forward and backward pass of one process that holds the whole global batch, features 512 wide. Memory: the peak of a
fresh process (ru_maxrss) over what it held with its inputs made. The dense forms are lean ones: InfoNCE as two
cross-entropies over B x B logits, one after the other; SigLIP without a matrix of labels; RILS's KL as a cross-entropy
over patches x B. They need about 13 GiB at the default size; a process that would leave the machine less than 1 GiB is
stopped, and the benchmark ends with a message. Time: at --time-batch, in one process, in turns.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from training.losses.distributed import gather
from training.losses.info_nce import info_nce
from training.losses.language_reconstruction import language_reconstruction
from training.losses.siglip import sigmoid_pairs

WIDTH = 512
PATCHES_PER_PICTURE = 147  # 75 % of 14 x 14
LEAST_FREE_GIB = 1.0
OUT_OF_MEMORY = 17
TIMEOUT_S = 900

Run = Callable[[], None]
"""Forward and backward pass."""


def unit(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1).requires_grad_()


def infonce(form: str, batch: int, patches: int) -> Run:
    image, text, scale = unit(batch, 0), unit(batch, 1), torch.tensor(14.0, requires_grad=True)
    own = torch.arange(batch)

    def dense() -> None:
        for rows, columns in ((image, text), (text, image)):  # one direction's matrices at a time
            (functional.cross_entropy((scale * rows) @ columns.T, own, reduction="sum") / 2).backward()

    def tiled() -> None:
        info_nce(image, text, gather(image), gather(text), scale).sum.backward()

    return {"dense": dense, "tiled": tiled}[form]


def siglip(form: str, batch: int, patches: int) -> Run:
    image, text = unit(batch, 0), unit(batch, 1)
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)

    def dense() -> None:
        logits = (scale * image) @ text.T + bias
        own_sum = logits.diagonal().sum()
        (functional.softplus(logits).sum() - own_sum).backward()

    def tiled() -> None:
        sigmoid_pairs(image, gather(text), scale, bias).sum.backward()

    return {"dense": dense, "tiled": tiled}[form]


def rils(form: str, batch: int, patches: int) -> Run:
    target, prediction, texts = unit(patches, 0).detach(), unit(patches, 1), unit(batch, 2)

    def dense() -> None:
        with torch.no_grad():
            p = (target @ texts.T / 0.04).softmax(1)
        functional.cross_entropy(prediction @ texts.T / 0.1, p, reduction="sum").backward()

    def tiled() -> None:
        shape = (-1, PATCHES_PER_PICTURE, WIDTH)
        counted = torch.ones(patches // PATCHES_PER_PICTURE, dtype=torch.bool)
        language_reconstruction(
            target.view(shape),
            prediction.view(shape),
            texts,
            counted,
            target_temperature=0.04,
            prediction_temperature=0.1,
        ).sum.backward()

    return {"dense": dense, "tiled": tiled}[form]


LOSSES: dict[str, Callable[[str, int, int], Run]] = {"infonce": infonce, "siglip": siglip, "rils": rils}


def available_gib() -> float:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / 2**20


def resident_gib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


def measure_here(loss: str, form: str, batch: int, patches: int) -> None:
    """What a fresh process does: run once and tell its peak in GiB and its time."""

    def guard() -> None:
        while available_gib() > LEAST_FREE_GIB:
            time.sleep(0.05)
        os._exit(OUT_OF_MEMORY)

    Path("/proc/self/oom_score_adj").write_text("1000")  # should memory run out all the same, this is what goes
    run = LOSSES[loss](form, batch, patches)
    LOSSES[loss](form, PATCHES_PER_PICTURE, PATCHES_PER_PICTURE)()  # libraries take their own memory first
    threading.Thread(target=guard, daemon=True).start()
    before = resident_gib()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before
    print(json.dumps({"peak_gib": peak_gib, "seconds": seconds}))


def peak_gib(loss: str, form: str, batch: int, patches: int) -> float:
    """The peak of one run in a process of its own."""
    words = [sys.executable, __file__, "--measure", loss, form, "--batch", str(batch), "--patches", str(patches)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        why = "needs more memory than is free; try --batch 16384" if done.returncode == OUT_OF_MEMORY else "failed"
        sys.exit(f"bench-loss: {loss} {form} with {batch:,} pairs {why}")
    found = json.loads(done.stdout)
    print(f"loss.{loss}.{form}.peak: {found['peak_gib']:.3f} GiB")
    print(f"loss.{loss}.{form}.single_run: {found['seconds']:.1f} s", flush=True)
    return float(found["peak_gib"])


def time_ratios(loss: str, batch: int, patches: int, rounds: int) -> tuple[float, float]:
    """Medians over rounds of tiled over dense, in turns, after a warm-up: of the time, and of all cores' CPU time."""
    runs = {form: LOSSES[loss](form, batch, patches) for form in ("dense", "tiled")}
    ratios = []
    for _ in range(rounds + 1):
        spent = {}
        for form, run in runs.items():
            started = time.perf_counter(), time.process_time()
            run()
            spent[form] = time.perf_counter() - started[0], time.process_time() - started[1]
        ratios.append([tiled / dense for tiled, dense in zip(spent["tiled"], spent["dense"], strict=True)])
    wall, cpu = (statistics.median(column) for column in zip(*ratios[1:], strict=True))
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32_768, help="pairs of the global batch")
    parser.add_argument("--patches", type=int, default=64 * PATCHES_PER_PICTURE, help="masked patches that RILS counts")
    parser.add_argument("--time-batch", type=int, default=8_192, help="pairs of the global batch when time is taken")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(LOSSES))
    parser.add_argument("--measure", nargs=2, metavar=("LOSS", "FORM"), help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.measure:
        measure_here(*words.measure, words.batch, words.patches)
        return
    for loss in [words.only] if words.only else LOSSES:
        peaks = {form: peak_gib(loss, form, words.batch, words.patches) for form in ("tiled", "dense")}
        print(f"loss.{loss}.peak_ratio_vs_dense: {peaks['tiled'] / peaks['dense']:.4f}")
        patches = min(words.patches, 16 * PATCHES_PER_PICTURE)
        wall, cpu = time_ratios(loss, words.time_batch, patches, words.rounds)
        print(f"loss.{loss}.time_ratio_vs_dense: {wall:.3f}")
        print(f"loss.{loss}.cpu_time_ratio_vs_dense: {cpu:.3f}", flush=True)


if __name__ == "__main__":
    main()
