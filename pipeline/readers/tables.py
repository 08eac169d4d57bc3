"""The columns that tables of imported datasets must have, and those that tell something of the image."""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.types as kinds

from cluster.errors import RequestError
from pipeline.readers.sources import Source

IMAGE_SUFFIXES = ("jpg", "png", "webp")
"""Columns with images in img2dataset's format `parquet` are called so."""


def _is_text(kind: pa.DataType) -> bool:
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind))


def _is_whole(kind: pa.DataType) -> bool:
    return bool(kinds.is_integer(kind))


Check = tuple[Callable[[pa.DataType], bool], str]
_TEXT: Check = (_is_text, "text")
_WHOLE: Check = (_is_whole, "whole numbers")

_REQUIRED: dict[str, dict[str, Check]] = {
    "pairmill": {
        **dict.fromkeys(("uid", "url", "caption", "image_format"), _TEXT),
        **dict.fromkeys(("image_offset", "image_size"), _WHOLE),
    },
    "webdataset": {"url": _TEXT, "key": _TEXT},
    "images": {"url": _TEXT, "key": _TEXT},
    "files": {"url": _TEXT, "key": _TEXT},
}
_OPTIONAL: dict[str, Check] = {
    **dict.fromkeys(("caption", "status", "error_message", "sha256"), _TEXT),
    **dict.fromkeys(("original_width", "original_height"), _WHOLE),
}


def require_import_columns(source: Source, schema: pa.Schema) -> None:
    """RequestError, naming the file and the column, unless a table has what importing it takes."""
    required = _REQUIRED[source.format]
    for name, (fits, what) in {**_OPTIONAL, **required}.items():
        if name not in schema.names:
            if name in required:
                raise RequestError(
                    f"{source.name}: no column {name}, without which its images cannot be imported; it has "
                    f"{', '.join(schema.names)}; to download them again, read it as a list with read.format=parquet"
                )
        elif not fits(schema.field(name).type) and not kinds.is_null(schema.field(name).type):
            raise RequestError(f"{source.name}: column {name} holds {schema.field(name).type}, not {what}")
    if source.format == "images":
        image_column(source, schema)


def image_column(source: Source, schema: pa.Schema) -> str:
    """The column with the images. RequestError when there is none."""
    for name in IMAGE_SUFFIXES:
        if name in schema.names and (
            kinds.is_binary(schema.field(name).type) or kinds.is_large_binary(schema.field(name).type)
        ):
            return name
    raise RequestError(
        f"{source.name}: no column of images ({', '.join(IMAGE_SUFFIXES)}: binary), and no tar or folder beside it; it "
        f"has {', '.join(schema.names)}"
    )
