"""Writing tar files whose bytes depend on nothing but the members: no times, owners or modes of this machine."""

import tarfile
from pathlib import Path
from types import TracebackType

_BLOCK = 512
_RECORD = 20 * _BLOCK  # tar's default blocking factor; the file's size is a multiple of it
_NAME_BYTES, _SIZE, _SUM, _MOST_BYTES = 100, slice(124, 135), slice(148, 154), 8**11


class TarWriter:
    """A plain ustar file, written front to back. `add` says where a member's data begins."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._position = 0

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        self._file.close()

    def add(self, name: str, data: bytes) -> int:
        """Append a regular file; returns the offset of its first data byte in the tar."""
        header = _header(name, len(data))
        offset = self._position + len(header)
        padding = bytes(-len(data) % _BLOCK)
        for part in (header, data, padding):
            self._file.write(part)
            self._position += len(part)
        return offset

    def finish(self) -> None:
        """Write the end-of-archive blocks."""
        end = bytes(2 * _BLOCK + -(self._position + 2 * _BLOCK) % _RECORD)
        self._file.write(end)
        self._position += len(end)


def _header(name: str, size: int) -> bytes:
    """What `_any_header` gives: a name and a size put into the header of an empty file, a tenth of the work."""
    if not name.isascii() or len(name) > _NAME_BYTES or size >= _MOST_BYTES:
        return _any_header(name, size)
    name_bytes, size_digits = name.encode(), b"%011o" % size
    header = bytearray(_EMPTY)
    header[: len(name_bytes)] = name_bytes
    header[_SIZE] = size_digits
    header[_SUM] = b"%06o" % (_EMPTY_SUM + sum(name_bytes) + sum(size_digits))
    return bytes(header)


def _any_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


_EMPTY = _any_header("", 0)
_EMPTY_SUM = int(_EMPTY[_SUM], 8) - sum(_EMPTY[_SIZE])
