import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import ImageConfig
from pipeline.images import process
from pipeline.isolate import Decoders, lease_decoders
from pipeline.picture import ImageError
from pipeline.reasons import Reason

CONFIG = ImageConfig(size=32, decode_timeout_s=1)


def encoded(seed: int, format: str = "JPEG", side: int = 64, **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shared() -> Iterator[Decoders]:
    decoders = Decoders(2, CONFIG)
    yield decoders
    decoders.close()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def started(number: int) -> tuple[Decoders, int]:
    """Decoders that run, and their host's process id."""
    before = {*children_of(os.getpid())}
    decoders = Decoders(number, CONFIG)
    assert decoders.process(encoded(0)) == process(encoded(0), CONFIG)
    (host,) = {*children_of(os.getpid())} - before
    assert len(children_of(host)) == number
    return decoders, host


def ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def slow_jpeg() -> bytes:
    """A few KB of progressive JPEG whose last scan comes a thousand times: minutes of work for any decoder."""
    buffer = io.BytesIO()
    Image.new("RGB", (3_000, 3_000), (90, 120, 60)).save(buffer, "JPEG", progressive=True)
    body = buffer.getvalue()
    last_scan = body[body.rindex(b"\xff\xda") : -2]
    return body[:-2] + last_scan * 1_000 + body[-2:]


def refused(decoders: Decoders, body: bytes) -> ImageError:
    with pytest.raises(ImageError) as refusal:
        decoders.process(body)
    return refusal.value


def test_results_and_refusals_are_those_of_the_same_process(shared: Decoders) -> None:
    bodies = [encoded(seed, format) for seed, format in enumerate(("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"))]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(shared.process, bodies * 5)) == [process(body, CONFIG) for body in bodies * 5]
    assert refused(shared, b"<html>").reason is Reason.NOT_AN_IMAGE
    assert refused(shared, bodies[0][:-300]).reason is Reason.TRUNCATED_IMAGE
    boxes = [[0.0, 0.0, 0.5, 0.5]]
    assert shared.process(bodies[1], boxes) == process(bodies[1], CONFIG, boxes)


def test_a_body_larger_than_a_pipe_arrives_whole(shared: Decoders) -> None:
    body = encoded(1, "BMP", side=1_024)
    assert len(body) > 3 * 2**20
    assert shared.process(body) == process(body, CONFIG)


@pytest.mark.parametrize("cause", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_while_decoding_costs_that_image_alone(cause: signal.Signals) -> None:
    decoders, host = started(2)
    bodies = [encoded(seed) for seed in range(40)]
    before = {child: ticks(child) for child in children_of(host)}
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(decoders.process, slow_jpeg())
        _kill_the_busy_one(before, cause)
        assert list(pool.map(decoders.process, bodies)) == [process(body, CONFIG) for body in bodies]
        with pytest.raises(ImageError, match=cause.name) as refusal:
            slow.result()
    assert refusal.value.reason is Reason.DECODER_CRASHED
    after = children_of(host)
    assert len(after) == 2, "another child was forked"
    assert len({*before} & {*after}) == 1, "the other one lived on"
    decoders.close()


def _kill_the_busy_one(before: dict[int, int], cause: signal.Signals) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child, used in before.items():
            if ticks(child) >= used + 10:  # 0.1 s of work: it has the slow image
                os.kill(child, cause)
                return
        time.sleep(0.01)
    raise AssertionError("no child was busy")


def test_an_image_that_takes_too_long_is_given_up(shared: Decoders) -> None:
    begun = time.monotonic()
    refusal = refused(shared, slow_jpeg())
    assert (refusal.reason, refusal.detail) == (Reason.DECODER_CRASHED, "took too long")
    assert time.monotonic() - begun < 60
    assert shared.process(encoded(3)) == process(encoded(3), CONFIG)


def test_what_was_handed_over_when_the_host_died_is_asked_again() -> None:
    decoders, host = started(1)
    for pid in (host, *children_of(host)):
        os.kill(pid, signal.SIGKILL)
    assert decoders.process(encoded(2)) == process(encoded(2), CONFIG)
    decoders.close()


def test_a_decoder_cannot_take_more_memory_than_its_limit() -> None:
    script = (
        "from pipeline.decoder_host import _limit_memory; _limit_memory(2**26)\n"
        "bytearray(2**25)\n"
        "try: bytearray(2**27)\n"
        "except MemoryError: print('refused')"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout == "refused\n"


def test_narrower_limits_of_the_system_are_kept() -> None:
    script = (
        "import resource as r\n"
        "from pipeline.decoder_host import _allow_seconds, _limit_memory\n"
        "r.setrlimit(r.RLIMIT_AS, (2**40, 2**40)); r.setrlimit(r.RLIMIT_CPU, (500, 500))\n"
        "_limit_memory(2**45); _allow_seconds(10_000)\n"
        "print(*r.getrlimit(r.RLIMIT_AS), *r.getrlimit(r.RLIMIT_CPU))"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.split() == [str(2**40)] * 2 + ["500"] * 2


def test_decoding_processes_are_kept_for_the_next_lease_of_the_same_settings() -> None:
    with lease_decoders(1, CONFIG) as first:
        first.process(encoded(1))
    with lease_decoders(1, CONFIG) as second:
        assert second is first
    with lease_decoders(1, ImageConfig(size=48)) as other:
        assert other is not first
        assert other.process(encoded(1)).width == 48


def test_decoding_processes_end_with_the_one_they_work_for() -> None:
    script = (
        "import os, signal, sys\n"
        "from pipeline.config import ImageConfig\n"
        "from pipeline.isolate import Decoders\n"
        "decoders = Decoders(2, ImageConfig())\n"
        "try: decoders.process(b'GIF89a')\n"
        "except Exception: pass\n"
        "me = os.getpid()\n"
        "host = open(f'/proc/{me}/task/{me}/children').read().split()[0]\n"
        "print(host, *open(f'/proc/{host}/task/{host}/children').read().split(), flush=True)\n"
        "os.kill(me, signal.SIGKILL)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    pids = [int(pid) for pid in told.stdout.split()]
    assert len(pids) == 3
    deadline = time.monotonic() + 30
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < deadline, "they outlived it"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_host_stays_light() -> None:
    """It is forked from, and there is one for every fetch task: the packages that tables and Ray need stay out."""
    script = "import sys, pipeline.decoder_host; print({'ray', 'pyarrow', 'pydantic', 'fsspec'} & {*sys.modules})"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout == "set()\n"
