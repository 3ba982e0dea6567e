"""Tiles equal those of transformers' Idefics3ImageProcessor, pixel for pixel, whatever the size, mode and orientation.

The reference is given what its own loader makes of the file: upright and in RGB, or in RGBA where it is transparent. In
other modes it has bugs of its own (a grey picture is resized as a palette, a 16-bit one is clipped); 16 bits are tested
apart.
"""

from __future__ import annotations

import io
import random

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps
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


def assert_equal_tiles(
    image: Image.Image, processing: ImageProcessing, reference_image: Image.Image | None = None
) -> None:
    for detail, split in (("high", True), ("low", False)):
        expected, grid = reference(reference_image or image, processing, split=split)
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


def random_size(rng: random.Random) -> tuple[int, int]:
    """1x1 to 4000x3000 or the other way round: half of them even over the sides, half over their logarithms.

    The second half holds the slivers, such as 3000x2. The reference takes up to a second for a picture of 12 million
    pixels; drawn like this, a picture at both details takes 0.3 s on average.
    """
    wide, high = rng.randint(1, 4000), rng.randint(1, 3000)
    if rng.random() < 0.5:
        wide, high = int(4000 ** rng.random()), int(3000 ** rng.random())
    return (wide, high) if rng.random() < 0.5 else (high, wide)


def assert_random_files_equal_the_reference(seed: int, count: int) -> None:
    """Files of random size, mode, format and orientation, at each of the three settings in turn."""
    rng = random.Random(seed)
    for number in range(count):
        mode = rng.choice(["RGB", "RGB", "RGBA", "L", "1", "P", "CMYK"])
        kind = {"CMYK": "JPEG", "P": "GIF"}.get(mode, rng.choice(["PNG", "WEBP"]))
        exif = Image.Exif()
        exif[0x0112] = rng.randint(1, 8)
        image = noise(*random_size(rng))
        if mode == "RGBA":
            image.putalpha(noise(*image.size).convert("L"))
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, kind, **({"exif": exif} if kind != "GIF" else {}))
        with Image.open(buffer) as opened:
            expected = ImageOps.exif_transpose(opened).convert("RGBA" if mode == "RGBA" else "RGB")
        ours = decode_image(buffer.getvalue(), max_bytes=2**30).image  # noise takes more bytes than pictures do
        assert (ours.mode, ours.size) == (expected.mode, expected.size)
        assert_equal_tiles(ours, (TINY, SMOLVLM, SMOLVLM_2B)[number % 3], expected)


def test_forty_random_files_become_the_tiles_of_the_reference() -> None:
    assert_random_files_equal_the_reference(3, 40)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(100, 110))
def test_five_hundred_random_files_become_the_tiles_of_the_reference(seed: int) -> None:
    assert_random_files_equal_the_reference(seed, 50)


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
    transparent = mode in ("RGBA", "LA", "transparent palette")
    assert (decoded.image.mode, decoded.image.size) == ("RGBA" if transparent else "RGB", (90, 60))
    assert_equal_tiles(decoded.image, TINY)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    decoded = decode_image(encoded(Image.fromarray(levels)))
    assert np.asarray(decoded.image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_alpha_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    tiled = tile_image(decode_image(encoded(clear)).image, "high", TINY)
    assert tiled.pixels.min() == 1.0
