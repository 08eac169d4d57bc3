"""What can be wrong with a run's folder: one finding, and whether a file is what it should be."""

import hashlib
from dataclasses import dataclass

from cluster.store import Store
from pipeline.manifest import FileInfo

CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong: the file, in what way, and the (stage, unit) that makes it, None where none does."""

    path: str
    problem: str
    unit: tuple[str, str] | None = None


def file_problem(store: Store, file: FileInfo) -> str:
    """What is wrong with a file's existence, size or hash; empty if nothing."""
    digest, size_bytes = hashlib.sha256(), 0
    try:
        with store.open(file.path) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                size_bytes += len(chunk)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error}"
    if size_bytes != file.size_bytes:
        return f"has {size_bytes:,} bytes, should have {file.size_bytes:,}"
    if digest.hexdigest() != file.sha256:
        return f"sha256 differs: is {digest.hexdigest()[:16]}..., should be {file.sha256[:16]}..."
    return ""
