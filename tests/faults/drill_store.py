"""Several writers on one S3 server that errs, delays, resets and is killed: every promise of cluster.store holds."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import fsspec
from kills import Diary, Figures, pause
from s3_server import BUCKET, S3Server, s3_server
from store_proxy import StoreProxy

from cluster.store import Store

CLIENT = Path(__file__).with_name("store_client.py")
UP_S, DOWN_S = (2.0, 6.0), (0.2, 5.0)


@dataclass(frozen=True, kw_only=True)
class StoreDrill:
    """`num_clients` processes take `num_turns` turns each, while the server is killed `num_kills` times."""

    seed: int
    num_clients: int = 3
    num_turns: int = 12
    num_kills: int = 2
    limit_s: float = 240.0

    def run(self, folder: Path, diary: Diary, figures: Figures) -> None:
        deadline, draw = time.monotonic() + self.limit_s, random.Random(self.seed)
        with ExitStack() as stack:
            server = stack.enter_context(s3_server(folder / "s3"))
            proxy = stack.enter_context(StoreProxy(server.endpoint_url, self.seed))
            clients = [self._client(number, server, proxy, stack) for number in range(self.num_clients)]
            for _ in range(self.num_kills):
                pause(draw, UP_S, deadline)
                server.kill()
                diary.count("store", "s3")
                pause(draw, DOWN_S, deadline)
                server.start()
            told = []
            for number, client in enumerate(clients):
                out, _ = client.communicate(timeout=max(1.0, deadline - time.monotonic()))
                figures.promise(client.returncode == 0, f"store: client {number} ended with {client.returncode}")
                told.append(json.loads(out) if client.returncode == 0 else {"won": [], "wrong": ["ended early"]})
            wrong = [what for each in told for what in each["wrong"]] + self._wrong_winners(server, told)
        for what in wrong:
            diary.note("broken", promise=what)
        figures.set("faults.store.requests", proxy.num_requests)
        figures.set("faults.store.errors", proxy.injected.total())
        figures.set("faults.store.kills", diary.num_kills("store"))
        figures.set("faults.store.wrong", len(wrong))
        figures.promise(not wrong, f"store: {len(wrong)} wrong answers, such as {wrong[:1]}")
        figures.promise(proxy.injected.total() > 0, "store: no fault was injected")

    def _client(self, number: int, server: S3Server, proxy: StoreProxy, stack: ExitStack) -> subprocess.Popen[str]:
        words = [f"s3://{BUCKET}/drill", f"client{number}", str(self.seed), str(self.num_turns)]
        client = subprocess.Popen(
            [sys.executable, str(CLIENT), *words],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | server.environment | {"AWS_ENDPOINT_URL": proxy.url},
        )
        stack.callback(_end, client)
        return client

    def _wrong_winners(self, server: S3Server, told: list[dict[str, list[str]]]) -> list[str]:
        """Names that `create` gave to nobody or to several, or that hold another's bytes."""
        num_winners = Counter(name for each in told for name in each["won"])
        os.environ.update(server.environment)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        store, wrong = Store(f"s3://{BUCKET}/drill"), []
        for number in range(self.num_turns):
            name = f"markers/{number:04}"
            if num_winners[name] != 1:
                wrong.append(f"{name}: created {num_winners[name]} times")
            writer = store.read_bytes(name).decode().split()[0]
            if name not in told[int(writer.removeprefix("client"))]["won"]:
                wrong.append(f"{name}: holds the bytes of {writer}, which was told that it had lost")
        return wrong


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()
