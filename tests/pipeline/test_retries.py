from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from pipeline.backoff import backoff_s, retry_after_s
from pipeline.config import FetchConfig
from pipeline.host_queue import HostQueue
from pipeline.job import Job

CONFIG = FetchConfig(host_failures=3, retries=2, backoff_s=1, max_wait_s=20, connections_per_host=4)
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def jobs(number: int) -> list[Job]:
    return [Job(index=index, start_url=f"http://a.example/{index}", max_bytes=1) for index in range(number)]


def test_waits_double_and_differ_by_url_but_not_by_moment() -> None:
    for attempts in (1, 2, 3):
        waits = [backoff_s(1.0, f"http://a.example/{number}", attempts) for number in range(100)]
        assert waits == [backoff_s(1.0, f"http://a.example/{number}", attempts) for number in range(100)]
        assert 2 ** (attempts - 1) / 2 <= min(waits) < max(waits) <= 2 ** (attempts - 1)
        assert len(set(waits)) == 100
    assert backoff_s(1.0, "http://a.example/", 30) <= 60


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        ("Sunday, 01-Mar-26 12:00:10 GMT", 10.0),
        ("Sun Mar  1 12:00:05 2026", 5.0),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0.0),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("1e3", None),
        ("9" * 400, float("inf")),
        ("Sun, 01 Mar 99999999999999999999 12:00:00 GMT", None),
        ("Sun, 01 Mar 2026 12:00:00 +99999999999999", None),
    ],
)
def test_retry_after_is_read_as_seconds_and_as_a_date(value: str, seconds: float | None) -> None:
    assert retry_after_s(value, NOW) == seconds


def test_failures_in_a_row_open_the_breaker_and_one_success_closes_it() -> None:
    host = HostQueue(name="a.example")
    host.waiting.extend(jobs(9))
    for _ in range(2):
        host.failed("http_503", CONFIG, 0.0)
    host.failed("http_404", CONFIG, 0.0)  # an answer: the count begins anew
    for _ in range(3):
        assert host.next(CONFIG, 0.0) is not None
        host.failed("http_503", CONFIG, 0.0)
    assert host.next(CONFIG, 0.5) is None  # open, cooling down
    assert host.next(CONFIG, 1.0) is not None  # the probe
    host.num_active = 1
    assert host.next(CONFIG, 1.0) is None  # one at a time
    host.num_active = 0
    host.succeeded()
    assert not host.is_open
    assert host.next(CONFIG, 1.0) is not None
    assert host.given_up is None


def test_probes_wait_longer_each_time_and_then_the_host_is_given_up() -> None:
    host = HostQueue(name="a.example")
    for _ in range(5):  # five were under way at once: one pause, not five
        host.failed("connection_failed", CONFIG, 0.0)
    assert host.not_before == 1.0
    host.failed("connection_failed", CONFIG, 1.0)
    assert host.not_before == 3.0
    host.failed("connection_failed", CONFIG, 3.0)
    assert (host.not_before, host.given_up) == (7.0, None)
    host.failed("connection_failed", CONFIG, 7.0)
    assert host.given_up is not None


def test_a_timeout_of_a_host_that_never_answered_opens_the_breaker_at_once() -> None:
    dead, slow = HostQueue(name="dead.example"), HostQueue(name="slow.example", has_answered=True)
    for host in (dead, slow):
        host.failed("timeout", CONFIG, 0.0)
    assert (dead.is_open, dead.is_down) == (True, True)
    assert (slow.is_open, slow.is_down) == (False, False)


def test_a_unit_is_busy_with_a_host_for_so_long_and_no_longer() -> None:
    config = CONFIG.model_copy(update={"max_busy_s": 60})
    host = HostQueue(name="a.example")
    for start in (0.0, 100.0, 200.0):  # two requests side by side, 19 s, three times
        for request in (0, 1):
            host.begin(start + request)
        for request in (0, 1):
            host.end(config, start + request + 19)
            host.succeeded()
    assert (host.busy_s, host.given_up) == (60.0, None)
    host.begin(300.0)
    host.end(config, 301.0)
    assert host.given_up == ("host_unavailable", "not asked again: has kept the unit busy for 61 s")


def test_waits_asked_for_add_up_to_the_limit() -> None:
    host = HostQueue(name="a.example")
    host.pause(15, CONFIG, 0.0)
    host.pause(10, CONFIG, 1.0)  # within the first
    assert (host.not_before, host.given_up) == (15.0, None)
    host.pause(10, CONFIG, 15.0)
    assert host.given_up is not None
    assert "25 s" in host.given_up[1]
