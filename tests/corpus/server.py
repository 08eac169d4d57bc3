"""A web server with what a web list really has, on loopback addresses only.

    python tests/corpus/server.py --port 0

prints the port on its first line and serves `http://127.0.1.<1..16>:<port>/<kind>/<picture>` until it is stopped. An
answer depends on the URL alone, but for `flaky`, which fails the first time that a URL is asked for.
"""

import argparse
import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from aiohttp import web
from variants import KINDS, content_type, variant

HOSTS = tuple(f"127.0.1.{number}" for number in range(1, 17))
CLOSED_HOST = "127.0.1.99"  # nobody listens here: connections are refused
STATUSES = {"missing": 404, "gone": 410, "denied": 403, "broken": 500}
REDIRECTS = {"moved": (301, "img"), "found": (302, "moved"), "temporary": (307, "found"), "loop": (302, "loop")}
PAGE = b"<!DOCTYPE html><html><head><title>Not here</title></head><body><p>This picture has moved.</p></body></html>"
SLOW_S = (0.3, 1.0)
NEVER_S = 30.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_asked: Counter[str] = Counter()


async def picture(request: web.Request) -> web.StreamResponse:
    """A body that arrives whole."""
    return _body(request, request.match_info["kind"])


async def status(request: web.Request) -> web.StreamResponse:
    """An error page."""
    return web.Response(status=STATUSES[request.match_info["kind"]], body=PAGE, content_type="text/html")


async def redirect(request: web.Request) -> web.StreamResponse:
    """To the next hop; `loop` to itself."""
    code, kind = REDIRECTS[request.match_info["kind"]]
    return web.Response(status=code, headers={"Location": f"/{kind}/{request.match_info['path']}"})


async def page(request: web.Request) -> web.StreamResponse:
    """HTML with status 200 under a picture's name and type, as parked domains do."""
    return web.Response(body=PAGE, content_type="image/jpeg")


async def empty(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b"", content_type="image/jpeg")


async def short(request: web.Request) -> web.StreamResponse:
    """A body that ends before its announced length."""
    body = variant("img", request.match_info["path"])
    response = web.StreamResponse(headers={"Content-Length": str(len(body)), "Content-Type": "image/webp"})
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    if request.transport:
        request.transport.close()
    return response


async def flaky(request: web.Request) -> web.StreamResponse:
    """503 once, then the picture."""
    _asked[request.path] += 1
    if _asked[request.path] == 1:
        return web.Response(status=503, body=b"busy")
    return _body(request, "img")


async def slow(request: web.Request) -> web.StreamResponse:
    """The picture, after a wait that depends on its name."""
    least, most = SLOW_S
    await asyncio.sleep(least + (most - least) * (sum(request.path.encode()) % 10) / 10)
    return _body(request, "img")


async def never(request: web.Request) -> web.StreamResponse:
    """No answer within any sensible time."""
    await asyncio.sleep(NEVER_S)
    return _body(request, "img")


SPECIAL: dict[str, Handler] = {
    "page": page,
    "empty": empty,
    "short": short,
    "flaky": flaky,
    "slow": slow,
    "never": never,
}


async def answer(request: web.Request) -> web.StreamResponse:
    """Choose by the first part of the path."""
    kind = request.match_info["kind"]
    if kind in KINDS:
        return await picture(request)
    if kind in STATUSES:
        return await status(request)
    if kind in REDIRECTS:
        return await redirect(request)
    if kind in SPECIAL:
        return await SPECIAL[kind](request)
    raise web.HTTPNotFound


def _body(request: web.Request, kind: str) -> web.Response:
    try:
        body = variant(kind, request.match_info["path"])
    except KeyError:
        raise web.HTTPNotFound from None
    return web.Response(body=body, content_type=content_type(request.match_info["path"]))


async def serve(port: int) -> None:
    """Listen on every host at one port (0: a free one), print it, and serve until cancelled."""
    app = web.Application()
    app.router.add_get("/{kind}/{path:.+}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    for host in HOSTS:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        port = listener.getsockname()[1]
        await web.SockSite(runner, listener).start()
    print(port, flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def start_server() -> Iterator[int]:
    """The server in a process of its own; gives its port. It stops at the end, or when this process is killed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--port", "0", "--until-stdin-closes"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the corpus server ended with status {process.wait()}")
        yield int(line)
    finally:
        process.terminate()
        process.communicate()


def _exit_with_stdin() -> None:
    """The pipe's other end closes even where its owner is killed."""
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on every host; 0: a free one")
    parser.add_argument("--until-stdin-closes", action="store_true", help="stop when the standard input ends")
    arguments = parser.parse_args()
    if arguments.until_stdin_closes:
        threading.Thread(target=_exit_with_stdin, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(arguments.port))


if __name__ == "__main__":
    main()
