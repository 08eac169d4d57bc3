"""What becomes of a picture on its way through the web: pure functions from a picture to an encoded file."""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

Draw = np.random.Generator
Transform = Callable[[Image.Image, Draw], bytes]
QUALITY = 85
"""of the JPEG that everything but the re-encodings is written as"""
WORDS = "the quick brown fox jumps over a lazy dog while nobody is watching from that window"


def encoded(image: Image.Image, format: str = "JPEG", quality: int = QUALITY) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, quality=quality)
    return buffer.getvalue()


def compress(image: Image.Image, draw: Draw, *, format: str, quality: int) -> bytes:
    return encoded(image, format, quality)


def scale(image: Image.Image, draw: Draw, *, width: float, height: float) -> bytes:
    size = (max(1, round(image.width * width)), max(1, round(image.height * height)))
    return encoded(image.resize(size, Image.Resampling.LANCZOS))


def crop(image: Image.Image, draw: Draw, *, share: float) -> bytes:
    """`share` of the width and of the height cut away, what stays is anywhere."""
    width, height = round(image.width * (1 - share)), round(image.height * (1 - share))
    left, top = draw.integers(image.width - width + 1), draw.integers(image.height - height + 1)
    return encoded(image.crop((int(left), int(top), int(left) + width, int(top) + height)))


def rotate(image: Image.Image, draw: Draw, *, degrees: float) -> bytes:
    """Turned either way inside its frame; the corners are white."""
    angle = degrees if draw.integers(2) else -degrees
    return encoded(image.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white"))


def mirror(image: Image.Image, draw: Draw) -> bytes:
    return encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def band(image: Image.Image, draw: Draw) -> bytes:
    """A caption in white on a black band over the lowest 12 % of the picture."""
    image, canvas = _canvas(image)
    height = round(image.height * 0.12)
    canvas.rectangle((0, image.height - height, image.width, image.height), fill="black")
    canvas.text((image.width / 2, image.height - height / 2), _phrase(draw, 5), "white", _font(image), anchor="mm")
    return encoded(image)


def letters(image: Image.Image, draw: Draw) -> bytes:
    """Two lines of outlined letters over the picture, at its top and its bottom."""
    image, canvas = _canvas(image)
    for place, anchor in ((0.03, "ma"), (0.97, "md")):
        where = (image.width / 2, image.height * place)
        outline = max(1, image.width // 150)
        canvas.text(
            where, _phrase(draw, 4), "white", _font(image), anchor=anchor, stroke_width=outline, stroke_fill="black"
        )
    return encoded(image)


def enhance(image: Image.Image, draw: Draw, *, kind: str, factor: float) -> bytes:
    """Brightness, Contrast or Color (saturation) times `factor`, as Pillow's ImageEnhance has it."""
    return encoded(getattr(ImageEnhance, kind)(image).enhance(factor))


def turn_hue(image: Image.Image, draw: Draw, *, degrees: float) -> bytes:
    pixels = np.asarray(image.convert("HSV")).copy()
    pixels[:, :, 0] += np.uint8(round(degrees / 360 * 256))
    return encoded(Image.fromarray(pixels, "HSV").convert("RGB"))


def _canvas(image: Image.Image) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = image.copy()
    return image, ImageDraw.Draw(image)


def _phrase(draw: Draw, num_words: int) -> str:
    return " ".join(draw.permutation(WORDS.split())[:num_words])


def _font(image: Image.Image) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=max(8.0, image.width / 18))


TRANSFORMS: dict[str, Transform] = {
    **{f"jpeg_q{quality}": partial(compress, format="JPEG", quality=quality) for quality in (90, 75, 50, 30)},
    **{f"webp_q{quality}": partial(compress, format="WEBP", quality=quality) for quality in (80, 30)},
    "resize_to_half": partial(scale, width=0.5, height=0.5),
    "resize_to_quarter": partial(scale, width=0.25, height=0.25),
    "squeeze_10": partial(scale, width=0.9, height=1.0),
    **{f"crop_{percent}": partial(crop, share=percent / 100) for percent in (2, 5, 10, 20)},
    **{f"rotate_{degrees}": partial(rotate, degrees=degrees) for degrees in (1, 2, 5, 10)},
    "mirror": mirror,
    "caption_band": band,
    "caption_letters": letters,
    "darker": partial(enhance, kind="Brightness", factor=0.7),
    "brighter": partial(enhance, kind="Brightness", factor=1.3),
    "less_contrast": partial(enhance, kind="Contrast", factor=0.7),
    "more_contrast": partial(enhance, kind="Contrast", factor=1.3),
    "grey": partial(enhance, kind="Color", factor=0.0),
    "hue_30": partial(turn_hue, degrees=30),
}
