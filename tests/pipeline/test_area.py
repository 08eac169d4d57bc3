import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline import area
from pipeline.area import load_kernel, shrink_area


@pytest.fixture(params=["compiled", "opencv"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "opencv":
        monkeypatch.setattr(area, "load_kernel", lambda: None)
    elif load_kernel() is None:
        pytest.skip("installed without a C compiler")


def test_the_kernel_is_there_where_a_compiler_was() -> None:
    assert load_kernel() is not None or shutil.which("cc") is None


def test_a_kernel_that_cannot_be_loaded_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "_area.so").write_bytes(b"\x7fELF of another machine")
    monkeypatch.setattr(area, "find_spec", lambda name: ModuleSpec(name, None, origin=str(tmp_path / "_area.so")))
    assert load_kernel.__wrapped__() is None
    assert "_area.so" in caplog.text


def test_shrinking_equals_opencvs_area_averaging_to_the_bit(either_way: None) -> None:
    draw = np.random.default_rng(5)
    sizes = [
        (1, 1, 1, 1),
        (7, 5, 1, 1),
        (5, 9, 5, 4),
        (40, 3, 13, 3),
        (64, 48, 32, 24),
        (90, 60, 30, 20),
        (2, 400, 1, 3),
    ]
    sizes += [(768, 1024, 256, 341), (427, 640, 256, 384)]
    for _ in range(80):
        height, width = (int(side) for side in draw.integers(1, 300, 2))
        sizes.append((height, width, int(draw.integers(1, height + 1)), int(draw.integers(1, width + 1))))
    for height, width, target_height, target_width in sizes:
        pixels = draw.integers(0, 256, (height, width, 3), np.uint8)
        expected = cv2.resize(pixels, (target_width, target_height), interpolation=cv2.INTER_AREA)
        assert (shrink_area(pixels, target_width, target_height) == expected).all(), (pixels.shape, expected.shape)


def test_results_are_means_of_what_they_cover(either_way: None) -> None:
    row = np.array([0, 30, 60, 90, 120], np.uint8)
    pixels = np.repeat(row[None, :, None].repeat(3, axis=2), 2, axis=0)
    # 5 -> 2: the middle pixel is shared, a half of it on each side: (0 + 30 + 60/2) / 2.5 and (60/2 + 90 + 120) / 2.5
    assert shrink_area(pixels, 2, 2)[0, :, 0].tolist() == [24, 96]


def test_parts_of_images_and_extremes_are_shrunk_too(either_way: None) -> None:
    white = np.full((301, 403, 3), 255, np.uint8)
    assert (shrink_area(white, 128, 95) == 255).all()
    assert (shrink_area(np.zeros_like(white), 128, 95) == 0).all()
    inner = np.random.default_rng(1).integers(0, 256, (300, 400, 3), np.uint8)[10:211, 20:333]
    assert (shrink_area(inner, 100, 70) == shrink_area(inner.copy(), 100, 70)).all()
