"""Pictures as the web serves them: the corpus's own, re-encoded, damaged, or of an odd kind. Pure functions."""

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from corpus import read_images
from PIL import Image

CONTENT_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif"}


def content_type(path: str) -> str:
    return CONTENT_TYPES.get(path.rsplit(".", 1)[-1], "application/octet-stream")


@lru_cache(maxsize=4096)
def variant(kind: str, path: str) -> bytes:
    """The body for a picture's path under one of KINDS. Raises KeyError for an unknown kind or picture."""
    return KINDS[kind](read_images()[path])


def _opened(data: bytes) -> Image.Image:
    """The picture as RGB on white."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _near(data: bytes) -> bytes:
    return _encoded(_opened(data).resize((112, 112), Image.Resampling.LANCZOS), "JPEG", quality=80)


def _tiny(data: bytes) -> bytes:
    return _encoded(_opened(data).resize((24, 24), Image.Resampling.LANCZOS), "PNG")


def _wide(data: bytes) -> bytes:
    banner = Image.new("RGB", (640, 96), "white")
    banner.paste(_opened(data).resize((96, 96)), (20, 0))
    return _encoded(banner, "JPEG", quality=85)


def _blank(data: bytes) -> bytes:
    colour = tuple(int(value) for value in np.asarray(_opened(data)).reshape(-1, 3).mean(axis=0))
    return _encoded(Image.new("RGB", (128, 128), colour), "PNG")


def _animated(data: bytes) -> bytes:
    frames = [_opened(data).rotate(angle, fillcolor="white") for angle in (0, 10, 20)]
    return _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=80)


def _exif_rotated(data: bytes) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side, to be turned a quarter clockwise
    turned = _opened(data).transpose(Image.Transpose.ROTATE_90)
    return _encoded(turned, "JPEG", quality=90, exif=exif.tobytes())


def _cmyk(data: bytes) -> bytes:
    return _encoded(_opened(data).convert("CMYK"), "JPEG", quality=90)


def _palette(data: bytes) -> bytes:
    return _encoded(_opened(data).quantize(32), "PNG")


def _gray16(data: bytes) -> bytes:
    gray = np.asarray(_opened(data).convert("L")).astype(np.uint16) * 257
    return _encoded(Image.fromarray(gray), "PNG")


def _cut(data: bytes) -> bytes:
    """A JPEG whose last third is missing, as a broken upload leaves it."""
    whole = _encoded(_opened(data), "JPEG", quality=90)
    return whole[: len(whole) * 2 // 3]


KINDS: dict[str, Callable[[bytes], bytes]] = {
    "img": bytes,
    "copy": bytes,
    "near": _near,
    "tiny": _tiny,
    "wide": _wide,
    "blank": _blank,
    "gif": _animated,
    "exif": _exif_rotated,
    "cmyk": _cmyk,
    "palette": _palette,
    "gray16": _gray16,
    "cut": _cut,
}
