"""Writing tar files whose bytes depend on nothing but the members: no times, owners or modes of this machine."""

import tarfile
from pathlib import Path
from types import TracebackType

_BLOCK = 512
_RECORD = 20 * _BLOCK  # tar's default blocking factor; the file's size is a multiple of it


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
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o644
        header = member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
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
