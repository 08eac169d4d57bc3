import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import RunError
from pipeline.config import ImageConfig
from pipeline.images import process
from pipeline.isolate import MOST_LOST, Decoders, lease_decoders
from pipeline.messages import SHELF_BYTES
from pipeline.picture import Boxes, ImageError, Processed
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


def rest(decoders: Decoders) -> dict[object, Processed | ImageError]:
    """Wait for all that is open; results by token."""
    results: dict[object, Processed | ImageError] = {}
    deadline = time.monotonic() + 120
    while decoders.num_open:
        assert time.monotonic() < deadline
        select.select([decoders.descriptor], [], [], 1)
        results |= dict(decoders.take())
    return results


def decoded(decoders: Decoders, bodies: Sequence[bytes], boxes: Boxes | None = None) -> list[Processed | ImageError]:
    for number, body in enumerate(bodies):
        decoders.give(number, body, boxes)
    results = rest(decoders)
    return [results[number] for number in range(len(bodies))]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def started(number: int) -> tuple[Decoders, int]:
    """Decoders that run, and their host's process id."""
    before = {*children_of(os.getpid())}
    decoders = Decoders(number, CONFIG)
    assert decoded(decoders, [encoded(0)]) == [process(encoded(0), CONFIG)]
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
    (refusal,) = decoded(decoders, [body])
    assert isinstance(refusal, ImageError)
    return refusal


def test_results_and_refusals_are_those_of_the_same_process(shared: Decoders) -> None:
    bodies = [encoded(seed, format) for seed, format in enumerate(("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"))]
    assert decoded(shared, bodies * 5) == [process(body, CONFIG) for body in bodies * 5]
    assert refused(shared, b"<html>").reason is Reason.NOT_AN_IMAGE
    assert refused(shared, bodies[0][:-300]).reason is Reason.TRUNCATED_IMAGE
    boxes = [[0.0, 0.0, 0.5, 0.5]]
    assert decoded(shared, [bodies[1]], boxes) == [process(bodies[1], CONFIG, boxes)]


def test_bodies_and_images_larger_than_a_shelf_arrive_whole() -> None:
    config = ImageConfig(resize="no", format="png")
    bodies = [encoded(seed, "BMP", side=side) for seed in range(3) for side in (1_024, 16, 600)]
    assert len(bodies[0]) > 3 * SHELF_BYTES
    with lease_decoders(1, config) as decoders:
        results = decoded(decoders, bodies)
    assert results == [process(body, config) for body in bodies]
    sizes = [len(result.data) for result in results if isinstance(result, Processed)]
    assert max(sizes) > 2 * SHELF_BYTES > SHELF_BYTES > min(sizes)


@pytest.mark.parametrize("cause", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_while_decoding_costs_that_image_alone(cause: signal.Signals) -> None:
    decoders, host = started(2)
    bodies = [encoded(seed) for seed in range(40)]
    before = {child: ticks(child) for child in children_of(host)}
    decoders.give("slow", slow_jpeg())
    for number, body in enumerate(bodies):  # some wait behind it, in the very process that is going to die
        decoders.give(number, body)
    _kill_the_busy_one(before, cause)
    results = rest(decoders)
    refusal = results.pop("slow")
    assert results == {number: process(body, CONFIG) for number, body in enumerate(bodies)}
    assert isinstance(refusal, ImageError)
    assert (refusal.reason, cause.name in refusal.detail) == (Reason.DECODER_CRASHED, True)
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
    assert decoded(shared, [encoded(3)]) == [process(encoded(3), CONFIG)]


def test_what_was_handed_over_when_the_host_died_is_asked_again() -> None:
    decoders, host = started(1)
    for pid in (host, *children_of(host)):
        os.kill(pid, signal.SIGKILL)
    assert decoded(decoders, [encoded(2)]) == [process(encoded(2), CONFIG)]
    decoders.close()


def test_an_image_that_ends_the_host_twice_is_refused_and_no_other() -> None:
    decoders, host = started(1)
    bodies = [encoded(seed) for seed in range(10)]
    for number, body in enumerate((bodies[0], slow_jpeg(), *bodies[1:])):
        decoders.give(number, body)
    results: dict[object, Processed | ImageError] = {}
    for _ in range(2):
        busy = children_of(host)[0]
        deadline = time.monotonic() + 60
        while ticks(busy) < 10:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(host, signal.SIGKILL)
        while (host_now := decoders._host) is None or host_now.pid == host or not children_of(host_now.pid):
            assert time.monotonic() < deadline
            select.select([decoders.descriptor], [], [], 0.05)
            results |= dict(decoders.take())
            if 1 in results:
                break
        host = host_now.pid if host_now else 0
    results |= rest(decoders)
    decoders.close()
    refusal = results.pop(1)
    assert isinstance(refusal, ImageError)
    assert (refusal.reason, refusal.detail) == (Reason.DECODER_CRASHED, "the decoding processes ended twice")
    assert list(results.values()) == [process(body, CONFIG) for body in bodies]


def test_hosts_that_always_end_fail_the_unit_and_cost_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    decoders = Decoders(1, CONFIG)
    for number in range(10):
        decoders.give(number, encoded(number))
    with pytest.raises(RunError, match=f"ended {MOST_LOST + 1} times in a row: /bin/false"):
        rest(decoders)
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
        decoded(first, [encoded(1)])
    with lease_decoders(1, CONFIG) as second:
        assert second is first
    with lease_decoders(1, ImageConfig(size=48)) as other:
        assert other is not first
        (image,) = decoded(other, [encoded(1)])
        assert isinstance(image, Processed)
        assert image.width == 48


def test_decoding_processes_end_with_the_one_they_work_for() -> None:
    script = (
        "import os, signal, sys\n"
        "from pipeline.config import ImageConfig\n"
        "from pipeline.isolate import Decoders\n"
        "decoders = Decoders(2, ImageConfig())\n"
        "decoders.give(0, b'GIF89a')\n"
        "while decoders.num_open: decoders.take()\n"
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
