"""The schema of a finished dataset: `manifest.json` and the columns of its shards. Needs neither Ray nor torch.

    manifest.json              this file's `Manifest`
    shards/00000.tar           webdataset form: KEY.jpg KEY.txt KEY.json for each sample, in shard order
    shards/00000.parquet       one row a sample, in the same order: captions, sizes, hashes, the list's own extra
                               columns, and where each member begins in the tar (`image_offset`, `image_size`, ...)
    record/00000.parquet       one row per distinct input pair, kept or dropped, with the reason

A sample can be read without scanning its tar: `read_range(tar, image_offset, image_size)`.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import RequestError
from cluster.store import Store

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1

# Columns that every shard parquet has; the list's extra columns follow them under their own names.
SAMPLE_COLUMNS = (
    "key",  # str: basename of the sample's members in the tar
    "uid",  # str: 32 hex digits, 128-bit hash of (url, caption)
    "url",
    "caption",
    "width",  # int32, pixels as stored
    "height",
    "original_width",
    "original_height",
    "sha256",  # hex, of the bytes as downloaded
    "phash",  # uint64: perceptual hashes of the stored image and of its mirror image
    "phash_mirror",
    "sharpness",  # float32: variance of the Laplacian at a fixed size
    "image_format",  # "jpg", "png" or "webp": also the member's extension
    "image_offset",  # int64: where the member's data begins in the tar
    "image_size",  # int64, bytes
    "caption_offset",
    "caption_size",
)

# What img2dataset's parquet and json have beside the above, with `pack.columns=img2dataset`.
IMG2DATASET_COLUMNS = (
    "status",  # str: "success"; a shard holds nothing else
    "error_message",  # str: null
    "exif",  # str: JSON of the EXIF tags; null if there are none, or unless `image.exif` was set
)


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """One published file, `path` relative to the dataset's folder."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One output shard."""

    index: int
    num_samples: int
    tar: FileInfo
    parquet: FileInfo


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset is. Two builds with the same lists, responses and settings have the same bytes here.

    counts: {"kept": n, reason: n, ...}; its values sum to `num_input_rows`.
    columns: names and Arrow types of the shard parquet's columns, in their order. config: the settings that affect
    results, but for where the lists are.
    sources: one {"path", "size_bytes", "sha256", "num_rows"} per input file.
    repairs: one entry for each `pairmill repair` that found something to do: {"num_rows": input rows tried again,
    "before": {reason: n}, "after": {"kept": n, reason: n, ...}, "first_shard", "num_shards"}.
    """

    version: int
    num_input_rows: int
    num_samples: int
    counts: dict[str, int]
    shards: tuple[Shard, ...]
    columns: dict[str, str]
    config: dict[str, Any]
    sources: tuple[dict[str, Any], ...]
    repairs: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()  # every part has an order of its own

    @staticmethod
    def from_json(data: bytes) -> "Manifest":
        plain: dict[str, Any] = json.loads(data)
        shards = tuple(
            Shard(**{**shard, "tar": FileInfo(**shard["tar"]), "parquet": FileInfo(**shard["parquet"])})
            for shard in plain.pop("shards")
        )
        repairs = tuple(plain.pop("repairs", ()))
        return Manifest(shards=shards, sources=tuple(plain.pop("sources")), repairs=repairs, **plain)


def read_manifest(dataset: str) -> tuple[Store, Manifest]:
    """Open a finished dataset. Raises RequestError when the folder holds none or one of another format version."""
    try:
        store = Store(dataset)
        data = store.read_bytes(MANIFEST_FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(
            f"{dataset}: no finished dataset here (no {MANIFEST_FILE}); build one with "
            f"`pairmill build input=LIST output={dataset}`, or run that again if it was interrupted"
        ) from None
    except (ValueError, ImportError) as error:
        raise RequestError(f"{dataset}: cannot open this location: {error}") from None
    try:
        manifest = Manifest.from_json(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{store.url_of(MANIFEST_FILE)}: not a readable manifest ({error}); remove it and run the "
            "same build command, which makes it again"
        ) from None
    if manifest.version != FORMAT_VERSION:
        raise RequestError(
            f"{store.url_of(MANIFEST_FILE)}: format version {manifest.version}, this pairmill reads {FORMAT_VERSION}"
        )
    return store, manifest
