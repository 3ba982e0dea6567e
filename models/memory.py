"""What models need of memory, by formula from their shapes, and what fits into a budget.

One budget counts weights, the activations of a step, the features of pictures asked about before, and slots times
context: keys and values, which stay for the next prompt that begins alike, and the pixels of requests that wait for
their turn. `python -m models.memory` prints the table of models/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from models.bundle import Bundle, GraphName, Shapes
from models.catalog import ROWS, Row, Shape
from models.errors import BundleError, Unavailable
from models.kv_cache import CACHE_STEP, padded
from models.machine import Memory, memory
from models.onnx_model import POSITIONS_PER_STEP, TILE_PIXELS_PER_STEP

GB = 10**9
PROCESS_BYTES = 145_000_000  # Python, the libraries and ONNX Runtime, before any model: 118 MB imported
FEATURE_PICTURES = 16  # of so many square pictures the features are kept, or of as many frames as they have tiles
TILES = 17  # of a square picture in all published sizes, the global view included
LEAST_CONTEXT = 2048  # a picture of 17 tiles and an answer; with less a model is refused
SHARE_OF_FREE = 0.9  # of what is free, where no budget is set
# A loaded graph keeps a tenth more than its file; besides, its arena grows by doubling, up to this much. Peak over
# 2,048 positions and a picture of the 256M shape, onnxruntime 1.31, two Zen 3 cores: int8-fast 1.05 GB where 1.39 are
# counted, fp32 1.57 where 2.04 are.
LOADED, ARENA_BYTES = 1.1, 100_000_000


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one model. `scores_per_position`: attention of a prompt step, for each position of the context."""

    weights: int
    vision_step: int
    prompt_step: int
    scores_per_position: int
    cache_per_position: int
    tile_pixels: int
    tokens_per_tile: int
    features: int
    max_positions: int

    def activations(self, context: int) -> int:
        """Of a batch of tiles and a piece of the prompt: each session keeps what its largest step took."""
        return self.vision_step + self.prompt_step + min(context, self.max_positions) * self.scores_per_position

    def slot(self, context: int) -> int:
        """Of one cache slot, whether a sequence runs in it or it remembers one."""
        return padded(min(context, self.max_positions)) * self.cache_per_position

    def pixels(self, slots: int, context: int) -> int:
        """Of all requests that are prepared and not encoded yet: a picture for each slot, or one prompt of pictures."""
        return self.tile_pixels * max(slots * TILES, min(context, self.max_positions) // self.tokens_per_tile)


def need(shape: Shape, graph_bytes: Iterable[int], *, cache_value_bytes: int = 4) -> Need:
    """By formula, all values in float32 but the cache's. `graph_bytes`: each graph's file and external data."""
    patches = (shape.tile_px // shape.patch_px) ** 2
    tiles = max(1, TILE_PIXELS_PER_STEP // shape.tile_px**2)
    vision_heads = max(1, shape.vision_hidden // 64)
    tile = patches * (4 * vision_heads * patches + 2 * shape.vision_intermediate + 4 * shape.vision_hidden)
    position = 3 * shape.intermediate + 6 * shape.hidden
    return Need(
        weights=sum(round(LOADED * size + min(size, ARENA_BYTES)) for size in graph_bytes),
        vision_step=4 * tiles * (tile + 3 * shape.tile_px**2),
        prompt_step=4 * (POSITIONS_PER_STEP * position + shape.vocab),
        scores_per_position=4 * (2 * POSITIONS_PER_STEP * shape.heads + 2 * shape.hidden),
        cache_per_position=shape.cache_bytes_per_token(cache_value_bytes),
        tile_pixels=4 * 3 * shape.tile_px**2,
        tokens_per_tile=shape.image_tokens_per_tile,
        features=_feature_bytes(shape.image_tokens_per_tile, shape.hidden),
        max_positions=shape.max_positions,
    )


def feature_cache_bytes(shapes: Shapes) -> int:
    """How much a model's features may take, by the same formula."""
    return _feature_bytes(shapes.image_tokens_per_tile, shapes.hidden_size)


def _feature_bytes(tokens_per_tile: int, hidden: int) -> int:
    return 4 * FEATURE_PICTURES * TILES * tokens_per_tile * hidden


def shape_of(bundle: Bundle) -> Shape:
    """From its config.json. Raises BundleError."""
    try:
        return Shape.from_config(json.loads((bundle.folder / "config.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{bundle.folder / 'config.json'} does not tell the model's dimensions") from error


def need_of(bundle: Bundle) -> Need:
    """Of a bundle, from its manifest and config.json. Raises BundleError."""
    manifest = bundle.manifest
    shape = shape_of(bundle)
    graphs = {
        name: sum(entry.bytes for file, entry in manifest.files.items() if file.startswith(graph.file))
        for name, graph in manifest.graphs.items()
    }
    return _need_under(manifest.recipe, shape, graphs)


def need_of_row(row: Row, recipe: str) -> Need:
    """Of a model in the catalog, whether it is here or not."""
    return _need_under(recipe, row.shape, row.graph_bytes(recipe))


def _need_under(recipe: str, shape: Shape, graph_bytes: Mapping[GraphName, int]) -> Need:
    half = recipe in ("fp16", "q4f16")
    # A CPU widens float16 factors when it loads them (335 MB of them took 690, onnxruntime 1.31); rows looked up stay.
    widened = {"fp16": ("vision_encoder", "decoder_model_merged"), "q4f16": ("vision_encoder",)}.get(recipe, ())
    sizes = [size * (2 if graph in widened else 1) for graph, size in graph_bytes.items()]
    return need(shape, sizes, cache_value_bytes=2 if half else 4)


class Fit(NamedTuple):
    """What a budget allows: sequences that run at once, positions of each, and the bytes of it all."""

    slots: int
    context: int
    bytes: int


def fit(needs: Sequence[Need], budget: int, *, max_running: int = 4) -> Fit:
    """Slots first give way, one after the other, then the context. Raises Unavailable, with the sum, where none fits.

    Models that are loaded together share what runs at once, but each has that many slots of its own: what was asked of
    one stays in them while another answers.
    """
    longest = max(each.max_positions for each in needs)
    least = min(LEAST_CONTEXT, longest)
    choices = [(slots, longest) for slots in range(max_running, 0, -1)]
    choices += [(1, context) for context in range(longest // CACHE_STEP * CACHE_STEP, least - 1, -CACHE_STEP)]
    for slots, context in choices:
        if (needed := total_bytes(needs, slots, context)) <= budget:
            return Fit(slots, context, needed)
    parts = {
        "weights": sum(each.weights for each in needs),
        "activations": max(each.activations(least) for each in needs),
        "image features": sum(each.features for each in needs),
        f"one sequence of {least} positions": _running([Seat(each, 1, least) for each in needs]),
        "the process itself": PROCESS_BYTES,
    }
    terms = " + ".join(f"{size / GB:.2f} GB {name}" for name, size in parts.items())
    total = total_bytes(needs, 1, least) / GB
    raise Unavailable(f"too large for the memory budget of {budget / GB:.2f} GB: {terms} = {total:.2f} GB")


def plan(needs: Sequence[Need], budget: int, *, max_running: int = 4) -> list[Fit]:
    """For each model what it is loaded with: the first ones that fit together share the budget, the others come in
    their place and have all of it. Raises Unavailable, with the sum, for one that does not fit alone.
    """
    together: list[int] = []
    for place in range(len(needs)):
        if total_bytes([needs[each] for each in (*together, place)], 1, LEAST_CONTEXT) <= budget:
            together.append(place)
    alone = [fit([each], budget, max_running=max_running) for each in needs]
    shared = fit([needs[place] for place in together], budget, max_running=max_running)
    return [shared if place in together else alone[place] for place in range(len(needs))]


class Seat(NamedTuple):
    """A model in memory: so many slots, each of so many positions."""

    need: Need
    slots: int
    context: int


State = Literal["unloaded", "loading", "loaded", "unloading"]


class Residence(NamedTuple):
    """How it stands with a model of a service. `memory_bytes`: what the budget counts for it while it is in memory."""

    bundle: Bundle
    state: State
    slots: int
    context: int
    memory_bytes: int


def total_bytes(needs: Sequence[Need], slots: int, context: int) -> int:
    """Of a process that has these models loaded and that many sequences, each of `context` positions."""
    return seated_bytes([Seat(each, slots, context) for each in needs])


def seated_bytes(seats: Sequence[Seat]) -> int:
    """Of a process that has these in memory. As many sequences run at once as the roomiest of them has slots."""
    kept = sum(seat.need.weights + seat.need.features for seat in seats)
    activations = max((seat.need.activations(seat.context) for seat in seats), default=0)
    return PROCESS_BYTES + kept + activations + _running(seats)


def _running(seats: Sequence[Seat]) -> int:
    return sum(seat.slots * seat.need.slot(seat.context) for seat in seats) + pixel_bytes(seats)


def pixel_bytes(seats: Sequence[Seat]) -> int:
    """Of the requests that wait with their pictures decoded, whichever of these models they ask."""
    return max((seat.need.pixels(seat.slots, seat.context) for seat in seats), default=0)


def default_budget(machine: Memory | None = None) -> int:
    """Bytes: nine tenths of what is free on the machine, or in this process's control group where that is less."""
    found = machine or memory()
    return round(SHARE_OF_FREE * (found.total_bytes if found.free_bytes is None else found.free_bytes))


def table() -> str:
    """Markdown: what fits into 2, 4, 8 and 16 GB, for each size and two recipes."""
    sizes = (2, 4, 8, 16)
    lines = ["| model | " + " | ".join(f"{size} GB" for size in sizes) + " |", "| --- |" + " --- |" * len(sizes)]
    for name in ("smolvlm2-256m", "smolvlm2-500m", "smolvlm2-2.2b"):
        for recipe in ("int8", "int4"):
            wanted = need_of_row(ROWS[name], recipe)
            cells = [_cell(wanted, size * GB) for size in sizes]
            lines.append(f"| `{name}@{recipe}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(wanted: Need, budget: int) -> str:
    try:
        context = fit([wanted], budget, max_running=1).context
    except Unavailable:
        return "does not fit"
    slots = 1
    while total_bytes([wanted], slots + 1, LEAST_CONTEXT) <= budget:
        slots += 1
    return f"{context:,}; {slots}"


if __name__ == "__main__":
    print(table())
