"""A request made ready for the engine, in worker threads: pictures decoded and tiled, the prompt rendered to ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from models.errors import ContextLengthExceeded
from models.events import ImageReport
from models.expand import Expansion, expand
from models.images import (
    Detail,
    Grid,
    Origin,
    TiledImage,
    choose_grid,
    decode_image,
    read_header,
    tile_frame,
    tile_image,
)
from models.loaded_model import LoadedModel
from models.onnx_model import OnnxModel
from models.request import AnswerRequest
from models.video import MAX_FRAMES


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedPrompt:
    """What the engine needs of a request. `begun` is a clock reading; `image_decode_ms` is None without pictures."""

    ids: list[int]
    tiles: tuple[TiledImage, ...]
    images: tuple[ImageReport, ...]
    begun: float
    image_decode_ms: float | None
    preprocess_ms: float

    @property
    def image_tokens(self) -> int:
        return sum(report.tokens or 0 for report in self.images)


def prepare(model: LoadedModel, request: AnswerRequest, clock: Callable[[], float]) -> PreparedPrompt:
    """Decode, tile and render. Raises BadRequest and its kin.

    The context is checked before any pixel is decoded: with one tile a picture, then with the grids that the headers
    ask for. In between, video and document become pictures, no more than the context could hold. Pictures are decoded
    one after the other, so that one at a time is held in full size.
    """
    begun = clock()
    onnx, processing = model.onnx, model.bundle.manifest.processing
    least = model.renderer.ids(request.messages, [Grid(0, 0)] * request.media_count)
    _check_context(least, onnx)
    room = (onnx.shapes.max_positions - len(least)) // onnx.shapes.image_tokens_per_tile + 1
    expanding = clock()
    request = expand(
        request,
        Expansion(
            frame_edge_px=processing.tile_px,
            page_edge_px=processing.longest_edge,
            max_frames=min(room, MAX_FRAMES),
        ),
    )
    decode_s = clock() - expanding
    headers = [read_header(part.data) for part in request.images]
    details: list[Detail] = ["low" if part.is_frame else request.detail for part in request.images]
    grids = [
        choose_grid(header.width, header.height, detail, processing)
        for header, detail in zip(headers, details, strict=True)
    ]
    ids = model.renderer.ids(request.messages, grids)
    _check_context(ids, onnx)
    tiles: list[TiledImage] = []
    for part in request.images:
        decoding = clock()
        image = decode_image(part.data).image
        decode_s += clock() - decoding
        tiles.append(tile_frame(image, processing) if part.is_frame else tile_image(image, request.detail, processing))
    return PreparedPrompt(
        ids=ids,
        tiles=tuple(tiles),
        images=tuple(
            _report(part.origin or header, tiled, detail, onnx.shapes.image_tokens_per_tile)
            for part, header, tiled, detail in zip(request.images, headers, tiles, details, strict=True)
        ),
        begun=begun,
        image_decode_ms=decode_s * 1000 if headers else None,
        preprocess_ms=(clock() - begun - decode_s) * 1000,
    )


def _check_context(ids: list[int], onnx: OnnxModel) -> None:
    if len(ids) >= onnx.shapes.max_positions:
        raise ContextLengthExceeded(
            f"the prompt has {len(ids)} tokens, and the model takes {onnx.shapes.max_positions} with the answer",
            param="prompt",
        )


def _report(origin: Origin, tiled: TiledImage, detail: Detail, tokens_per_tile: int) -> ImageReport:
    return ImageReport(
        **asdict(origin),
        used_width=tiled.used_width,
        used_height=tiled.used_height,
        tiles=len(tiled.pixels),
        tokens=len(tiled.pixels) * tokens_per_tile,
        detail=detail,
    )
