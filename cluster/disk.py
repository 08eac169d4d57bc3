"""A disk that is full, said so that somebody can do something about it."""

import errno
import shutil
import tempfile
from pathlib import Path

from cluster.errors import RunError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no space left, or none left for this user."""
    return isinstance(error, OSError) and error.errno in _FULL


def full_disk(*folders: str | Path) -> RunError:
    """The error that names the fullest disk of those that were written to: `folders`, and the temporary files'."""
    places = {str(folder): _nearest(Path(folder)) for folder in (*folders, tempfile.gettempdir())}
    usage = {folder: shutil.disk_usage(place) for folder, place in places.items()}
    fullest = min(usage, key=lambda folder: usage[folder].free)
    size_mib = usage[fullest].total / 2**20
    other = ", or set TMPDIR to a folder on a larger one" if fullest not in map(str, folders) else ""
    return RunError(
        f"no space left on the disk of {fullest} ({size_mib:,.1f} MiB in all): make room there{other}; what is "
        "finished is kept, run the same command again to go on"
    )


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())
