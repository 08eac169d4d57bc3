import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config import ImageConfig
from pipeline.images import decode_resized
from pipeline.signals import measure, perceptual_hashes


def picture(seed: int, width: int = 320, height: int = 240) -> NDArray[np.uint8]:
    """Smooth shapes with some texture, other ones for every seed."""
    draw = np.random.default_rng(seed)
    coarse = cv2.resize(draw.integers(0, 256, (6, 8, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    texture = cv2.resize(draw.normal(0, 12, (60, 80, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(coarse + texture, 0, 255).astype(np.uint8)


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def test_the_hash_has_a_bit_for_each_low_frequency_above_the_median() -> None:
    is_above = np.random.default_rng(0).permutation(np.arange(64) < 32).reshape(8, 8)
    first = np.flatnonzero(is_above)[0]
    is_above.flat[0], is_above.flat[first] = True, is_above.flat[0]  # the mean is above: 32 in all
    frequencies = np.zeros((32, 32), np.float32)
    frequencies[:8, :8] = np.where(is_above, 100, -100)
    frequencies[0, 0] = 32 * 128  # the mean
    grey = np.rint(cv2.idct(frequencies)).astype(np.uint8)
    pixels = np.repeat(grey[:, :, None], 3, axis=2).repeat(2, axis=0).repeat(2, axis=1)
    expected = sum(1 << 63 - place for place in np.flatnonzero(is_above).tolist())
    assert perceptual_hashes(pixels)[0] == expected


@pytest.mark.parametrize("seed", range(6))
def test_the_mirror_images_hash_is_known_without_mirroring(seed: int) -> None:
    pixels = picture(seed)
    phash, phash_mirror = perceptual_hashes(pixels)
    mirrored = perceptual_hashes(cv2.flip(pixels, 1))
    # The average of mirrored pixels may be rounded the other way: a frequency at the median changes sides.
    assert distance(mirrored[0], phash_mirror) <= 2
    assert distance(mirrored[1], phash) <= 2
    assert distance(phash, phash_mirror) > 10


@pytest.mark.parametrize("seed", range(6))
def test_hashes_survive_encoding_and_resizing_and_tell_pictures_apart(seed: int) -> None:
    pixels = picture(seed)
    phash = perceptual_hashes(pixels)[0]
    worse = cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 50])[1], cv2.IMREAD_COLOR)
    smaller = cv2.resize(pixels, (160, 120), interpolation=cv2.INTER_AREA)
    brighter = np.clip(pixels * 0.8 + 30, 0, 255).astype(np.uint8)
    for variant in (worse, smaller, brighter):
        assert distance(perceptual_hashes(variant)[0], phash) <= 6
    assert distance(perceptual_hashes(picture(seed + 100))[0], phash) >= 16


def test_both_modes_measure_nearly_the_same() -> None:
    body = bytes(cv2.imencode(".jpg", picture(3, 1_100, 800))[1])
    exact, fast = (
        measure(decode_resized(body, "jpeg", ImageConfig.model_validate({"mode": mode}))[1])
        for mode in ("exact", "fast")
    )
    assert distance(exact.phash, fast.phash) <= 2
    assert abs(exact.mean_red - fast.mean_red) < 0.5
    assert fast.sharpness == pytest.approx(exact.sharpness, rel=0.2)


def test_images_smaller_than_the_hash_have_one() -> None:
    pixels = picture(1, 9, 5)
    assert perceptual_hashes(pixels)[0] != perceptual_hashes(picture(2, 9, 5))[0]


def test_an_image_of_one_colour_has_one_hash_whatever_the_colour() -> None:
    hashes = {perceptual_hashes(np.full((50, 70, 3), value, np.uint8)) for value in (1, 90, 255)}
    assert hashes == {(1 << 63, 1 << 63)}


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[10, 10] = 100
    # The point itself is -400, its four neighbours 100, their sum 0: (400² + 4 * 100²) / 400 pixels.
    assert measure(pixels).sharpness == 500


def test_sharpness_is_measured_at_one_size_and_falls_with_blur() -> None:
    large = picture(4, 1_024, 768)
    small = cv2.resize(large, (341, 256), interpolation=cv2.INTER_AREA)
    assert measure(large).sharpness == pytest.approx(measure(small).sharpness, rel=0.1)
    grained = np.clip(small + np.random.default_rng(0).normal(0, 15, small.shape), 0, 255).astype(np.uint8)
    assert measure(cv2.GaussianBlur(grained, (0, 0), 2)).sharpness < measure(grained).sharpness / 20


def test_means_and_deviation_are_those_of_the_pixels() -> None:
    pixels = picture(8)
    measures = measure(pixels)
    assert (measures.mean_blue, measures.mean_green, measures.mean_red) == pytest.approx(
        pixels.reshape(-1, 3).mean(axis=0), abs=1e-3
    )
    grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    assert measures.grey_std == pytest.approx(grey.std(), abs=1e-3)
