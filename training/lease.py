"""One command at a time on a run's folder: two would clear each other's files.

On a local disk the sign is a lock on `running.json`, which the operating system drops when its holder dies. An object
store has no locks: there leases are numbered files, `running/000001.json`. The greatest number holds. Its holder renews
it; when it was given back, or not renewed for `STALE_S`, the next number may be created, which exactly one of those who
try can do. Numbers only grow: the last file stays, or else a latecomer could create a number that was held before.
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.errors import RequestError
from cluster.store import Store

logger = logging.getLogger(__name__)

LEASE_FILE = "running.json"
LEASE_FOLDER = "running"
RENEW_S, STALE_S = 10.0, 60.0


@contextlib.contextmanager
def hold(store: Store) -> Iterator[None]:
    """Be the only one who works in this folder. Raises RequestError when another command does."""
    with _locked(store) if store.is_local else _renewed(store):
        yield


@contextlib.contextmanager
def _locked(store: Store) -> Iterator[None]:
    path = Path(store.full(LEASE_FILE))
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refusal(store, _parsed(file.read())) from None
        except OSError as error:  # a file system without locks
            logger.warning("%s: no locks here (%s); do not start two commands on this folder", path, error)
        file.truncate(0)
        file.write(json.dumps(_sign()))
        file.flush()
        yield


@contextlib.contextmanager
def _renewed(store: Store) -> Iterator[None]:
    number = _newest(store)
    if number and _is_alive(found := _read(store, number)):
        raise _refusal(store, found)
    number += 1
    sign = _sign()
    if not store.create(_path(number), json.dumps(sign).encode()):
        raise _refusal(store, _read(store, number))
    if (newest := _newest(store)) != number:  # ours is a number that was held before: we have been slow
        store.remove(_path(number))
        raise _refusal(store, _read(store, newest))
    for old in (entry.path for entry in store.find(LEASE_FOLDER) if entry.path < _path(number)):
        store.remove(old)
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(store, number, sign, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _newest(store) == number:
            store.write_bytes(_path(number), json.dumps(sign | {"renewed": 0.0}).encode())


def _renew(store: Store, number: int, sign: dict[str, Any], ended: threading.Event) -> None:
    """Say now and then that we are here. If we could not for so long that another has taken over, we end."""
    while not ended.wait(RENEW_S):
        with contextlib.suppress(Exception):  # a store that is away for a moment: the next turn tries again
            if _newest(store) > number:
                logger.error("%s: taken over by another command, as nothing was heard of this one; ending", store.url)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            store.write_bytes(_path(number), json.dumps(sign | {"renewed": time.time()}).encode())


def _newest(store: Store) -> int:
    """The number that holds, 0 if there never was one."""
    names = [entry.path.rpartition("/")[2].removesuffix(".json") for entry in store.find(LEASE_FOLDER)]
    return max((int(name) for name in names if name.isdigit()), default=0)


def _path(number: int) -> str:
    return f"{LEASE_FOLDER}/{number:06}.json"


def _read(store: Store, number: int) -> dict[str, Any]:
    try:
        return _parsed(store.read_bytes(_path(number)).decode())
    except FileNotFoundError:
        return {}


def _sign() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex, "renewed": time.time()}


def _is_alive(sign: dict[str, Any]) -> bool:
    """Whether a holder is still at work, as far as can be seen from here."""
    if sign.get("host") == socket.gethostname() and sign.get("pid") != os.getpid():
        try:
            os.kill(int(sign["pid"]), 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it is there, and another user's
            pass
    return time.time() - float(sign.get("renewed", 0)) < STALE_S


def _parsed(text: str) -> dict[str, Any]:
    try:
        loaded = json.loads(text)
    except ValueError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _refusal(store: Store, sign: dict[str, Any]) -> RequestError:
    who = f"process {sign['pid']} on {sign['host']}" if {"pid", "host"} <= sign.keys() else "another process"
    wait = "" if store.is_local else f" (if it was killed: it counts as gone {STALE_S:.0f} s after its last sign)"
    return RequestError(
        f"output={store.url}: {who} is training in this folder; wait for it, stop it, or choose another output{wait}"
    )
