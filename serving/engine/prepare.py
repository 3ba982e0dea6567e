"""A request made ready for the engine, in worker threads: pictures decoded and tiled, the prompt rendered to ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.bundle import Bundle
from models.errors import ContextLengthExceeded
from models.events import ImageReport
from models.images import DecodedImage, Detail, Grid, TiledImage, choose_grid, decode_image, tile_image
from models.onnx_model import ExecutionProvider, OnnxModel
from models.prompt import PromptRenderer
from models.request import AnswerRequest
from models.tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A bundle with everything that turns a request into ids and ids into text."""

    onnx: OnnxModel
    tokenizer: TextTokenizer
    renderer: PromptRenderer

    @classmethod
    def load(cls, folder: Path, *, threads: int = 0, provider: ExecutionProvider = "cpu") -> LoadedModel:
        """Check, open and warm a bundle. Raises BundleError."""
        bundle = Bundle.load(folder)
        tokenizer = TextTokenizer(folder / "tokenizer.json")
        renderer = PromptRenderer.from_folder(folder, tokenizer, bundle.manifest.shapes.image_tokens_per_tile)
        onnx = OnnxModel(bundle, threads=threads, provider=provider)
        onnx.warm_up()
        return cls(onnx=onnx, tokenizer=tokenizer, renderer=renderer)

    @property
    def bundle(self) -> Bundle:
        return self.onnx.bundle


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedPrompt:
    """What the engine needs of a request. `image_decode_ms` is None without pictures."""

    ids: list[int]
    tiles: tuple[TiledImage, ...]
    images: tuple[ImageReport, ...]
    image_decode_ms: float | None
    preprocess_ms: float

    @property
    def image_tokens(self) -> int:
        return sum(report.tokens or 0 for report in self.images)


def prepare(model: LoadedModel, request: AnswerRequest, clock: Callable[[], float]) -> PreparedPrompt:
    """Decode, tile and render. Raises BadRequest and its kin.

    The context is checked twice: with one tile a picture before anything is decoded, then with the real grids before
    anything is tiled.
    """
    shapes = model.onnx.shapes
    processing = model.bundle.manifest.processing.settings()
    _check_context(model.renderer.ids(request.messages, [Grid(0, 0)] * len(request.images)), shapes.max_positions)
    begun = clock()
    decoded = [decode_image(part.data) for part in request.images]
    decoded_at = clock()
    grids = [choose_grid(image.width, image.height, request.detail, processing) for image in decoded]
    ids = model.renderer.ids(request.messages, grids)
    _check_context(ids, shapes.max_positions)
    tiles = tuple(tile_image(image.image, request.detail, processing) for image in decoded)
    reports = tuple(
        _report(image, tiled, request.detail, shapes.image_tokens_per_tile)
        for image, tiled in zip(decoded, tiles, strict=True)
    )
    return PreparedPrompt(
        ids=ids,
        tiles=tiles,
        images=reports,
        image_decode_ms=(decoded_at - begun) * 1000 if decoded else None,
        preprocess_ms=(clock() - decoded_at) * 1000,
    )


def _check_context(ids: list[int], bound: int) -> None:
    if len(ids) >= bound:
        raise ContextLengthExceeded(
            f"the prompt has {len(ids)} tokens, and the model takes {bound} with the answer", param="prompt"
        )


def _report(image: DecodedImage, tiled: TiledImage, detail: Detail, tokens_per_tile: int) -> ImageReport:
    return ImageReport(
        width=image.width,
        height=image.height,
        used_width=tiled.used_width,
        used_height=tiled.used_height,
        tiles=len(tiled.pixels),
        tokens=len(tiled.pixels) * tokens_per_tile,
        sha256=image.sha256,
        detail=detail,
    )
