"""Tiles equal those of transformers' Idefics3ImageProcessor, pixel for pixel.

The reference reads decoded RGB: how modes become RGB is ours to decide (a viewer's way), and is tested apart.
"""

from __future__ import annotations

import io
import random

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from transformers import Idefics3ImageProcessor

from models.images import Grid, ImageProcessing, decode_image, tile_image

TINY = ImageProcessing(longest_edge=128, tile_px=64, auto_tile_px=256)
SMOLVLM = ImageProcessing(longest_edge=2048, tile_px=512, auto_tile_px=512)
SMOLVLM_2B = ImageProcessing(longest_edge=1536, tile_px=384, auto_tile_px=384)

SIZES = [
    (1, 1), (3, 3), (1, 2), (3, 1), (1, 50), (50, 1), (3, 200), (200, 3), (64, 64), (65, 64), (63, 127), (128, 128),
    (129, 128), (131, 77), (640, 480), (480, 640), (2000, 300), (300, 2000), (1000, 999), (257, 1023),
]  # fmt: skip
LARGE_SIZES = [(1, 1), (3, 3), (1, 50), (640, 480), (2000, 300), (513, 512), (700, 2100)]


def noise(width: int, height: int) -> Image.Image:
    """A picture whose every pixel matters: noise over a gradient."""
    rng = np.random.default_rng(width * 10_007 + height)
    pixels = rng.integers(0, 256, (height, width, 3)) * 0.5 + np.linspace(0, 127, width)[None, :, None]
    return Image.fromarray(pixels.astype(np.uint8), "RGB")


def reference(image: Image.Image, processing: ImageProcessing, *, split: bool) -> tuple[npt.NDArray[np.float32], Grid]:
    processor = Idefics3ImageProcessor(
        size={"longest_edge": processing.longest_edge},
        max_image_size={"longest_edge": processing.tile_px},
        image_mean=list(processing.mean),
        image_std=list(processing.std),
        do_image_splitting=split,
        resample=Image.Resampling.LANCZOS,
    )
    # Without the data format it takes a height of 1 or 3 for the channels.
    found = processor(image, input_data_format="channels_last", return_tensors="np", return_row_col_info=True)
    return found["pixel_values"][0], Grid(int(found["rows"][0][0]), int(found["cols"][0][0]))


def assert_equal_tiles(image: Image.Image, processing: ImageProcessing) -> None:
    for detail, split in (("high", True), ("low", False)):
        expected, grid = reference(image, processing, split=split)
        tiled = tile_image(image, detail, processing)  # type: ignore[arg-type]
        assert tiled.grid == grid
        assert tiled.pixels.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(tiled.pixels, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_equal_the_reference_at_the_settings_of_tiny_scenes(size: tuple[int, int]) -> None:
    assert_equal_tiles(noise(*size), TINY)


@pytest.mark.parametrize("size", LARGE_SIZES, ids=str)
def test_tiles_equal_the_reference_at_the_settings_of_smolvlm(size: tuple[int, int]) -> None:
    assert_equal_tiles(noise(*size), SMOLVLM)


def test_tiles_equal_the_reference_at_the_settings_of_the_largest_smolvlm() -> None:
    assert_equal_tiles(noise(800, 500), SMOLVLM_2B)


def test_tiles_equal_the_reference_at_a_hundred_random_sizes() -> None:
    rng = random.Random(3)
    for _ in range(100):
        assert_equal_tiles(noise(rng.randint(1, 300), rng.randint(1, 300)), TINY)


def test_other_means_and_deviations_are_applied_as_the_reference_does() -> None:
    processing = ImageProcessing(
        longest_edge=128, tile_px=64, auto_tile_px=64, mean=(0.48, 0.45, 0.4), std=(0.26, 0.25, 0.27)
    )
    assert_equal_tiles(noise(100, 70), processing)


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def transparent(mode: str) -> Image.Image:
    image = noise(90, 60).convert("RGBA" if mode == "RGBA" else "L")
    image.putalpha(Image.linear_gradient("L").resize((90, 60)))
    return image


MODES = {
    "RGBA": lambda: encoded(transparent("RGBA")),
    "LA": lambda: encoded(transparent("LA")),
    "palette": lambda: encoded(noise(90, 60).quantize(17)),
    "transparent palette": lambda: encoded(transparent("RGBA").quantize(17)),
    "grey": lambda: encoded(noise(90, 60).convert("L")),
    "16-bit": lambda: encoded(Image.fromarray((np.arange(5400).reshape(60, 90) * 12).astype(np.uint16))),
    "1-bit": lambda: encoded(noise(90, 60).convert("1")),
    "CMYK": lambda: encoded(noise(90, 60).convert("CMYK"), "JPEG"),
    "GIF": lambda: encoded(noise(90, 60).quantize(32), "GIF"),
}


@pytest.mark.parametrize("mode", MODES)
def test_tiles_of_every_mode_equal_the_reference_on_what_a_viewer_shows(mode: str) -> None:
    decoded = decode_image(MODES[mode]())
    assert decoded.image.mode == "RGB"
    assert decoded.image.size == (90, 60)
    assert_equal_tiles(decoded.image, TINY)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    decoded = decode_image(encoded(Image.fromarray(levels)))
    assert np.asarray(decoded.image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_alpha_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert np.asarray(decode_image(encoded(clear)).image).min() == 255
