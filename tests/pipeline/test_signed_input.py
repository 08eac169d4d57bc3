"""A list behind a signed URL is read, and the signature is nowhere in the run's files or in what is printed."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main

SIGNED = "list.csv?X-Amz-Algorithm=AWS4&X-Amz-Credential=SECRETKEY&X-Amz-Date={date}&X-Amz-Signature=SECRET{date}"


@pytest.fixture
def bucket(url_list: Path) -> Iterator[str]:
    """A server of the list's folder, which does not look at the query."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            """Quiet."""

    handler = functools.partial(Quiet, directory=str(url_list.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_signatures_are_not_kept_and_a_new_one_resumes(
    bucket: str, dataset: Path, words: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    urls = [f"{bucket}/{SIGNED.format(date=date)}" for date in (1, 2)]
    assert main(["build", *words(out, f"input={urls[0]}")]) == 0
    assert (out / "shards/00000.tar").read_bytes() == (dataset / "shards/00000.tar").read_bytes()
    assert main(["build", *words(out, f"input={urls[1]}")]) == 0, "signed anew, it is the same list"
    assert main(["build", *words(out, f"input={urls[1]}".replace("list.csv", "other.csv"))]) != 0
    told = capfd.readouterr()
    assert "already done" in told.out
    kept = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert b"list.csv" in kept
    assert b"SECRET" not in kept
    assert "SECRET" not in told.out + told.err
