"""PDF and TIFF bytes -> page images that fit the tiles. PDF needs pypdfium2 (extra `documents`)."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageOps

from models.errors import BadRequest, PayloadTooLarge, UnsupportedMedia
from models.images import MAX_IMAGE_PIXELS, known_format, reference_size, to_plain, unlike

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument

MAX_DOCUMENT_BYTES = 48 * 2**20
MAX_PAGES = 8  # of SmolVLM2's 8,192 positions a page at full detail takes some 850
MAX_COUNTED_PAGES = 10_000

_PDFIUM = threading.Lock()  # PDFium is not thread-safe, whatever document a thread works on
_ENCRYPTED = ("password", "security")  # in pypdfium2's messages


class Page(NamedTuple):
    """A page as an image whose longest edge has the wanted length. Width and height are of the page before scaling."""

    image: Image.Image
    width: int
    height: int


class Document(NamedTuple):
    """The first pages, at most 8, and how many there are in all."""

    pages: tuple[Page, ...]
    total: int


def read_document(data: bytes, *, longest_edge: int) -> Document:
    """The first pages, scaled by the first of the reference's two resizes, so that it changes nothing when it comes.

    A PDF's page is rendered at that size at once. Raises PayloadTooLarge, UnsupportedMedia for other formats or without
    pypdfium2, BadRequest for a damaged or encrypted file.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise PayloadTooLarge(
            f"the document has {len(data)} bytes, at most {MAX_DOCUMENT_BYTES} are read", param="document"
        )
    match known_format(data):
        case "PDF":
            return _read_pdf(data, longest_edge)
        case "TIFF":
            return _read_tiff(data, longest_edge)
    raise unlike(data, "document", "PDF or TIFF")


def _read_pdf(data: bytes, longest_edge: int) -> Document:
    try:
        import pypdfium2
    except ModuleNotFoundError as error:
        raise UnsupportedMedia(
            "reading PDF needs pypdfium2: pip install 'nearfar[documents]'", param="document"
        ) from error
    with _PDFIUM:
        try:
            with pypdfium2.PdfDocument(data) as pdf:
                total = _checked_count(len(pdf))
                return Document(
                    tuple(_render(pdf, number, longest_edge) for number in range(min(total, MAX_PAGES))), total
                )
        except pypdfium2.PdfiumError as error:
            if any(word in str(error).lower() for word in _ENCRYPTED):
                raise BadRequest("the PDF is encrypted: send it without a password", param="document") from error
            raise BadRequest("the PDF is damaged and cannot be read", param="document") from error


def _render(pdf: PdfDocument, number: int, longest_edge: int) -> Page:
    """White paper, no form fields, never more pixels than the square of the longest edge, however large the page."""
    page = pdf[number]
    try:
        width, height = page.get_size()  # points, 1/72 inch
        if not (0 < width < 1e6 and 0 < height < 1e6):
            raise BadRequest(f"page {number + 1} has no size", param="document")
        scale = longest_edge / max(width, height)
        bitmap = page.render(scale=scale, may_draw_forms=False)
        image = bitmap.to_pil().convert("RGB")
        bitmap.close()
    finally:
        page.close()
    return Page(_fitted(image, longest_edge), *image.size)


def _read_tiff(data: bytes, longest_edge: int) -> Document:
    pages: list[Page] = []
    total = 0
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
            while True:
                if total < MAX_PAGES:
                    pages.append(_tiff_page(image, total + 1, longest_edge))
                total = _checked_count(total + 1)
                try:
                    image.seek(total)
                except EOFError:
                    return Document(tuple(pages), total)
    except (BadRequest, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise PayloadTooLarge("a page of the TIFF would decompress to too many pixels", param="document") from error
    except Exception as error:  # Pillow raises many kinds for damaged files: OSError, SyntaxError, struct.error, ...
        raise BadRequest("the TIFF is damaged or truncated and cannot be decoded", param="document") from error


def _tiff_page(image: Image.Image, number: int, longest_edge: int) -> Page:
    width, height = image.size
    if not 0 < width * height <= MAX_IMAGE_PIXELS:
        raise PayloadTooLarge(
            f"page {number} has {width}x{height} pixels, at most {MAX_IMAGE_PIXELS} are decoded", param="document"
        )
    plain = to_plain(ImageOps.exif_transpose(image))
    return Page(_fitted(plain, longest_edge), *plain.size)


def _fitted(image: Image.Image, longest_edge: int) -> Image.Image:
    return image.resize(reference_size(*image.size, longest_edge), Image.Resampling.LANCZOS)


def _checked_count(count: int) -> int:
    if not 1 <= count <= MAX_COUNTED_PAGES:
        raise PayloadTooLarge(f"the document has {count} pages, 1 to {MAX_COUNTED_PAGES} are read", param="document")
    return count
