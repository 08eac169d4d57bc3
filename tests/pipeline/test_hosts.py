"""Limits per host over all tasks: never exceeded, shared fairly, given back by the dead, cheap for many hosts."""

import random
from collections import Counter
from concurrent.futures import Future
from itertools import pairwise

import pytest

import pipeline.politeness
import pipeline.turnstile
from cluster.config import parse
from pipeline.admission import Ended, Need, Refusal
from pipeline.config import BuildConfig, FetchConfig
from pipeline.hosts import HORIZON_S, PATIENCE_S, TURN_S, Ask, Grant, Ledger
from pipeline.ledgers import Answer, Desk, LocalLedgers, Message, Note, Notebook
from pipeline.politeness import Politeness
from pipeline.turnstile import IDLE_S, LATER_S, REPLY_S, Turnstile

LEASE_S = 45.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ledger(clock: Clock, connections: int = 4, rate: float | None = None, silent_s: float = 0.0) -> Ledger:
    return Ledger(connections=connections, requests_per_s=rate, lease_s=LEASE_S, silent_s=silent_s, clock=clock)


def slots(book: Ledger, holder: str, wanted: int, busy: int = 0) -> int:
    return book.call(holder, {"h": Ask(wanted, busy)})["h"].slots


def test_one_task_gets_all_slots_and_no_more(clock: Clock) -> None:
    book = ledger(clock)
    assert slots(book, "a", 100) == 4
    assert slots(book, "a", 100, busy=4) == 4
    assert book.call("a", {"other": Ask(2)})["other"].slots == 2


def test_a_second_task_waits_until_the_first_gave_back_its_share(clock: Clock) -> None:
    book = ledger(clock)
    assert slots(book, "a", 8) == 4
    assert slots(book, "b", 8) == 0
    assert slots(book, "a", 8, busy=4) == 2
    assert slots(book, "b", 8) == 0  # four requests are still under way
    assert slots(book, "a", 8, busy=2) == 2
    assert slots(book, "b", 8) == 2
    assert slots(book, "a", 8, busy=2) == 2


def test_more_tasks_than_slots_take_turns(clock: Clock) -> None:
    book, tasks = ledger(clock, connections=2), ["a", "b", "c", "d", "e"]
    busy: dict[str, int] = dict.fromkeys(tasks, 0)
    served: Counter[str] = Counter()
    for _ in range(300):
        clock.now += 0.2
        for task in tasks:
            granted = slots(book, task, 2, busy[task])
            busy[task] = min(busy[task], granted) or granted  # requests end at once, new ones begin
            served[task] += busy[task]
        assert sum(busy.values()) <= 2
    assert len(served) == 5
    assert max(served.values()) < 2 * min(served.values())


def test_the_slots_of_a_dead_task_come_back_when_its_lease_is_over(clock: Clock) -> None:
    book = ledger(clock)
    assert slots(book, "dead", 4) == 4
    clock.now += LEASE_S - 0.1
    assert slots(book, "b", 4) == 0
    clock.now += 0.2
    assert slots(book, "b", 4) == 4


def test_a_dead_waiter_does_not_keep_its_place(clock: Clock) -> None:
    book = ledger(clock, connections=1)
    assert slots(book, "a", 1) == 1
    assert slots(book, "dead", 1) == 0
    assert slots(book, "b", 1) == 0
    assert slots(book, "a", 0) == 0
    assert slots(book, "b", 1) == 0  # the dead one came first
    clock.now += PATIENCE_S
    assert slots(book, "b", 1) == 1


def test_a_ledger_that_lost_its_memory_grants_nothing_while_old_leases_may_live(clock: Clock) -> None:
    book = ledger(clock, silent_s=LEASE_S)
    assert slots(book, "a", 4, busy=3) == 0
    clock.now += LEASE_S / 2
    assert slots(book, "a", 4, busy=3) == 0
    clock.now += LEASE_S / 2
    assert slots(book, "b", 4) == 1
    assert slots(book, "a", 4, busy=3) == 3


def test_saying_it_twice_changes_nothing(clock: Clock) -> None:
    book = ledger(clock)
    assert [slots(book, "a", 2), slots(book, "a", 2), slots(book, "b", 2), slots(book, "b", 2)] == [2, 2, 2, 2]
    assert [slots(book, "a", 0), slots(book, "a", 0)] == [0, 0]
    assert slots(book, "c", 2) == 2


def test_a_host_that_wants_to_be_left_alone_is_left_alone_by_all(clock: Clock) -> None:
    book = ledger(clock)
    assert slots(book, "a", 2, 2) == 2
    grant = book.call("a", {"h": Ask(2, 1, closed_s=10.0)})["h"]
    assert (grant.slots, grant.closed_s) == (0, 10.0)
    assert book.call("b", {"h": Ask(1)})["h"][::4] == (0, 10.0)
    book.call("a", {"h": Ask(0)})
    clock.now += 5
    assert book.call("b", {"h": Ask(1, closed_s=2.0)})["h"][::4] == (0, 5.0)
    clock.now += 5.1
    assert slots(book, "b", 1) == 1


def test_nothing_is_remembered_of_hosts_that_nobody_uses(clock: Clock) -> None:
    book = ledger(clock, rate=1.0)
    book.call("a", {f"h{number}": Ask(1, 0, 1) for number in range(1_000)})
    assert book.num_hosts == 1_000
    clock.now += 2 * LEASE_S
    book.call("a", {})
    assert book.num_hosts == 0


def test_starts_keep_the_rate_over_all_tasks(clock: Clock) -> None:
    book, starts = ledger(clock, connections=8, rate=4.0), []
    end = clock.now + 10.0
    while clock.now < end:
        for task in "abc":
            grant = book.call(task, {"h": Ask(8, 0, 3)})["h"]
            starts += [clock.now + grant.first_s + place * grant.every_s for place in range(grant.starts)]
            assert grant.first_s + (grant.starts - 1) * grant.every_s <= HORIZON_S
        clock.now += 0.05
    starts.sort()
    assert all(after - before >= 0.2499 for before, after in pairwise(starts))
    assert len(starts) == pytest.approx(4 * 11, abs=2)


def test_the_slower_of_our_rate_and_the_hosts_wish_holds(clock: Clock) -> None:
    book = ledger(clock, rate=10.0)
    assert book.call("a", {"h": Ask(2, 0, 4, 5.0)})["h"] == Grant(2, 1, 0.0, 5.0)
    assert book.call("b", {"h": Ask(2, 0, 4, 5.0)})["h"].starts == 0
    clock.now += 4.5
    assert book.call("b", {"h": Ask(2, 0, 4, 5.0)})["h"].starts == 1


def test_notes_end_after_a_day_and_trouble_sooner(clock: Clock) -> None:
    book = Notebook(max_bytes=100, clock=clock)
    book.keep("http://a/robots.txt", Note(200, "x" * 20))
    book.keep("http://b/robots.txt", Note(503, ""))
    assert book.get("http://a/robots.txt") == Note(200, "x" * 20)
    clock.now += 3_600
    assert book.get("http://b/robots.txt") is None
    assert book.get("http://a/robots.txt") is not None
    clock.now += 24 * 3_600
    assert book.get("http://a/robots.txt") is None
    book.keep("http://c/robots.txt", Note(200, "y" * 50))
    book.keep("http://d/robots.txt", Note(200, "z" * 50))
    assert book.get("http://c/robots.txt") is None
    assert book.get("http://d/robots.txt") is not None


def config(*words: str) -> FetchConfig:
    return parse(BuildConfig, ["input=a", "output=b", *words]).fetch


class SlowLedgers:
    """Two shards that answer only when a test lets them, as actors far away."""

    num_shards = 2
    answers_at_once = False

    def __init__(self, config: FetchConfig) -> None:
        self.desks = [Desk(config), Desk(config)]
        self.calls: list[tuple[int, Message, Future[Answer]]] = []
        self.num_sent = 0
        self.num_asks = 0

    def send(self, shard: int, message: Message) -> Future[Answer]:
        future: Future[Answer] = Future()
        self.calls.append((shard, message, future))
        self.num_sent += 1
        self.num_asks += len(message.asks)
        return future

    def answer(self) -> None:
        for shard, message, future in self.calls:
            future.set_result(self.desks[shard].answer(message))
        self.calls.clear()

    def fail(self) -> None:
        for _, _, future in self.calls:
            future.set_exception(RuntimeError("the actor is being started again"))
        self.calls.clear()


def test_nothing_begins_before_the_ledger_has_answered() -> None:
    settings = config()
    ledgers = SlowLedgers(settings)
    gate = Turnstile(ledgers, settings)
    assert gate.ask("http://h/1", "h", 10.0) != 0.0
    assert gate.ask("http://h/2", "h", 10.002) != 0.0
    assert ledgers.num_sent == 1
    ledgers.answer()
    assert gate.ask("http://h/1", "h", 10.004) == 0.0
    assert gate.ask("http://h/2", "h", 10.004) == 0.0


def test_a_request_begins_only_under_a_lease_that_outlives_it() -> None:
    settings = config("fetch.timeout_s=20")
    ledgers = SlowLedgers(settings)
    gate = Turnstile(ledgers, settings)
    gate.ask("u", "h", 10.0)
    gate.ask("u", "h", 10.002)
    ledgers.answer()
    assert gate.ask("v", "h", 10.01) == 0.0
    gate.ask("u", "h", 36.0)  # 26 s of 42 have passed: less than a timeout is left
    assert gate.ask("u", "h", 36.01) != 0.0
    assert ledgers.num_sent == 2
    ledgers.answer()
    assert gate.ask("u", "h", 36.02) == 0.0


def test_a_ledger_that_does_not_answer_is_asked_again_and_nothing_is_lost() -> None:
    settings = config()
    ledgers = SlowLedgers(settings)
    gate = Turnstile(ledgers, settings)
    gate.ask("u", "h", 10.0)
    gate.ask("u", "h", 10.002)
    ledgers.fail()
    assert gate.ask("u", "h", 10.01) != 0.0
    assert ledgers.num_sent == 1
    gate.ask("u", "h", 10.6)
    ledgers.answer()
    assert gate.ask("u", "h", 10.61) == 0.0


def test_waiting_is_bounded() -> None:
    settings = config("fetch.connections_per_host=1", "fetch.host_wait_s=5")
    ledgers = LocalLedgers(settings)
    first, second = Politeness(settings, ledgers), Politeness(settings, ledgers)
    assert first.ask("http://h/1", "h", 10.0) == 0.0
    answers = [second.ask("http://h/2", "h", 10.0 + step / 10) for step in range(60)]
    refusals = [answer for answer in answers if isinstance(answer, Refusal)]
    assert refusals
    assert refusals[0].reason == "host_busy"
    assert all(isinstance(answer, float) and answer > 0 for answer in answers[:50])


def test_the_silence_of_a_ledger_that_was_started_again_is_nobodys_wait(clock: Clock) -> None:
    settings = config("fetch.timeout_s=150", "fetch.host_wait_s=300")
    ledgers = SlowLedgers(settings)
    begun = clock.now
    for desk in ledgers.desks:
        desk._ledger = Ledger(connections=8, requests_per_s=None, lease_s=302, silent_s=302, clock=clock)
    gate = Turnstile(ledgers, settings)
    while clock.now < begun + 320:
        wait_s = gate.ask("u", "h", clock.now)
        if not wait_s:
            break
        ledgers.answer()
        clock.now += 0.1
    assert wait_s == 0.0, "None would be host_busy"
    assert clock.now > begun + 302


def test_everybody_who_waits_for_a_host_is_told_at_the_same_time() -> None:
    settings = config("fetch.connections_per_host=1", "fetch.host_wait_s=5")
    ledgers = LocalLedgers(settings)
    first, second = Turnstile(ledgers, settings), Turnstile(ledgers, settings)
    assert first.ask("u", "h", 10.0) == 0.0
    for step in range(50):
        assert second.ask("v", "h", 10.0 + step / 10)
    assert [second.ask(url, "h", 15.1) for url in ("v", "v", "w")] == [None] * 3
    assert second.ask("v", "h", 20.0) is not None


def test_a_request_that_knows_nothing_of_the_hosts_wish_has_its_turn_too() -> None:
    """Such as one for robots.txt, to which that of another site redirects."""
    settings, now = config(), 10.0
    gate = Turnstile(LocalLedgers(settings), settings)
    clocked = Ledger(connections=8, requests_per_s=None, lease_s=LEASE_S, clock=lambda: now)
    gate._ledgers._desk._ledger = clocked  # type: ignore[attr-defined]
    assert gate.ask("http://h/1", "h", now, every_s=2.0) == 0.0
    gate.done("h", now)
    while gate.ask("http://h/robots.txt", "h", now) and now < 20.0:
        now += 0.1
        gate.tick(now)
    assert 11.9 < now < 13.0


def test_a_crawl_delay_holds_up_a_unit_for_so_long_and_no_longer() -> None:
    settings = config("fetch.host_wait_s=50")
    begun, refused, jobs, now = 0, 0, 20, 10.0
    gate = Turnstile(LocalLedgers(settings), settings)
    clocked = Ledger(connections=8, requests_per_s=None, lease_s=LEASE_S, clock=lambda: now)
    gate._ledgers._desk._ledger = clocked  # type: ignore[attr-defined]
    while jobs:
        answer = gate.ask(f"u{jobs}", "h", now, every_s=9.0)
        if answer == 0.0:
            begun, jobs = begun + 1, jobs - 1
            gate.done("h", now)
        elif answer is None:
            refused, jobs = refused + 1, jobs - 1
        else:
            now += min(answer, 0.5)
        gate.tick(now)
    assert (begun, refused) == (6, 14)
    assert now < 65


def test_sites_files_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.turnstile, "NOTES_CHARS", 100)
    monkeypatch.setattr(pipeline.turnstile, "SMALL_CHARS", 10)
    monkeypatch.setattr(pipeline.politeness, "PARSED_CHARS", 100)
    settings = config("fetch.robots=obey")
    manners = Politeness(settings, LocalLedgers(settings))
    disallowed = "User-agent: *\nDisallow: /no\n" + "# " * 30
    answers = []
    for host, text in (("a", disallowed), ("b", disallowed), ("c", "# small"), ("a", disallowed)):
        while isinstance(answer := manners.ask(f"http://{host}/no", host, 10.0), Need):
            manners.learn(answer.url, 200, text.encode())
        answers.append(str(answer.reason) if isinstance(answer, Refusal) else "")
    assert answers == ["robots_disallowed", "robots_unavailable", "", "robots_disallowed"]


def test_what_is_not_used_goes_back() -> None:
    settings = config("fetch.connections_per_host=1")
    ledgers = LocalLedgers(settings)
    first, second = Turnstile(ledgers, settings), Turnstile(ledgers, settings)
    assert first.ask("u", "h", 10.0) == 0.0
    assert second.ask("u", "h", 10.0) != 0.0
    first.done("h", 10.1)
    first.tick(10.15)
    assert second.ask("u", "h", 10.2) != 0.0  # the next one may follow
    first.tick(10.3)
    assert second.ask("u", "h", 10.6) == 0.0
    assert first.ask("v", "h", 11.0) != 0.0
    second.close()
    assert first.ask("v", "h", 11.6) == 0.0


def simulate(num_tasks: int, hosts: list[str], settings: FetchConfig, seed: int) -> tuple[int, int, SlowLedgers]:
    """Engines that work through `hosts` (one request each) at once; returns (requests done, most at once, ledgers)."""
    draw = random.Random(seed)
    ledgers = SlowLedgers(settings)
    gates = [Turnstile(ledgers, settings) for _ in range(num_tasks)]
    todo = [[(f"http://{host}/{number}", host) for number, host in enumerate(hosts)] for _ in gates]
    under_way: list[tuple[float, int, str]] = []
    sleeping: dict[tuple[int, str], float] = {}
    total, most, now = 0, 0, 100.0
    while (any(todo) or under_way) and now < 1_000:
        now += 0.002
        if draw.random() < 0.7:
            ledgers.answer()
        for due, task, host in [entry for entry in under_way if entry[0] <= now]:
            under_way.remove((due, task, host))
            gates[task].done(host, now)
        for task, gate in enumerate(gates):
            gate.tick(now)
            left = []
            for url, host in todo[task]:
                free = settings.connections > sum(1 for _, other, _ in under_way if other == task)
                if not free or sleeping.get((task, url), 0.0) > now:
                    left.append((url, host))
                    continue
                wait_s = gate.ask(url, host, now)
                if wait_s == 0.0:
                    under_way.append((now + draw.uniform(0.01, 0.1), task, host))
                    total += 1
                else:
                    left.append((url, host))
                    sleeping[task, url] = now + (wait_s or 0.0)
            todo[task] = left
            if not left and task not in {other for _, other, _ in under_way}:
                gate.close()
        most = max([most, *Counter(host for _, _, host in under_way).values()])
    return total, most, ledgers


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_the_limit_holds_however_many_tasks_there_are(num_tasks: int) -> None:
    settings = config("fetch.connections_per_host=3", "fetch.connections=16")
    total, most, _ = simulate(num_tasks, ["h"] * 60, settings, seed=num_tasks)
    assert total == 60 * num_tasks
    assert most == 3


def test_many_hosts_need_few_calls() -> None:
    settings = config("fetch.connections=64")
    hosts = [f"h{number}.test" for number in range(1_000)]
    total, most, ledgers = simulate(1, hosts, settings, seed=0)
    assert (total, most) == (1_000, 1)
    assert ledgers.num_sent < 150
    assert ledgers.num_asks < 4_000


def test_at_most_a_window_of_hosts_is_held_ahead() -> None:
    settings = config("fetch.connections=2")
    ledgers = SlowLedgers(settings)
    gate = Turnstile(ledgers, settings)
    answers = [gate.ask(f"u{number}", f"h{number}", 10.0) for number in range(20)]
    assert answers == [REPLY_S] * 8 + [LATER_S] * 12
    gate.tick(10.2)
    ledgers.answer()
    assert [gate.ask(f"u{number}", f"h{number}", 10.3) for number in range(2)] == [0.0, 0.0]
    assert [gate.ask(f"u{number}", f"h{number}", 10.3) for number in range(8, 11)] == [REPLY_S, REPLY_S, LATER_S]


def test_a_rate_holds_within_a_task() -> None:
    settings = config("fetch.requests_per_s_per_host=10")
    gate, now, starts = Turnstile(LocalLedgers(settings), settings), 10.0, []
    clocked = Ledger(connections=8, requests_per_s=10.0, lease_s=LEASE_S, clock=lambda: now)
    gate._ledgers._desk._ledger = clocked  # type: ignore[attr-defined]
    for _ in range(4_000):
        now += 0.001
        if gate.ask("u", "h", now) == 0.0:
            starts.append(now)
            gate.done("h", now)
    assert len(starts) == pytest.approx(40, abs=3)
    assert min(after - before for before, after in pairwise(starts)) > 0.09


def test_a_hosts_wish_holds_from_the_first_request_that_knows_it() -> None:
    settings = config()
    gate = Turnstile(LocalLedgers(settings), settings)
    assert gate.ask("http://h/robots.txt", "h", 10.0) == 0.0
    gate.done("h", 10.1)
    answers = [gate.ask(url, "h", 10.1, 60.0) for url in ("a", "b")]
    assert answers[0] == 0.0
    assert answers[1] != 0.0


def test_a_retry_after_holds_for_every_task() -> None:
    settings = config("fetch.max_wait_s=60")
    ledgers = LocalLedgers(settings)
    first, second = Politeness(settings, ledgers), Politeness(settings, ledgers)
    for host, seconds in (("short", 40.0), ("long", 400.0)):
        assert first.ask(f"http://{host}/1", host, 10.0) == 0.0
        first.done(host, Ended(reason="http_429", http_status=429, retry_after_s=seconds), 10.1)
    answers = {host: [second.ask(f"http://{host}/2", host, now) for now in (10.2, 10.3)] for host in ("short", "long")}
    assert all(isinstance(answer, float) and answer > 0 for answer in answers["short"])
    refusal = answers["long"][1]
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.rule) == ("host_unavailable", "retry-after")


def test_news_of_a_retry_after_survives_a_call_that_fails() -> None:
    settings = config()
    ledgers = SlowLedgers(settings)
    gate = Turnstile(ledgers, settings)
    gate.ask("u", "h", 10.0)
    gate.ask("u", "h", 10.002)
    ledgers.answer()
    assert gate.ask("u", "h", 10.01) == 0.0
    gate.done("h", 10.02, closed_s=5.0)
    gate.tick(10.2)
    ledgers.fail()
    for now in (10.4, 11.0):
        gate.tick(now)
    [(_, message, _)] = ledgers.calls
    assert message.asks["h"].closed_s == pytest.approx(4.02)
    assert gate.ask("u", "h", 15.0) != 0.0


def test_ended_requests_free_their_place() -> None:
    settings = config("fetch.connections_per_host=1")
    polite = Politeness(settings, LocalLedgers(settings))
    assert polite.ask("http://h/1", "h", 10.0) == 0.0
    assert polite.ask("http://h/2", "h", 10.0) != 0.0
    polite.done("h", Ended(reason=None, http_status=200, retry_after_s=None), 10.1)
    assert polite.ask("http://h/2", "h", 10.1) == 0.0


def test_times_are_in_proportion() -> None:
    """A turn is shorter than a lease, and waiters ask more often than they are forgotten."""
    assert TURN_S < LEASE_S
    assert IDLE_S < TURN_S
