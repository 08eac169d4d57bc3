"""One command at a time on a run's folder: two would clear each other's files.

On a local disk the sign is a lock on `running.json`, which the operating system drops when its holder dies. An object
store has no locks: there the holder renews the file, and one that has not been renewed for `STALE_S` is taken over.
"""

import contextlib
import fcntl
import json
import logging
import os
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
    with contextlib.suppress(FileNotFoundError):
        found = _parsed(store.read_bytes(LEASE_FILE).decode())
        if _is_alive(found):
            raise _refusal(store, found)
        store.remove(LEASE_FILE)
    sign = _sign()
    if not store.create(LEASE_FILE, json.dumps(sign).encode()):
        raise _refusal(store, {})
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with contextlib.suppress(Exception):  # a store that is away for a moment: the next turn tries again
                store.write_bytes(LEASE_FILE, json.dumps(sign | {"renewed": time.time()}).encode())

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        store.remove(LEASE_FILE)


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
