"""Names, sites' files and answers that fail at random: every URL ends once, soon, and nothing stays held."""

import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hostile import HostileWeb, Line, picture, whole

import pipeline.resolver
from pipeline.config import FetchConfig
from pipeline.http import Downloader
from pipeline.ledgers import LocalLedgers
from pipeline.politeness import Politeness

NUM_HOSTS, NUM_URLS, DEADLINE_S = 16, 150, 30.0
RULES = b"User-agent: *\nDisallow: /no\nCrawl-delay: 0.01\n"


class Chaos(HostileWeb):
    """Answers of all kinds, drawn by chance."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.draw = draw
        setattr(self, "answer_robots.txt", self.answer_rules)

    def somewhere(self, path: str) -> str:
        return self.url(path, f"h{self.draw.randint(1, NUM_HOSTS + 2)}.example")

    async def answer_rules(self, line: Line, argument: str, num_asked: int) -> bool:
        away = whole(b"", f"Location: {self.somewhere('robots.txt')}", status="302 Found")
        await line.send(self.draw.choice([whole(RULES), whole(RULES), away, whole(b"", status="503 Later")]))
        return True

    async def answer_any(self, line: Line, argument: str, num_asked: int) -> bool:
        kind = self.draw.random()
        if kind < 0.1:
            line.reset()
        elif kind < 0.3:
            await line.send(whole(b"", f"Location: {self.somewhere('any/moved')}", status="302 Found"))
        elif kind < 0.4:
            await line.send(whole(b"", "Retry-After: 0", status=self.draw.choice(["429 Busy", "500 Bad"])))
        else:
            await line.send(whole(self.draw.choice([picture("a"), bytes(300_000)])))
        return kind >= 0.1


@pytest.fixture
def draw(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Chance, which answers for the system's resolver too."""
    chance = random.Random(request.param)

    def resolve(name: str, *rest: object, **more: object) -> list[tuple[Any, ...]]:
        number = int(name[1:].partition(".")[0])
        if number > NUM_HOSTS:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        if chance.random() < 0.1:
            raise socket.gaierror(socket.EAI_AGAIN, "later")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.4.{number}", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(pipeline.resolver, "_known", {})
    return chance


@pytest.fixture
def web(draw: random.Random) -> Iterator[Chaos]:
    with Chaos(draw) as web:
        web.port = web.listen([f"127.0.4.{number}" for number in range(1, NUM_HOSTS + 1)])
        yield web


@pytest.mark.parametrize("draw", range(4), indirect=True)
def test_every_url_ends_once_and_nothing_stays_held(draw: random.Random, web: Chaos) -> None:
    config = FetchConfig(
        allow_addresses=["127.0.0.0/8"],
        connections=draw.choice([4, 16]),
        connections_per_host=draw.choice([1, 3]),
        requests_per_s_per_host=draw.choice([None, 60.0]),
        robots="obey",
        tdm_reservation=draw.choice(["header", "file"]),
        timeout_s=5,
        backoff_s=0.02,
        max_wait_s=2,
    )
    admission, ended = Politeness(config, LocalLedgers(config)), Counter[int]()
    started = time.monotonic()
    with Downloader(config, admission) as downloader:
        for index in range(NUM_URLS):
            downloader.submit(index, web.somewhere(f"any/{draw.randint(0, 100)}"))
        while downloader.num_open and time.monotonic() - started < DEADLINE_S:
            limit_bytes, may_start = draw.choice([500_000, 2**28]), draw.random() < 0.9
            ended.update(response.index for response in downloader.poll(0.1, limit_bytes, may_start=may_start))
        assert ended == Counter(range(NUM_URLS))
        assert downloader.held_bytes == 0
    assert time.monotonic() - started < DEADLINE_S
