"""Headers of the files we write are those of the standard library, whatever the name and the size."""

import tarfile

import pytest

from pipeline.tar import _header


@pytest.mark.parametrize("name", ["", "a.jpg", "x" * 100, "d" * 90 + "/" + "x" * 90, "bild-ü.png"])
@pytest.mark.parametrize("size", [0, 1, 511, 10**6, 8**11 - 1])
def test_headers_are_those_of_the_standard_library(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert _header(name, size) == member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
