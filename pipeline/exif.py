"""EXIF tags as img2dataset writes them: JSON of exifread's names and printed values."""

import io
import json
import logging

import exifread

logging.getLogger("exifread").setLevel(logging.CRITICAL)  # it complains of every image without tags


def exif_json(body: bytes) -> str | None:
    """The tags of a downloaded image, "{}" when there are none, None when they cannot be read."""
    try:
        tags = exifread.process_file(io.BytesIO(body), details=False)
        return json.dumps({name: str(value).strip() for name, value in tags.items() if value is not None})
    except Exception:  # damaged tags lead it anywhere
        return None
