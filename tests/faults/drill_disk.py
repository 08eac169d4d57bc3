"""A disk that is really full: the build says which one, and goes on when there is room.

The disk is a tmpfs of a megabyte or so in a mount namespace of the command's own (`unshare -rm`), which ends with it.
"""

import os
import random
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from audit import audit
from drill_build import build_command
from kills import Diary, Figures
from s3_server import BUCKET, s3_server

UNSHARE = ("unshare", "--map-root-user", "--mount", "--kill-child")
FILL = (0.15, 0.85)
SCRATCH_BYTES = 60 * 2**10
SCRIPT = """
set -u
mount -t tmpfs -o size="$SMALL" none "$DISK" || exit 99
"$@" > "$LOG.full" 2>&1
echo $? > "$LOG.full.status"
mount -o remount,size=1g "$DISK" || exit 99
"$@" > "$LOG.room" 2>&1
echo $? > "$LOG.room.status"
cp -r "$DISK" "$COPY"
"""


def can_fill_a_disk() -> bool:
    """Whether this user may mount a small disk that nobody else sees."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tried = subprocess.run(
                [*UNSHARE, "mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return tried.returncode == 0


@dataclass(frozen=True, kw_only=True)
class DiskDrill:
    """Three builds: the output's disk is full early and late, and the worker's scratch disk while the output is S3."""

    seed: int
    limit_s: float = 180.0

    def run(self, folder: Path, reference: Path, url_list: Path, diary: Diary, figures: Figures) -> None:
        """reference: an undisturbed build of the list. Without the right to mount, says so and sets no figure."""
        if not can_fill_a_disk():
            diary.note("skipped: a full disk (this user may not mount a tmpfs: `unshare -rm mount` fails)")
            return
        draw = random.Random(self.seed)
        whole = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
        middle = sum(FILL) / 2
        for when, bounds in {"early": (FILL[0], middle), "late": (middle, FILL[1])}.items():
            disk = _Disk(folder / when, int(whole * draw.uniform(*bounds)))
            said = disk.build_twice(build_command(url_list, disk.path / "out", "inline"), {}, self.limit_s)
            _judge(f"output_{when}", disk, said, str(disk.copy / "out"), reference, url_list, diary, figures)
        with s3_server(folder / "s3") as server:
            disk, output = _Disk(folder / "scratch", SCRATCH_BYTES), f"s3://{BUCKET}/scratch"
            environment = {**server.environment, "TMPDIR": str(disk.path)}
            said = disk.build_twice(build_command(url_list, output, "inline"), environment, self.limit_s)
            os.environ.update(server.environment)
            _judge("scratch", disk, said, output, reference, url_list, diary, figures)


class _Disk:
    """A small disk, as a command sees it at `path`; what is on it at the end is copied to `copy`."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.path, self.copy, self.size_bytes = folder / "mnt", folder / "copy", size_bytes
        self.path.mkdir(parents=True)
        self._log = folder / "log"

    def build_twice(
        self, command: list[str], environment: Mapping[str, str], limit_s: float
    ) -> tuple[tuple[int, str], tuple[int, str]]:
        """Exit status and last line of the command on the full disk, and of the same where there is room."""
        told = {"SMALL": str(self.size_bytes), "DISK": str(self.path), "COPY": str(self.copy), "LOG": str(self._log)}
        subprocess.run(
            [*UNSHARE, "sh", "-c", SCRIPT, "sh", *command],
            env={**os.environ, **environment, **told},
            timeout=limit_s,
            check=True,
        )
        return self._said("full"), self._said("room")

    def _said(self, when: str) -> tuple[int, str]:
        status = int(self._log.with_name(f"log.{when}.status").read_text())
        return status, self._log.with_name(f"log.{when}").read_text().strip().splitlines()[-1]


def _judge(
    name: str,
    disk: _Disk,
    said: tuple[tuple[int, str], tuple[int, str]],
    output: str,
    reference: Path,
    url_list: Path,
    diary: Diary,
    figures: Figures,
) -> None:
    (full_status, message), (room_status, last) = said
    diary.note("disk", name=name, size_bytes=disk.size_bytes, status=full_status, message=message, then=room_status)
    is_clear = full_status == 1 and "no space left on the disk of" in message and str(disk.path) in message
    found = audit({}, output, reference, url_list) if room_status == 0 else None
    figures.set(f"faults.disk.{name}.stopped_clearly", is_clear)
    figures.set(f"faults.disk.{name}.lost", found.num_lost if found else -1, "rows")
    figures.set(f"faults.disk.{name}.identical", found is not None and not found.differing)
    figures.promise(is_clear, f"disk {name}: on a full disk the build ended with {full_status}: {message}")
    figures.promise(found is not None, f"disk {name}: with room again it ended with {room_status}: {last}")
    figures.promise(found is None or not found.differing, f"disk {name}: other bytes")
