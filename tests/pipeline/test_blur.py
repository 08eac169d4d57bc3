import io
import os
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.blur import blur
from pipeline.config import ImageConfig
from pipeline.images import process

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # img2dataset's import would ask the network

NOISE = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)


@pytest.mark.parametrize(
    "boxes",
    [
        [[0.25, 0.25, 0.5, 0.75]],
        [[0.0, 0.0, 0.2, 0.2], [0.7, 0.5, 1.0, 1.0]],
        [[0.5, 0.5, 0.5, 0.5]],
        [[-0.1, 0.9, 1.1, 1.2]],
        [[0.1, 0.1, 0.12, 0.15], [0.3, 0.3, 0.9, 0.9]],
        [],
    ],
)
def test_blurred_boxes_look_as_img2datasets(boxes: list[list[float]]) -> None:
    blurrer = pytest.importorskip("img2dataset.blurrer").BoundingBoxBlurrer()
    with warnings.catch_warnings(action="ignore"):  # of an argument that albumentations has dropped
        theirs = blurrer(NOISE, boxes)
    assert np.abs(blur(NOISE, boxes).astype(int) - theirs).max() <= 1


def test_a_blurred_box_is_smooth_and_what_is_far_from_it_untouched() -> None:
    blurred = blur(NOISE, [[0.0, 0.0, 0.3, 0.4]])
    assert blurred[8:40, 8:40].std() < NOISE[8:40, 8:40].std() / 4
    # Single precision and its fraction cut off: one less at most.
    assert np.abs(blurred[80:, 100:].astype(int) - NOISE[80:, 100:]).max() <= 1


def test_boxes_are_those_of_the_upright_image_and_are_blurred_before_cropping() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turned clockwise to be shown
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "PNG", exif=exif)
    config = ImageConfig(size=60, resize="center_crop", format="png")
    boxes = [[0.0, 0.0, 1.0, 0.5]]  # the upper half
    plain, blurred = (
        cv2.imdecode(np.frombuffer(process(buffer.getvalue(), config, those).data, np.uint8), cv2.IMREAD_COLOR)
        for those in (None, boxes)
    )
    assert plain.shape == (60, 60, 3)
    assert blurred[:20].std() < plain[:20].std() / 2
    assert np.abs(blurred[45:].astype(int) - plain[45:]).max() <= 1
