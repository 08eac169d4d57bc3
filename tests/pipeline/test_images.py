import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.config import ImageConfig
from pipeline.decode import ImageError, sniff
from pipeline.images import process
from pipeline.reasons import Reason

AS_IS = ImageConfig(resize="no", format="png")


def scene(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A smooth colourful picture, the same each time, that is unlike its mirror images."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def refusal(body: bytes, config: ImageConfig = AS_IS) -> Reason:
    with pytest.raises(ImageError) as refused:
        process(body, config)
    return refused.value.reason


RGBA = scene().convert("RGBA")
RGBA.putalpha(Image.linear_gradient("L").resize(RGBA.size))
ON_WHITE = Image.alpha_composite(Image.new("RGBA", RGBA.size, "white"), RGBA).convert("RGB")
GREY = scene().convert("L")
PALETTE = scene().quantize(16)
FRAMES = [scene(seed=seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("body", "expected", "tolerance"),
    [
        # The same libjpeg decodes both; 3: chroma upsampling may differ between builds.
        pytest.param(encode(scene(), "JPEG", quality=95), None, 3, id="jpeg"),
        pytest.param(encode(scene(), "JPEG", quality=95, progressive=True), None, 3, id="progressive jpeg"),
        pytest.param(encode(GREY, "JPEG"), None, 1, id="grey jpeg"),
        pytest.param(encode(scene().convert("CMYK"), "JPEG"), None, 0, id="cmyk jpeg"),
        pytest.param(encode(scene(), "PNG"), scene(), 0, id="png"),
        pytest.param(encode(GREY, "PNG"), GREY, 0, id="grey png"),
        pytest.param(encode(scene().convert("1"), "PNG"), scene().convert("1"), 0, id="1-bit png"),
        pytest.param(encode(RGBA, "PNG"), ON_WHITE, 1, id="png with alpha"),
        pytest.param(encode(PALETTE, "PNG"), PALETTE, 0, id="palette png"),
        pytest.param(encode(scene(), "WEBP", lossless=True), scene(), 0, id="webp"),
        pytest.param(encode(RGBA, "WEBP", lossless=True, exact=True), ON_WHITE, 1, id="webp with alpha"),
        pytest.param(encode(PALETTE, "GIF"), PALETTE, 0, id="gif"),
        pytest.param(encode(scene(), "BMP"), scene(), 0, id="bmp"),
        pytest.param(encode(scene(), "TIFF", compression="tiff_lzw"), scene(), 0, id="tiff"),
        pytest.param(encode(scene(), "AVIF", quality=100), None, 3, id="avif"),
    ],
)
def test_every_kind_of_image_becomes_the_picture_it_shows(
    body: bytes, expected: Image.Image | None, tolerance: int
) -> None:
    result = process(body, AS_IS)
    shown = np.asarray(expected.convert("RGB")).astype(int) if expected else decoded(body)
    assert np.abs(decoded(result.data) - shown).max() <= tolerance
    assert (result.width, result.height, result.is_animated) == (96, 64, False)


def test_16_bit_images_keep_their_brightness() -> None:
    deep = np.asarray(GREY).astype(np.uint16) * 257
    assert (decoded(process(encode(Image.fromarray(deep), "PNG"), AS_IS).data)[:, :, 0] == np.asarray(GREY)).all()
    done, colour = cv2.imencode(".png", np.asarray(scene())[:, :, ::-1].astype(np.uint16) * 257)
    assert done
    assert (decoded(process(bytes(colour), AS_IS).data) == np.asarray(scene())).all()
    done, tiff = cv2.imencode(".tiff", deep)
    assert done
    assert (decoded(process(bytes(tiff), AS_IS).data)[:, :, 0] == np.asarray(GREY)).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    body = encode(scene(), format, exif=exif, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(body)))).astype(int)
    result = process(body, AS_IS)
    assert (result.original_height, result.original_width) == upright.shape[:2]
    assert np.abs(decoded(result.data) - upright).max() <= (3 if format == "JPEG" else 0)


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_of_an_animation_the_first_frame_is_taken(format: str, options: dict[str, Any]) -> None:
    body = encode(FRAMES[0], format, save_all=True, append_images=FRAMES[1:], **options)
    result = process(body, AS_IS)
    assert result.is_animated
    first = decoded(encode(FRAMES[0], format, **options))
    assert np.abs(decoded(result.data) - first).mean() < 8  # an animated GIF has another palette
    other = decoded(encode(FRAMES[1], format, **options))
    assert np.abs(decoded(result.data) - other).mean() > 30


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_images_are_told_from_whole_ones(format: str, share: float) -> None:
    body = encode(scene(640, 480), format)
    assert refusal(body[: int(len(body) * share)]) is Reason.TRUNCATED_IMAGE


def test_progressive_jpeg_without_its_last_scans_is_truncated() -> None:
    body = encode(scene(640, 480), "JPEG", progressive=True)
    assert refusal(body[: len(body) * 3 // 4]) is Reason.TRUNCATED_IMAGE


def test_jpeg_with_bytes_after_its_end_is_whole() -> None:
    assert process(encode(scene(), "JPEG") + b"\0" * 100, AS_IS).width == 96


def test_jpeg_with_stray_bytes_before_its_end_is_taken() -> None:
    body = encode(scene(), "JPEG")
    assert process(body[:-2] + b"abc" + body[-2:], AS_IS).width == 96


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_damaged_data_is_refused(format: str) -> None:
    body = bytearray(encode(scene(640, 480), format))
    middle = len(body) // 2
    body[middle : middle + 64] = b"\xff\xe7\x10\x00" * 16
    assert refusal(bytes(body)) in (Reason.UNDECODABLE_IMAGE, Reason.TRUNCATED_IMAGE)


def test_pixel_bombs_are_refused_by_their_header() -> None:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"x") + png_chunk(b"IEND", b"")
    assert refusal(bomb) is Reason.TOO_MANY_PIXELS
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        assert refusal(encode(scene(), format), ImageConfig(max_pixels=6_000)) is Reason.TOO_MANY_PIXELS


def test_pixel_bombs_with_a_header_that_is_not_understood_are_refused_too() -> None:
    bomb = bytearray(encode(scene(), "JPEG", subsampling="4:4:4"))
    start = bomb.index(b"\xff\xc0")
    bomb[start + 5 : start + 9] = struct.pack(">HH", 60_000, 60_000)
    bomb[start + 11] = 0x31  # three samples across for one of the others: simplejpeg has no name for it
    assert refusal(bytes(bomb)) is Reason.TOO_MANY_PIXELS


def test_enlarging_a_thin_image_cannot_exceed_the_pixel_limit() -> None:
    thin = encode(Image.new("RGB", (20_000, 1)), "PNG")
    config = ImageConfig(only_if_bigger=False, max_pixels=1_000_000)
    assert refusal(thin, config) is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize(
    "body",
    [b"<!DOCTYPE html><html></html>", b"<svg xmlns='x'/>", b"", b"\0", b"BM", b"RIFF1234WAVE", b"%PDF-1.7"],
)
def test_what_is_no_image_is_named_so(body: bytes) -> None:
    with pytest.raises(ImageError) as refused:
        sniff(body)
    assert refused.value.reason is Reason.NOT_AN_IMAGE


@pytest.mark.filterwarnings("ignore::UserWarning")  # from Pillow, on damaged metadata
@pytest.mark.parametrize("head", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x05\0\0\0WEBP", b"II*\0"])
def test_bare_or_garbled_signatures_are_refused_not_raised(head: bytes) -> None:
    for tail in (b"", b"\0" * 40, bytes(range(256)) * 4):
        assert refusal(head + tail) in (
            Reason.TRUNCATED_IMAGE,
            Reason.UNDECODABLE_IMAGE,
            Reason.TOO_MANY_PIXELS,
        )


@pytest.mark.parametrize(
    ("resize", "only_if_bigger", "source", "result"),
    [
        ("keep_ratio", True, (400, 200), (128, 64)),
        ("keep_ratio_largest", True, (400, 200), (64, 32)),
        ("center_crop", True, (400, 200), (64, 64)),
        ("border", True, (400, 200), (64, 64)),
        ("no", True, (400, 200), (400, 200)),
        ("keep_ratio", True, (40, 20), (40, 20)),
        ("keep_ratio", False, (40, 20), (128, 64)),
        ("center_crop", True, (40, 20), (40, 20)),
        ("center_crop", False, (40, 20), (64, 64)),
        ("border", True, (40, 20), (64, 64)),
        ("keep_ratio", True, (64, 64), (64, 64)),
        ("keep_ratio_largest", True, (3_000, 1), (64, 1)),
    ],
)
def test_resize_modes(resize: Any, only_if_bigger: bool, source: tuple[int, int], result: tuple[int, int]) -> None:
    config = ImageConfig(size=64, resize=resize, only_if_bigger=only_if_bigger)
    processed = process(encode(scene(*source), "PNG"), config)
    assert (processed.width, processed.height) == result
    assert (processed.original_width, processed.original_height) == source
    assert Image.open(io.BytesIO(processed.data)).size == result


def test_shrinking_averages_areas() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    shrunk = decoded(process(encode(Image.fromarray(stripes), "PNG"), ImageConfig(size=16, format="png")).data)
    assert (shrunk == 100).all()


def test_border_is_white_and_does_not_count_in_the_measures() -> None:
    black = encode(Image.new("RGB", (200, 100), "black"), "PNG")
    processed = process(black, ImageConfig(size=50, resize="border", format="png"))
    assert decoded(processed.data)[0, 0].tolist() == [255, 255, 255]
    assert (processed.grey_std, processed.mean_red) == (0.0, 0.0)


@pytest.mark.parametrize(("format", "name"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_output_format_and_bytes_are_the_same_each_time(format: Any, name: str) -> None:
    config = ImageConfig(size=32, format=format)
    first, again = (process(encode(scene(), "JPEG"), config) for _ in range(2))
    assert first == again
    assert Image.open(io.BytesIO(first.data)).format == name


def test_measures_are_of_the_picture() -> None:
    processed = process(encode(Image.new("RGB", (64, 64), (200, 100, 50)), "PNG"), AS_IS)
    assert (processed.mean_red, processed.mean_green, processed.mean_blue) == (200, 100, 50)
    assert processed.grey_std == 0
    halves = Image.fromarray(np.repeat(np.array([0, 255], np.uint8), 32)[None].repeat(64, axis=0))
    assert process(encode(halves, "PNG"), AS_IS).grey_std == 127.5
