"""Every known model as a row of `catalog.json`: where it is published, its licence, its shape, what is claimed of it.

Parameters, bytes and names follow from the rows. A revision stays null until somebody who has read the published files
fills it in, and what nobody measured is null.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from models.bundle import REQUIRED_GRAPHS, GraphName
from models.errors import NotFound

NOT_VERIFIED = "not yet verified on published weights"
DEFAULT_RECIPE = "int4"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a model's size follows from. The text model is Llama's, the vision tower SigLIP's, in between one matrix."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    tile_px: int
    patch_px: int
    scale_factor: int  # patches to a side that become one image token

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """From a checkpoint's config.json; defaults as transformers' configuration classes have them.

        Raises KeyError, TypeError or ValueError for one that lacks a dimension.
        """
        text, vision = config["text_config"], config["vision_config"]
        return cls(
            hidden=int(text["hidden_size"]),
            intermediate=int(text["intermediate_size"]),
            layers=int(text["num_hidden_layers"]),
            heads=int(text["num_attention_heads"]),
            kv_heads=int(text.get("num_key_value_heads") or text["num_attention_heads"]),
            head_dim=int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]),
            vocab=int(text["vocab_size"]),
            max_positions=int(text["max_position_embeddings"]),
            vision_hidden=int(vision["hidden_size"]),
            vision_intermediate=int(vision.get("intermediate_size", 3072)),
            vision_layers=int(vision.get("num_hidden_layers", 12)),
            tile_px=int(vision["image_size"]),
            patch_px=int(vision["patch_size"]),
            scale_factor=int(config.get("scale_factor", 2)),
        )

    @property
    def image_tokens_per_tile(self) -> int:
        return (self.tile_px // self.patch_px // self.scale_factor) ** 2

    @property
    def parameters_by_graph(self) -> dict[GraphName, int]:
        """Weights of each graph. `lm_head` is untied, and belongs to the decoder."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        vision_layer = 4 * self.vision_hidden * (self.vision_hidden + 1) + 4 * self.vision_hidden
        vision_layer += (
            2 * self.vision_hidden * self.vision_intermediate + self.vision_hidden + self.vision_intermediate
        )
        patches = (self.tile_px // self.patch_px) ** 2
        embedding = self.vision_hidden * (3 * self.patch_px**2 + 1 + patches)
        connector = self.vision_hidden * self.scale_factor**2 * self.hidden
        return {
            "vision_encoder": embedding + self.vision_layers * vision_layer + 2 * self.vision_hidden + connector,
            "embed_tokens": self.vocab * self.hidden,
            "decoder_model_merged": self.layers * layer + self.hidden + self.vocab * self.hidden,
        }

    @property
    def parameters(self) -> int:
        return sum(self.parameters_by_graph.values())

    def cache_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Keys and values of one position in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value


class Claim(NamedTuple):
    """What somebody else says of a model. `figure` None: said in words, and no published figure was found."""

    measure: str
    figure: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model. `published_onnx`: does its repository hold the three graphs; `revision`: a checked commit, or null."""

    name: str
    hub_id: str | None
    license: str
    shape: Shape
    claims: tuple[Claim, ...] = ()
    published_onnx: bool = True
    revision: str | None = None
    measured: str | None = None
    notice: str | None = None

    def graph_bytes(self, recipe: str) -> dict[GraphName, int]:
        """Weights on disk under a recipe, by formula; the graphs' own structure, 1 to 3 MB each, is not in it."""
        per_weight = EXPORTED_BYTES_PER_WEIGHT[recipe]
        if self.published_onnx and recipe in PUBLISHED:
            per_weight = {graph: _SUFFIX_BYTES[choice.suffix] for graph, choice in PUBLISHED[recipe].items()}
        return {graph: round(count * per_weight[graph]) for graph, count in self.shape.parameters_by_graph.items()}

    def file_bytes(self, recipe: str) -> int:
        """Of all graphs."""
        return sum(self.graph_bytes(recipe).values())


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a recipe of a shape was on a machine whose processor had `needs`. None: not measured there."""

    shape: Shape
    recipe: str
    needs: str
    vision_ms_per_tile: float | None
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    machine: str


@dataclass(frozen=True, kw_only=True)
class StartUp:
    """What a first start with that model alone takes until it is ready, and what it may.

    `modules` are Python's, `read_bytes` all that the process reads: a clock says little on a busy machine, and these
    are held by a test. `ready_s` with its `machine`: measured, or None.
    """

    shape: Shape
    recipe: str
    budget_s: float
    ready_s: float | None
    machine: str | None
    modules: int
    read_bytes: int


class Alias(NamedTuple):
    """A name that reviews use and no published checkpoint bears, and what it stands for here."""

    model: str
    recipe: str | None
    notice: str
    claims: tuple[Claim, ...]


class GraphChoice(NamedTuple):
    """The published file suffix that a graph takes under a recipe, and why."""

    suffix: str
    why: str


def _claims(by_source: Mapping[str, Mapping[str, float | None]]) -> tuple[Claim, ...]:
    return tuple(
        Claim(measure, figure, source) for source, said in by_source.items() for measure, figure in said.items()
    )


_DATA: Mapping[str, Any] = json.loads((Path(__file__).parent / "catalog.json").read_text(encoding="utf-8"))
_SHAPES = {name: Shape(**shape) for name, shape in _DATA["shapes"].items()}
ROWS: Mapping[str, Row] = MappingProxyType(
    {
        name: Row(**{**row, "name": name, "shape": _SHAPES[row["shape"]], "claims": _claims(row["claims"])})
        for name, row in _DATA["models"].items()
    }
)
ALIASES: Mapping[str, Alias] = MappingProxyType(
    {name: Alias(**{**alias, "claims": _claims(alias["claims"])}) for name, alias in _DATA["aliases"].items()}
)
# As serving/bench/README.md has them: a prompt of 1,024 tokens, decoding behind 128; and export/README.md: largest
# resident memory.
SPEEDS = tuple(Speed(**{**each, "shape": _SHAPES[each["shape"]]}) for each in _DATA["speeds"])
START_UPS = tuple(StartUp(**{**each, "shape": _SHAPES[each["shape"]]}) for each in _DATA["start_up"])
EXPORT_PEAK_BYTES: Mapping[Shape, Mapping[str, int]] = MappingProxyType(
    {
        _SHAPES[name]: {recipe: round(peak * 1e9) for recipe, peak in peaks.items()}
        for name, peaks in _DATA["export_peak_gb"].items()
    }
)
# int8 is missing on purpose: the published 8-bit files multiply in dynamic int8 everywhere, which measured a mean KL of
# 0.53 on SmolLM2-135M's weights where this project's int8 holds 0.02. It is exported from the checkpoint instead.
PUBLISHED: Mapping[str, Mapping[GraphName, GraphChoice]] = MappingProxyType(
    {
        recipe: {graph: GraphChoice(**choice) for graph, choice in graphs.items()}
        for recipe, graphs in _DATA["published_files"].items()
    }
)
# MatMulNBits in blocks of 32 adds a float32 scale and half a byte of zero point to every 32 weights.
_SUFFIX_BYTES = MappingProxyType({"": 4.0, "_fp16": 2.0, "_q4": 0.5 + 4.5 / 32})
# What `nearfar export` writes: vision, embeddings, decoder. int8-fast has a second decoder for the prompt; int4 is as
# its most careful rung makes it, the smallest models' own.
_EXPORTED = {
    "fp32": (4.0, 4.0, 4.0),
    "fp16": (2.0, 2.0, 2.0),
    "int8": (1.0, 1.0, 1 + 4 / 128),
    "int8-fast": (1.0, 1.0, 2 + 4 / 128),
    "int4": (1.0, 1.0, 115e6 / 134.6e6),
}
EXPORTED_BYTES_PER_WEIGHT: Mapping[str, Mapping[GraphName, float]] = MappingProxyType(
    {recipe: dict(zip(REQUIRED_GRAPHS, each, strict=True)) for recipe, each in _EXPORTED.items()}
)
OTHER_RECIPES = ("q4f16", "auto")  # of the export, whose sizes follow from more than the shapes


class Named(NamedTuple):
    """What a model's name stands for. `recipe` None: the name did not say."""

    row: Row
    recipe: str | None
    notice: str | None


def find(name: str) -> Named:
    """The row behind `model`, `model@recipe`, `local/model` or an alias. Raises NotFound with the nearest names."""
    short, _, recipe = name.removeprefix("local/").partition("@")
    alias = ALIASES.get(short)
    row = ROWS.get(alias.model if alias else short)
    if row is None:
        near = difflib.get_close_matches(short[:200], [*ROWS, *ALIASES], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join([*ROWS, *ALIASES])}"
        raise NotFound(f"there is no model {name[:200]!r}; {hint}", param="model")
    return Named(row, recipe or (alias.recipe if alias else None), alias.notice if alias else row.notice)


def meaning(name: str, aliases: Mapping[str, tuple[str, str]]) -> tuple[str, str | None]:
    """What a name stands for under these aliases, and the notice that says so; itself and None where it is none."""
    short = name.removeprefix("local/")
    alias, at, recipe = short.partition("@")
    if alias not in aliases:
        return short, None
    meant, notice = aliases[alias]
    return (f"{meant.partition('@')[0]}@{recipe}" if at else meant), notice
