"""A place whose library is not installed is refused before any work, with what to install."""

import sys
from pathlib import Path

import fsspec.registry  # noqa: F401
import pytest

from cluster.errors import RequestError
from cluster.run import open_store
from pipeline.__main__ import main

LIBRARIES = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
    "abfs": ("adlfs", "azure"),
    "hf": ("huggingface_hub", "hf"),
}


@pytest.mark.parametrize("protocol", LIBRARIES)
def test_output_and_input_name_the_extra(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library, extra = LIBRARIES[protocol]
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["build", f"input={protocol}://a/list.csv", f"output={tmp_path}"]) == 2
    assert main(["verify", f"{protocol}://a/b"]) == 2
    told = capsys.readouterr().err
    assert told.count(f"pip install 'pairmill[{extra}]'") == 2
    assert "Traceback" not in told
    with pytest.raises(RequestError, match=rf"output={protocol}://a/b: .*pairmill\[{extra}\]"):
        open_store(f"{protocol}://a/b")
