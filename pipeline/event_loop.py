"""libcurl's multi interface driven by epoll: any number of transfers in one thread, no polling of idle ones."""

import contextlib
import os
import resource
import select
import sys
import time
from collections.abc import Iterator

import pycurl

from pipeline.config import FetchConfig

SPARE_FILES = 128
"""Descriptors left to everything that is not a download."""


class EventLoop:
    """libcurl's multi handle, told by epoll which sockets are ready. Connections live as long as the loop."""

    def __init__(self, config: FetchConfig) -> None:
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        max_sockets = max(1, raise_file_limit() - SPARE_FILES)
        self.max_transfers = min(config.connections, max_sockets)
        self._multi.setopt(pycurl.M_MAXCONNECTS, min(config.connections * 2, max_sockets))
        self._multi.setopt(pycurl.M_MAX_HOST_CONNECTIONS, config.connections_per_host)
        self._epoll = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wakeup, select.EPOLLIN)
        self._others: set[int] = set()
        self._due: float | None = None

    def add(self, curl: pycurl.Curl) -> None:
        self._multi.add_handle(curl)

    def remove(self, curl: pycurl.Curl) -> None:
        """Take a handle out; one that was never added (an interrupt came in between) is fine."""
        with contextlib.suppress(pycurl.error):
            self._multi.remove_handle(curl)

    def watch(self, descriptor: int) -> None:
        """Let `step` also end when there is something to read there."""
        self._others.add(descriptor)
        self._epoll.register(descriptor, select.EPOLLIN)

    def wake(self) -> None:
        """End the wait of `step`, now or at its next call. May be called from any thread until `close`."""
        os.eventfd_write(self._wakeup, 1)

    def step(self, timeout_s: float) -> Iterator[tuple[pycurl.Curl, int, str]]:
        """Wait for sockets, the timer or `wake`, act, and yield (handle, error number, message) of those that ended."""
        if self._due is not None:
            timeout_s = max(0.0, min(timeout_s, self._due - time.monotonic()))
        for descriptor, event in self._epoll.poll(timeout_s):
            if descriptor == self._wakeup:
                os.eventfd_read(self._wakeup)
                continue
            if descriptor in self._others:
                continue
            ready = (pycurl.CSELECT_IN if event & ~select.EPOLLOUT else 0) | (
                pycurl.CSELECT_OUT if event & ~select.EPOLLIN else 0
            )
            self._multi.socket_action(descriptor, ready)
        if self._due is not None and self._due <= time.monotonic():
            self._due = None
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        more = 1
        while more:
            more, succeeded, failed = self._multi.info_read()
            for curl, code, text in (*((curl, 0, "") for curl in succeeded), *failed):
                self._multi.remove_handle(curl)
                yield curl, code, text

    def close(self) -> None:
        self._multi.close()
        self._epoll.close()
        os.close(self._wakeup)

    def _watch(self, action: int, descriptor: int, multi: object, data: object) -> None:
        if action == pycurl.POLL_REMOVE:
            with contextlib.suppress(OSError):  # closed sockets have left epoll by themselves
                self._epoll.unregister(descriptor)
            return
        mask = (select.EPOLLIN if action & pycurl.POLL_IN else 0) | (select.EPOLLOUT if action & pycurl.POLL_OUT else 0)
        try:
            self._epoll.modify(descriptor, mask)
        except FileNotFoundError:
            self._epoll.register(descriptor, mask)

    def _set_timer(self, timeout_ms: int) -> None:
        self._due = None if timeout_ms < 0 else time.monotonic() + timeout_ms / 1_000


def raise_file_limit() -> int:
    """Let this process open as many files as it may at all; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    now = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if now == resource.RLIM_INFINITY else now
