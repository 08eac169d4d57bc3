"""docs/bad-requests.md is what the command really says: every block in it is run and compared.

`python tests/cluster/test_bad_requests.py` writes the answers into the page anew.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "bad-requests.md"
BLOCK = re.compile(r"```console\n\$ (pairmill .*)\n((?:.*\n)*?)```")


def prepare(folder: Path) -> None:
    """The files that the page's requests speak of, and a build that ended without a dataset."""
    rows = {"url": ["http://127.0.0.1:9/a.jpg", "http://127.0.0.1:9/b.jpg"], "caption": ["a cat", "a dog"]}
    pq.write_table(pa.table(rows), folder / "urls.parquet")
    (folder / "links.csv").write_text("link,text\nhttp://127.0.0.1:9/a.jpg,a cat\n")
    (folder / "broken.parquet").write_bytes(b"<html>404</html>" * 100)
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").write_bytes(b"\xff\xd8\xff")
    ask("pairmill build input=urls.parquet output=runs/old ray.address=inline fetch.retries=0", folder)


def ask(request: str, folder: Path) -> tuple[int, str]:
    """Run a request in `folder`; returns its exit status and what it said, with the folder's path left out."""
    words = request.split()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cluster.cli", *words[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    said = done.stderr + done.stdout
    return done.returncode, said.replace(f"{folder.resolve()}/", "").replace(str(folder.resolve()), ".")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requests")
    prepare(folder)
    return folder


@pytest.mark.parametrize(("request_line", "answer"), BLOCK.findall(PAGE.read_text(encoding="utf-8")))
def test_the_page_shows_what_the_command_says(request_line: str, answer: str, folder: Path) -> None:
    before = sorted(path for path in folder.rglob("*"))
    status, said = ask(request_line, folder)
    assert (status, said) == (2, answer)
    assert sorted(path for path in folder.rglob("*")) == before, "a refused request leaves nothing behind"


def test_the_page_shows_at_least_ten_kinds() -> None:
    assert len(BLOCK.findall(PAGE.read_text(encoding="utf-8"))) >= 10


def rewrite() -> None:
    """Put the present answers into the page."""
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(
            BLOCK.sub(lambda match: f"```console\n$ {match[1]}\n{ask(match[1], Path(name))[1]}```", text),
            encoding="utf-8",
        )


if __name__ == "__main__":
    rewrite()
