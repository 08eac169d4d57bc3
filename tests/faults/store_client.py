"""One of several writers on a store that is out of order: uses every promise of cluster.store, and tells what it saw.

    python tests/faults/store_client.py URL NAME SEED COUNT

Prints one JSON object: `won` (names that `create` gave to this writer), `wrong` (promises that were broken).
"""

import contextlib
import hashlib
import json
import logging
import random
import sys
import tempfile
from pathlib import Path

from cluster.store import Store

KIB = 2**10


def main() -> int:
    url, name, seed, count = sys.argv[1:]
    logging.getLogger("cluster.remote").setLevel(logging.ERROR)  # its warnings are what is to be expected
    with tempfile.TemporaryDirectory() as folder:
        client = Client(Store(url), name, random.Random(f"{seed} {name}"), Path(folder))
        for number in range(int(count)):
            client.turn(number)
    print(json.dumps({"won": client.won, "wrong": client.wrong}))
    return 0


class Client:
    """`turn` does each kind of operation once and checks what comes back."""

    def __init__(self, store: Store, name: str, draw: random.Random, folder: Path) -> None:
        self.won: list[str] = []
        self.wrong: list[str] = []
        self._store, self._name, self._draw, self._folder = store, name, draw, folder

    def turn(self, number: int) -> None:
        store = self._store
        marker = f"markers/{number:04}"
        if store.create(marker, f"{self._name} {number}".encode()):
            self.won.append(marker)
        data = self._draw.randbytes(self._draw.randrange(1, 600 * KIB))
        local, path = self._folder / "made", f"files/{self._name}/{number:04}"
        local.write_bytes(data)
        store.put_file(local, path)
        self._check(not local.exists(), f"{path}: the local file is still there after it was moved")
        self._check(store.size_bytes(path) == len(data), f"{path}: another size")
        self._check(store.read_bytes(path) == data, f"{path}: other bytes")
        begin = self._draw.randrange(len(data))
        size = min(40 * KIB, len(data) - begin)
        self._check(store.read_range(path, begin, size) == data[begin : begin + size], f"{path}: another range")
        with store.open(path) as file:
            file.seek(begin)
            self._check(file.read(size) == data[begin : begin + size], f"{path}: other bytes through a reader")
        store.get_file(path, self._folder / "copy")
        copied = hashlib.sha256((self._folder / "copy").read_bytes()).digest()
        self._check(copied == hashlib.sha256(data).digest(), f"{path}: the copy differs")
        found = {entry.path: entry.size_bytes for entry in store.find(f"files/{self._name}")}
        self._check(found.get(path) == len(data), f"{path}: not in the listing")
        if number % 3 == 0:
            store.remove(path)
            self._check(not store.exists(path), f"{path}: removed, and still there")
            with contextlib.suppress(FileNotFoundError):
                store.read_bytes(path)
                self._check(False, f"{path}: removed, and can be read")

    def _check(self, is_right: bool, what: str) -> None:
        if not is_right:
            self.wrong.append(what)


if __name__ == "__main__":
    sys.exit(main())
