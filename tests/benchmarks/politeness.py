"""`make bench-politeness`: what limits over the whole cluster cost a fetch task, with the ledger in a Ray actor.

An engine without a network (a request is a wait of 20 ms, 128 at once) asks before every request, first without limits,
then with them: many hosts with one image each, and sixteen with many. Takes about half a minute.
"""

import heapq
import time
from collections import deque
from dataclasses import dataclass

import psutil
import ray

from cluster.config import parse
from cluster.session import RayConfig, ray_session
from pipeline.admission import Admission, Ended, Unrestricted
from pipeline.config import BuildConfig
from pipeline.ledgers import RayLedgers
from pipeline.politeness import Politeness

REQUEST_S = 0.02
NUM_IMAGES = 2_000
CONFIG = parse(BuildConfig, ["input=a", "output=b"]).fetch
ENDED = Ended(reason=None, http_status=200, retry_after_s=None)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run, an image."""

    wall_s: float
    cpu_s: float


def work_through(hosts: list[str], admission: Admission) -> Cost:
    """Ask for one image after the other of these hosts, as the engine does, until all have come."""
    ready = deque((f"http://{host}/{number}.jpg", host) for number, host in enumerate(hosts))
    later: list[tuple[float, int, tuple[str, str]]] = []
    under_way: list[tuple[float, int, str]] = []
    wall, cpu, number = time.monotonic(), time.process_time(), 0
    while ready or later or under_way:
        now = time.monotonic()
        admission.tick(now)
        while later and later[0][0] <= now:
            ready.append(heapq.heappop(later)[2])
        while under_way and under_way[0][0] <= now:
            admission.done(heapq.heappop(under_way)[2], ENDED, now)
        while ready and len(under_way) < CONFIG.connections:
            job, number = ready.popleft(), number + 1
            verdict = admission.ask(*job, now)
            assert isinstance(verdict, float)
            if verdict:
                heapq.heappush(later, (now + verdict, number, job))
            else:
                heapq.heappush(under_way, (now + REQUEST_S, number, job[1]))
        dues = [heap[0][0] for heap in (later, under_way) if heap]
        time.sleep(max(0.0, min(dues, default=now) - time.monotonic()))
    admission.close()
    return Cost(
        wall_s=(time.monotonic() - wall) / len(hosts),
        cpu_s=(time.process_time() - cpu) / len(hosts),
    )


def ledger_process() -> psutil.Process:
    """The actor's process."""
    found = [child for child in psutil.Process().children(recursive=True) if "HostLedger" in " ".join(child.cmdline())]
    assert len(found) == 1
    return found[0]


def main() -> None:
    cases = {
        "many_hosts": [f"host{number}.test" for number in range(NUM_IMAGES)],
        "few_hosts": [f"host{number % 16}.test" for number in range(NUM_IMAGES)],
    }
    with ray_session(RayConfig(num_cpus=1)):
        ledgers = RayLedgers.start(CONFIG)
        ray.get(ledgers.actors[0].__ray_ready__.remote())
        for name, hosts in cases.items():
            free = work_through(hosts, Unrestricted())
            polite = Politeness(CONFIG, ledgers)
            before = sum(ledger_process().cpu_times()[:2])
            bound = work_through(hosts, polite)
            ledger_s = (sum(ledger_process().cpu_times()[:2]) - before) / len(hosts)
            print(f"politeness.{name}.calls_per_image: {polite.num_calls / len(hosts):.4f} calls")
            print(f"politeness.{name}.task_cpu: {(bound.cpu_s - free.cpu_s) * 1e6:.1f} us an image")
            print(f"politeness.{name}.ledger_cpu: {ledger_s * 1e6:.1f} us an image")
            rates = f"{1 / bound.wall_s:.0f} images/s (without limits {1 / free.wall_s:.0f})"
            print(f"politeness.{name}.images_per_s: {rates}")


if __name__ == "__main__":
    main()
