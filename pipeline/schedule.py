"""Downloads that wait: for their host's turn, for a back-off to pass, or only for a free transfer."""

from collections import deque
from collections.abc import Callable

from pipeline.agenda import Agenda
from pipeline.config import FetchConfig
from pipeline.host_queue import HostQueue
from pipeline.job import Job
from pipeline.reasons import Reason


class Schedule:
    """`ready` are jobs that may begin, as far as their hosts are known here. Times are of time.monotonic().

    park: ends a job whose host has been given up.
    """

    def __init__(self, config: FetchConfig, park: Callable[[Job, Reason, str], None]) -> None:
        self._config = config
        self._park = park
        self._hosts: dict[str, HostQueue] = {}
        self._backing_off = Agenda[Job]()
        self._alarms = Agenda[HostQueue]()
        self.ready: deque[Job] = deque()

    @property
    def has_due(self) -> bool:
        """Whether some job goes on by itself, without its host."""
        return bool(self.ready or self._backing_off)

    def host(self, name: str) -> HostQueue:
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = HostQueue(name=name)
        return host

    def hosts_waited_for(self) -> list[HostQueue]:
        return [host for host in self._hosts.values() if host.waiting]

    def queue(self, job: Job, host: HostQueue, now: float) -> None:
        """Let a job wait for its host, those last that only the user wants."""
        if job.is_needed:
            host.waiting.appendleft(job)
        else:
            host.waiting.append(job)
        if host.not_before > now:
            self.look_at(host, host.not_before)

    def put_off(self, job: Job, due: float) -> None:
        """Make a job ready at a time."""
        self._backing_off.add(due, job)

    def look_at(self, host: HostQueue, due: float) -> None:
        """See at a time whether the next one who waits for a host may go on."""
        if host.alarm is None or due < host.alarm:
            host.alarm = due
            self._alarms.add(due, host)

    def advance(self, host: HostQueue, now: float) -> None:
        """Let the next one who waits for a host go on, or look again when that may be possible."""
        if host.given_up:
            while host.waiting:
                self._park(host.waiting.popleft(), *host.given_up)
        elif job := host.next(self._config, now):
            self.ready.appendleft(job)
        elif host.waiting and host.not_before > now:
            self.look_at(host, host.not_before)

    def bring_back(self, now: float) -> None:
        """Make ready what has waited long enough."""
        while job := self._backing_off.pop_due(now):
            self.ready.append(job)
        while host := self._alarms.pop_due(now):
            host.alarm = None
            self.advance(host, now)

    def wait_s(self, most_s: float, now: float) -> float:
        """Seconds until something is due, at least 0 and at most `most_s`."""
        return self._alarms.wait_s(self._backing_off.wait_s(most_s, now), now)
