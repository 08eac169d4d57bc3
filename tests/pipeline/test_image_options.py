"""Modes, interpolation, keeping bodies as they came, output settings, EXIF, and what the list says of an image."""

import hashlib
import io
import json
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.claims import Claims
from pipeline.config import BuildConfig, ColumnsConfig, ImageConfig
from pipeline.images import decode_resized, process
from pipeline.picture import ImageError
from pipeline.reasons import Reason


def photo(width: int, height: int, seed: int = 0, **options: Any) -> bytes:
    """A JPEG of smooth shapes with texture."""
    draw = np.random.default_rng(seed)
    size = (width, height)
    pixels = cv2.resize(draw.normal(128, 50, (6, 8, 3)), size, interpolation=cv2.INTER_CUBIC)
    pixels += cv2.resize(draw.normal(0, 10, (height // 4, width // 4, 1)), size, interpolation=cv2.INTER_CUBIC)[
        :, :, None
    ]
    return encoded(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), "JPEG", **{"quality": 85} | options)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def shown(data: bytes) -> NDArray[np.uint8]:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    return pixels


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Maker"
    return exif


@pytest.mark.parametrize("size", [(1_024, 768), (500, 375), (683, 1_024), (256, 256), (90, 70)])
def test_mode_exact_gives_the_pixels_of_a_whole_decode_and_area_averaging(size: tuple[int, int]) -> None:
    body = photo(*size)
    whole = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
    scale = min(1, 256 / min(size))
    target = (round(size[0] * scale), round(size[1] * scale))
    expected = cv2.resize(whole, target, interpolation=cv2.INTER_AREA) if scale < 1 else whole
    assert (decode_resized(body, "jpeg", ImageConfig())[1] == expected).all()
    done, jpeg = cv2.imencode(".jpg", expected, [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert done
    assert process(body, ImageConfig()).data == bytes(jpeg)


@pytest.mark.parametrize("size", [(1_280, 853), (1_024, 768), (512, 400), (500, 375), (2_100, 2_050)])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"subsampling": 1}])
def test_mode_fast_is_close_to_exact(size: tuple[int, int], options: dict[str, Any]) -> None:
    body = photo(*size, **options)
    exact, fast = (
        process(body, config) for config in (ImageConfig(format="png"), ImageConfig(format="png", mode="fast"))
    )
    # 40 dB: an average error of 2.5 of 255; photos have more (docs/images.md).
    assert cv2.PSNR(shown(exact.data), shown(fast.data)) > 40
    sizes = ("original_width", "original_height", "width", "height")
    assert [getattr(fast, name) for name in sizes] == [getattr(exact, name) for name in sizes]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_mode_fast_reduces_what_stands_upright_enough(orientation: int) -> None:
    body = photo(1_100, 600, exif=exif_of(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body)))
    result = process(body, ImageConfig(mode="fast", format="png", resize="keep_ratio_largest"))
    assert (result.original_width, result.original_height) == upright.size
    expected = np.asarray(upright.resize((result.width, result.height), Image.Resampling.BOX))[:, :, ::-1]
    assert cv2.PSNR(shown(result.data), np.ascontiguousarray(expected)) > 32


@pytest.mark.parametrize("resize", ["no", "keep_ratio"])
def test_mode_fast_changes_nothing_where_nothing_shrinks(resize: Any) -> None:
    body = photo(240, 180)
    fast, exact = (process(body, ImageConfig(mode=mode, resize=resize)) for mode in ("fast", "exact"))
    assert fast == exact


def test_mode_fast_tells_truncated_images_too() -> None:
    with pytest.raises(ImageError) as refusal:
        process(photo(1_024, 768)[:-2_000], ImageConfig(mode="fast"))
    assert refusal.value.reason is Reason.TRUNCATED_IMAGE


@pytest.mark.parametrize(
    ("name", "filter"),
    [
        ("nearest", cv2.INTER_NEAREST),
        ("bilinear", cv2.INTER_LINEAR),
        ("cubic", cv2.INTER_CUBIC),
        ("lanczos", cv2.INTER_LANCZOS4),
    ],
)
def test_images_are_shrunk_and_enlarged_as_asked(name: Any, filter: int) -> None:
    body = photo(64, 48)
    config = ImageConfig(size=32, downscale_interpolation=name, format="png")
    assert (shown(process(body, config).data) == cv2.resize(shown(body), (43, 32), interpolation=filter)).all()
    config = ImageConfig(size=96, upscale_interpolation=name, only_if_bigger=False, format="png")
    assert (shown(process(body, config).data) == cv2.resize(shown(body), (128, 96), interpolation=filter)).all()


KEEP = ImageConfig(size=64, encode="keep")
SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 60, 3), np.uint8))


@pytest.mark.parametrize(
    ("format", "body"),
    [
        ("jpg", encoded(SMALL, "JPEG", quality=60)),
        ("jpg", encoded(SMALL, "JPEG", exif=exif_of(1))),
        ("jpg", encoded(SMALL.convert("L"), "JPEG", progressive=True)),
        ("png", encoded(SMALL, "PNG")),
        ("png", encoded(SMALL.quantize(16), "PNG")),
        ("webp", encoded(SMALL, "WEBP", quality=40)),
    ],
)
def test_images_that_need_no_change_are_stored_as_they_came(format: Any, body: bytes) -> None:
    kept = process(body, KEEP.model_copy(update={"format": format}))
    assert kept.data == body
    again = process(body, KEEP.model_copy(update={"format": format, "encode": "always"}))
    assert again.data != body
    assert (kept.phash, kept.width, kept.grey_std) == (again.phash, again.width, again.grey_std)


RGBA = SMALL.convert("RGBA")
RGBA.putalpha(128)


@pytest.mark.parametrize(
    ("format", "body", "boxes"),
    [
        pytest.param("jpg", encoded(SMALL, "PNG"), None, id="another format"),
        pytest.param("jpg", encoded(SMALL, "JPEG", exif=exif_of(6)), None, id="not upright"),
        pytest.param("jpg", encoded(SMALL.convert("CMYK"), "JPEG"), None, id="printing colours"),
        pytest.param("jpg", encoded(SMALL.resize((90, 80)), "JPEG"), None, id="too large"),
        pytest.param("jpg", encoded(SMALL, "JPEG"), [[0.0, 0.0, 0.5, 0.5]], id="boxes to blur"),
        pytest.param("png", encoded(RGBA, "PNG"), None, id="transparency"),
        pytest.param("webp", encoded(RGBA, "WEBP"), None, id="transparency in webp"),
        pytest.param("png", encoded(Image.fromarray(np.full((9, 9), 999, np.uint16)), "PNG"), None, id="16 bit"),
        pytest.param(
            "webp", encoded(SMALL, "WEBP", save_all=True, append_images=[SMALL.rotate(90)]), None, id="animated"
        ),
    ],
)
def test_images_that_need_a_change_are_encoded_whatever_is_asked(format: Any, body: bytes, boxes: Any) -> None:
    keep = KEEP.model_copy(update={"format": format})
    always = keep.model_copy(update={"encode": "always"})
    assert process(body, keep, boxes) == process(body, always, boxes)


@pytest.mark.parametrize("resize", ["center_crop", "border"])
def test_cropped_and_bordered_images_are_not_those_that_came(resize: Any) -> None:
    config = KEEP.model_copy(update={"size": 50, "resize": resize, "format": "png", "only_if_bigger": True})
    square = encoded(SMALL.crop((0, 0, 50, 50)).copy() if resize == "center_crop" else SMALL.resize((50, 50)), "PNG")
    wide = encoded(SMALL.crop((0, 0, 60, 40)), "PNG")
    assert process(wide, config).data != wide
    assert process(square, config).width == 50


def test_png_compression_trades_time_for_bytes() -> None:
    body = photo(300, 200)
    fast, small = (process(body, ImageConfig(format="png", png_compression=level)).data for level in (0, 9))
    assert len(small) < len(fast) / 2
    assert (shown(small) == shown(fast)).all()


def test_exif_is_told_if_asked_for() -> None:
    body = photo(64, 48, exif=exif_of(3))
    assert process(body, ImageConfig()).exif is None
    told = json.loads(process(body, ImageConfig(exif=True)).exif or "")
    assert told["Image Make"] == "Maker"
    assert process(encoded(SMALL, "PNG"), ImageConfig(exif=True)).exif == "{}"


@pytest.mark.parametrize("format", ["TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_is_applied_in_rare_formats_too(format: str, orientation: int) -> None:
    quarters = Image.new("RGB", (64, 32))
    for place, colour in (((0, 0), "red"), ((32, 0), "lime"), ((0, 16), "blue"), ((32, 16), "white")):
        quarters.paste(colour, (*place, place[0] + 32, place[1] + 16))
    body = encoded(quarters, format, exif=exif_of(orientation), **({"quality": 100} if format == "AVIF" else {}))
    stored = Image.open(io.BytesIO(encoded(quarters, "PNG", exif=exif_of(orientation))))
    upright = np.asarray(ImageOps.exif_transpose(stored))
    result = process(body, ImageConfig(resize="no", format="png"))
    assert (result.original_height, result.original_width) == upright.shape[:2]
    # AVIF keeps every second colour: they mix where the quarters meet.
    assert np.abs(shown(result.data)[:, :, ::-1].astype(int) - upright).mean() < 6


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\2\0\0\0a\0\0\0\0\0\0\0"],  # no TIFF; orientation "a"
)
def test_damaged_metadata_do_not_cost_the_image(exif: bytes) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    palette = encoded(frames[0].quantize(2), "PNG", exif=exif)
    animated = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], exif=exif)
    for body in (palette, animated):
        assert process(body, ImageConfig(resize="no")).width == 8


def test_printing_colours_are_those_that_pillow_shows() -> None:
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow: red
    for body in (encoded(inks, "JPEG", quality=95), encoded(inks, "TIFF")):
        blue, green, red = shown(process(body, ImageConfig(format="png")).data)[8, 8].tolist()
        assert red > 240
        assert max(blue, green) < 15


def test_transparency_is_shown_over_white() -> None:
    half = Image.new("RGBA", (8, 8), (200, 0, 0, 51))  # a fifth of (200, 0, 0), four fifths of white
    assert shown(process(encoded(half, "PNG"), ImageConfig(format="png")).data)[0, 0].tolist() == [204, 204, 244]


def test_multi_page_tiffs_give_their_first_page_and_are_no_animation() -> None:
    pages = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    result = process(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]), ImageConfig(format="png"))
    assert (shown(result.data)[0, 0].tolist(), result.is_animated) == ([0, 0, 255], False)


@pytest.mark.parametrize("kind", ["sixteen bit grey with alpha", "floating point"])
def test_unusual_depths_are_read_or_refused_never_raised(kind: str) -> None:
    if kind == "floating point":
        with pytest.raises(ImageError, match="floating-point"):
            process(encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), ImageConfig())
    else:
        deep = np.dstack([np.full((9, 9, 3), 32_768, np.uint16), np.full((9, 9, 1), 65_535, np.uint16)])
        result = process(bytes(cv2.imencode(".png", deep)[1]), ImageConfig(format="png"))
        assert shown(result.data)[0, 0].tolist() == [128, 128, 128]


def claims(values: list[Any], **columns: str) -> Claims:
    (role,) = columns
    name = columns[role]
    planned = pa.table({f"source_{name}" if name == "sha256" else name: values})
    return Claims.of(planned, ColumnsConfig.model_validate(columns), "md5" if role == "hash" else None)


def test_a_body_without_the_hash_that_the_list_gives_is_refused() -> None:
    right = hashlib.md5(b"body").hexdigest()
    told = claims([right, right.upper() + " ", None, "00"], hash="sha256")  # a reserved name: kept as source_sha256
    for row in range(3):
        told.check_hash(row, b"body")
    with pytest.raises(ImageError, match=right) as refusal:
        told.check_hash(3, b"body")
    assert refusal.value.reason is Reason.HASH_MISMATCH


def test_boxes_come_as_lists_or_as_their_json() -> None:
    assert claims([[[0, 0.5, 1, 1]], [], None], boxes="faces").boxes_of(0) == [[0.0, 0.5, 1.0, 1.0]]
    told = claims(["[[0, 0.5, 1, 1], [0, 0, 0.1, 0.1]]", "", "[]", None], boxes="faces")
    assert told.boxes_of(0) == [[0.0, 0.5, 1.0, 1.0], [0.0, 0.0, 0.1, 0.1]]
    assert [told.boxes_of(row) for row in (1, 2, 3)] == [[], [], []]
    assert Claims().boxes_of(7) == []


@pytest.mark.parametrize(
    "value",
    [
        *("[[0, 0, 1]]", "no", '{"a": 1}', "[[0, 0, 1, null]]", "[[10, 20, 300, 400]]", "[[0, 0, NaN, 1]]"),
        "[[0.6, 0.1, 0.2, 0.3]]",  # x, y, width, height
    ],
)
def test_an_image_whose_boxes_cannot_be_read_is_refused_rather_than_left_unblurred(value: str) -> None:
    with pytest.raises(ImageError) as refusal:
        claims([value], boxes="faces").boxes_of(0)
    assert refusal.value.reason is Reason.BAD_BOXES


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"columns": {"hash": "md5"}}, "fetch.verify_hash"),
        ({"fetch": {"verify_hash": "md5"}}, "columns.hash"),
        ({"columns": {"boxes": "faces", "keep": ["licence"]}}, "columns.keep"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        BuildConfig.model_validate({"input": ["list.csv"], "output": "out"} | settings)
