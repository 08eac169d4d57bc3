"""Sockets for a server that stands for several hosts: loopback addresses, and nothing beyond them."""

import contextlib
import socket

ATTEMPTS = 20


def listen_on_loopback(count: int, backlog: int) -> list[socket.socket]:
    """Sockets that listen on 127.0.0.1, 127.0.0.2, ... at one port. Raises OSError when no port is free on all."""
    for _ in range(ATTEMPTS):
        with contextlib.ExitStack() as stack:
            sockets: list[socket.socket] = []
            try:
                for number in range(1, count + 1):
                    port = sockets[0].getsockname()[1] if sockets else 0
                    sockets.append(
                        stack.enter_context(socket.create_server((f"127.0.0.{number}", port), backlog=backlog))
                    )
            except OSError:  # somebody has the port on one of the addresses
                continue
            stack.pop_all()
            return sockets
    raise OSError(f"no port is free on 127.0.0.1 to 127.0.0.{count}")
