"""What decoding, resizing and encoding cost alone, and what the fast mode loses: `python tests/benchmarks/codec.py`.

Rates are images per second of processor time on one thread, the codecs in turns. Losses are mean PSNR in dB of the
resized pixels, before they are encoded.
"""

import argparse
import contextlib
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # img2dataset's import would ask the network

import cv2
import numpy as np
from PIL import Image

from pipeline.config import ImageConfig
from pipeline.decoder_link import SETTINGS
from pipeline.images import decode_resized, encode, process
from pipeline.isolate import Decoders
from pipeline.picture import Pixels

Codec = Callable[[bytes], Any]


def rates_alone(folder: Path, count: int, num_processes: int) -> dict[str, float]:
    """Images per second of processor time of decoding, resizing and encoding alone: `exact`, `fast` and `opencv`.

    In so many processes at once, each through the same photos, codec after codec, with the decoding processes' settings
    of malloc. All of their time counts, not the best of it: it is compared with programs that are measured so.
    """
    command = [sys.executable, __file__, "--alone", str(folder), "--photos", str(count)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | SETTINGS) for _ in range(num_processes)
    ]
    told = [json.loads(process.communicate()[0]) for process in processes]
    return {name: len(told) / sum(1 / rates[name] for rates in told) for name in told[0]}


def _mean_rates(photos: Sequence[Path]) -> dict[str, float]:
    cv2.setNumThreads(1)
    bodies = [path.read_bytes() for path in photos]
    rates = {}
    for name, codec in {"exact": _ours("exact"), "fast": _ours("fast"), "opencv": _opencv}.items():
        codec(bodies[0])
        begun = time.process_time()
        for body in bodies:
            codec(body)
        rates[name] = len(bodies) / (time.process_time() - begun)
    return rates


def psnr_db(photos: Sequence[Path], mode: str) -> float:
    """Mean PSNR of a mode's pixels against those of mode exact."""
    return _mean_psnr(photos, mode, lambda body: _resized(body, "exact"))


def lanczos_psnr_db(photos: Sequence[Path], mode: str) -> float:
    """Mean PSNR of a mode's pixels against Pillow's Lanczos filter on the whole image."""

    def lanczos(body: bytes) -> Pixels:
        height, width = _resized(body, "exact").shape[:2]
        with Image.open(BytesIO(body)) as image:
            return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))[:, :, ::-1]

    return _mean_psnr(photos, mode, lanczos)


def _mean_psnr(photos: Sequence[Path], mode: str, reference: Callable[[bytes], Pixels]) -> float:
    bodies = [path.read_bytes() for path in photos]
    return float(np.mean([cv2.PSNR(_resized(body, mode), np.ascontiguousarray(reference(body))) for body in bodies]))


def _resized(body: bytes, mode: str) -> Pixels:
    return decode_resized(body, "jpeg", ImageConfig.model_validate({"mode": mode}))[1]


def _ours(mode: str) -> Codec:
    config = ImageConfig.model_validate({"mode": mode})
    return lambda body: encode(decode_resized(body, "jpeg", config)[1], config)


def _img2dataset() -> Codec:
    from img2dataset.resizer import Resizer

    resizer = Resizer(256, "keep_ratio", True)
    return lambda body: resizer(BytesIO(body))


def _opencv(body: bytes) -> Any:
    pixels = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
    scale = 256 / min(pixels.shape[:2])
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    shrunk = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", shrunk, [cv2.IMWRITE_JPEG_QUALITY, 95])


def _rates(photos: Sequence[Path], codecs: dict[str, Codec], seconds: float) -> dict[str, float]:
    """Each picture's best time of all rounds, codecs in turns, until each had its seconds; at least three rounds.

    The best and not the mean: what else runs on the machine adds to times and never takes away.
    """
    cv2.setNumThreads(1)
    bodies = [path.read_bytes() for path in photos]
    best = {name: [math.inf] * len(bodies) for name in codecs}
    spent = dict.fromkeys(codecs, 0.0)
    num_rounds = 0
    while num_rounds < 3 or min(spent.values()) < seconds:
        for place, body in enumerate(bodies):
            for name, codec in codecs.items():
                begun = time.process_time()
                codec(body)
                took = time.process_time() - begun
                spent[name] += took
                best[name][place] = min(best[name][place], took)
        num_rounds += 1
    return {name: len(bodies) / sum(times) for name, times in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="of processor time for each codec")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--alone", type=Path, help="photos: tell only the rates of decoding, resizing and encoding")
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(_mean_rates(sorted(arguments.alone.glob("*.jpg"))[: arguments.photos])))
        return
    from photos import make_photos

    with tempfile.TemporaryDirectory(prefix="pairmill-") as folder:
        photos = make_photos(Path(folder), arguments.photos, arguments.seed)
        codecs = {
            "img2dataset": _img2dataset(),
            "opencv": _opencv,
            "exact": _ours("exact"),
            "fast": _ours("fast"),
        } | {f"{mode}.measured": _whole(mode) for mode in ("exact", "fast")}
        rates = _rates(photos, codecs, arguments.seconds)
        for name, rate in rates.items():
            print(f"codec.{name}.rate: {rate:.0f} images/s/core")
        for mode in ("exact", "fast"):
            print(f"codec.{mode}.ratio_vs_img2dataset: {rates[mode] / rates['img2dataset']:.2f} x")
            print(f"codec.{mode}.lanczos_psnr_db: {lanczos_psnr_db(photos, mode):.1f} dB")
            print(f"codec.{mode}.isolation_cost: {_isolation_cost(photos, mode, arguments.seconds) * 100:.1f} %")
        print(f"codec.fast.psnr_db: {psnr_db(photos, 'fast'):.1f} dB")


def _whole(mode: str) -> Codec:
    config = ImageConfig.model_validate({"mode": mode})
    return lambda body: process(body, config)


def _isolation_cost(photos: Sequence[Path], mode: str, seconds: float) -> float:
    """How much more processor time a picture takes by way of a decoding process, both processes counted.

    As in `_rates`: in turns, and of each picture the best of all rounds.
    """
    config = ImageConfig.model_validate({"mode": mode})
    bodies = [path.read_bytes() for path in photos]
    with contextlib.closing(Decoders(1, config)) as decoders:
        _isolated(decoders, bodies[0])
        (host,) = _children(os.getpid())
        (child,) = _children(host)
        clock = (~child << 3) | 2  # the processor time of another process, see clock_getcpuclockid(3)
        best = [[math.inf, math.inf] for _ in bodies]
        spent = 0.0
        while spent < seconds:
            for body, times in zip(bodies, best, strict=True):
                here, there = time.process_time(), time.clock_gettime(clock)
                _isolated(decoders, body)
                isolated = time.process_time() - here + time.clock_gettime(clock) - there
                here = time.process_time()
                process(body, config)
                direct = time.process_time() - here
                times[:] = min(times[0], isolated), min(times[1], direct)
                spent += isolated
    return sum(isolated for isolated, _ in best) / sum(direct for _, direct in best) - 1


def _isolated(decoders: Decoders, body: bytes) -> None:
    decoders.give(0, body)
    while decoders.num_open:
        select.select([decoders.descriptor], [], [])
        decoders.take()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


if __name__ == "__main__":
    main()
