"""Pages of documents: their size, their pixels, and that no two threads are in PDFium at once."""

from __future__ import annotations

import io
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageDraw

from models.documents import read_document
from models.errors import BadRequest, PayloadTooLarge
from models.images import ImageProcessing, tile_image

SMOLVLM = ImageProcessing(longest_edge=2048, tile_px=512, auto_tile_px=512)


def document(kind: str, *sizes: tuple[int, int]) -> bytes:
    """A page a size, each with its number and a gradient."""
    pages = []
    for number, size in enumerate(sizes, 1):
        page = Image.linear_gradient("L").resize(size).convert("RGB")
        ImageDraw.Draw(page).text((4, 4), str(number), fill="red")
        pages.append(page)
    stream = io.BytesIO()
    pages[0].save(stream, kind, save_all=True, append_images=pages[1:])
    return stream.getvalue()


@pytest.mark.parametrize("size", [(600, 800), (1275, 1650), (2480, 3508), (3000, 17), (5, 900)])
def test_a_scanned_page_becomes_the_tiles_that_its_picture_would(size: tuple[int, int]) -> None:
    """It comes scaled to the longest edge, and scaling it so again changes nothing."""
    data = document("TIFF", size)
    page = read_document(data, longest_edge=SMOLVLM.longest_edge).pages[0]
    assert (page.width, page.height) == size
    with Image.open(io.BytesIO(data)) as scan:
        expected = tile_image(scan.convert("RGB"), "high", SMOLVLM)
    tiled = tile_image(page.image, "high", SMOLVLM)
    assert tiled.grid == expected.grid
    np.testing.assert_array_equal(tiled.pixels, expected.pixels)


@pytest.mark.parametrize("size", [(612, 792), (300, 9000), (7, 7)])
def test_a_pdf_is_drawn_so_that_its_longest_edge_fits_the_tiles(size: tuple[int, int]) -> None:
    for page in read_document(document("PDF", size, size[::-1]), longest_edge=512).pages:
        assert max(page.image.size) == 512
        assert page.image.width / page.image.height == pytest.approx(page.width / page.height, rel=0.2)


def test_a_page_of_any_claimed_size_takes_no_more_pixels() -> None:
    data = document("PDF", (300, 400))
    for claimed in (b"3e9 4e9", b"90000.0 9000.0"):
        page = read_document(data.replace(b"300.0 400.0", claimed), longest_edge=256).pages[0]
        assert max(page.image.size) == 256


def test_threads_take_turns_with_pdfs() -> None:
    data = document("PDF", *[(200, 300)] * 8)
    with ThreadPoolExecutor(8) as workers:
        found = list(workers.map(lambda _: read_document(data, longest_edge=128), range(32)))
    first = [np.asarray(page.image) for page in found[0].pages]
    for other in found[1:]:
        for page, expected in zip(other.pages, first, strict=True):
            np.testing.assert_array_equal(np.asarray(page.image), expected)


def test_a_document_of_endless_pages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.documents.MAX_COUNTED_PAGES", 3)
    for kind in ("PDF", "TIFF"):
        with pytest.raises(PayloadTooLarge, match="4 pages"):
            read_document(document(kind, *[(9, 9)] * 4), longest_edge=64)


@pytest.mark.parametrize("kind", ["PDF", "TIFF"])
def test_whatever_bytes_are_damaged_the_document_is_read_or_refused(kind: str) -> None:
    data, rng = document(kind, (90, 120), (120, 90)), random.Random(5)
    refused = 0
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 60)):
            damaged[rng.randrange(4, len(data))] = rng.randrange(256)
        try:
            assert read_document(bytes(damaged), longest_edge=64).pages
        except BadRequest:
            refused += 1
    assert refused
