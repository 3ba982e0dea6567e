"""Every known model as a row of data: where it is published, under what licence, what shape it has, what is claimed.

Parameters, bytes and names follow from the rows; nothing here opens a file or a connection. A revision stays null until
somebody who has read the published files fills it in, and what nobody measured is null.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from models.bundle import GraphName
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

    def file_bytes(self, recipe: str) -> int:
        """Weights on disk under a recipe, by formula; the graphs' own structure, 1 to 3 MB each, is not in it."""
        per_weight = EXPORTED_BYTES_PER_WEIGHT[recipe]
        if self.published_onnx and recipe in PUBLISHED:
            per_weight = {graph: _SUFFIX_BYTES[choice.suffix] for graph, choice in PUBLISHED[recipe].items()}
        return round(sum(count * per_weight[graph] for graph, count in self.shape.parameters_by_graph.items()))

    def memory_bytes(self, recipe: str) -> int:
        """Weights and one sequence's cache over the full context, by formula; activations are not in it."""
        cache = self.shape.cache_bytes_per_token(2 if recipe == "fp16" else 4)
        return self.file_bytes(recipe) + self.shape.max_positions * cache


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


def _scores(source: str, **figures: float) -> tuple[Claim, ...]:
    return tuple(Claim(measure.replace("_", " "), figure, source) for measure, figure in figures.items())


_CARD = "model card of "
_PAPER = "arXiv 2504.05299"
_REVIEW_ONLY = "review only, no published figure found"
_V2_256M, _V2_500M = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
_V1_256M, _V1_500M = "HuggingFaceTB/SmolVLM-256M-Instruct", "HuggingFaceTB/SmolVLM-500M-Instruct"
_V2_2B, _DOCLING = "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "docling-project/SmolDocling-256M-preview"

_256M = Shape(
    hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_dim=64, vocab=49280, max_positions=8192,
    vision_hidden=768, vision_intermediate=3072, vision_layers=12, tile_px=512, patch_px=16, scale_factor=4,
)  # fmt: skip
_500M = replace(_256M, hidden=960, intermediate=2560, layers=32, heads=15, kv_heads=5)
_2B = Shape(
    hidden=2048, intermediate=8192, layers=24, heads=32, kv_heads=32, head_dim=64, vocab=49280, max_positions=8192,
    vision_hidden=1152, vision_intermediate=4304, vision_layers=27, tile_px=384, patch_px=14, scale_factor=3,
)  # fmt: skip
_TINY = Shape(
    hidden=192, intermediate=512, layers=4, heads=6, kv_heads=2, head_dim=32, vocab=552, max_positions=1024,
    vision_hidden=192, vision_intermediate=768, vision_layers=4, tile_px=64, patch_px=8, scale_factor=2,
)  # fmt: skip

ROWS: Mapping[str, Row] = MappingProxyType(
    {
        row.name: row
        for row in (
            Row(
                name="smolvlm2-2.2b", hub_id=_V2_2B, license="Apache-2.0", shape=_2B, published_onnx=False,
                claims=_scores(_CARD + _V2_2B, MMMU=42, OCRBench=72.9, AI2D=70, ChartQA=68.84, TextVQA=73.21,
                               DocVQA=79.98, Video_MME=52.1, MLVU=55.2, MVBench=46.27, GPU_RAM_video_GB=5.2)
                + _scores(_PAPER, GPU_RAM_one_image_GB=4.9),
            ),
            Row(
                name="smolvlm2-500m", hub_id=_V2_500M, license="Apache-2.0", shape=_500M,
                claims=_scores(_CARD + _V2_500M, Video_MME=42.2, MLVU=47.3, MVBench=39.73, GPU_RAM_video_GB=1.8),
            ),
            Row(
                name="smolvlm2-256m", hub_id=_V2_256M, license="Apache-2.0", shape=_256M,
                claims=_scores(_CARD + _V2_256M, Video_MME=33.7, MLVU=40.6, MVBench=32.7, GPU_RAM_video_GB=1.38),
            ),
            Row(
                name="smolvlm-2.2b", hub_id="HuggingFaceTB/SmolVLM-Instruct", license="Apache-2.0",
                shape=replace(_2B, vocab=49155, max_positions=16384),
                claims=_scores(_CARD + _V2_2B, MMMU=38.3, OCRBench=65.5, AI2D=84.5, ChartQA=71.6, TextVQA=72.1,
                               DocVQA=79.7),
            ),
            Row(
                name="smolvlm-500m", hub_id=_V1_500M, license="Apache-2.0", shape=_500M,
                claims=_scores(_CARD + _V1_500M, MMMU=33.7, OCRBench=61, AI2D=59.5, ChartQA=63.2, TextVQA=60.5,
                               DocVQA=70.5)
                + _scores(_PAPER, GPU_RAM_one_image_GB=1.2),
            ),
            Row(
                name="smolvlm-256m", hub_id=_V1_256M, license="Apache-2.0", shape=_256M,
                claims=_scores(_CARD + _V1_256M, MMMU=28.3, OCRBench=52.6, AI2D=47, ChartQA=55.8, TextVQA=49.9,
                               DocVQA=58.3)
                + _scores(_PAPER, GPU_RAM_one_image_GB=0.8),
            ),
            Row(
                name="smoldocling-256m", hub_id=_DOCLING, license="CDLA-Permissive-2.0", shape=_256M,
                claims=_scores(_CARD + _DOCLING, seconds_per_page_on_A100=0.35),
                notice="smoldocling-256m is made for documents: it answers with their layout as markup.",
            ),
            Row(
                name="tiny-scenes", hub_id=None, license="Apache-2.0", shape=_TINY, published_onnx=False,
                measured="exact match on held-out drawn scenes, by kind of question: models/tiny_scenes/README.md",
                notice="tiny-scenes is a toy: it knows drawn shapes and numbers, and nothing of photographs.",
            ),
        )
    }
)  # fmt: skip

ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "smolvlm2-turbo": Alias(
            "smolvlm2-500m",
            "int4",
            "No published checkpoint is called SmolVLM2 Turbo: smolvlm2-turbo stands for smolvlm2-500m@int4.",
            (Claim("below 2B parameters, under 2 GB, ONNX and MLX export", None, _REVIEW_ONLY),),
        ),
        "smolvlm-3b": Alias(
            "smolvlm2-2.2b",
            None,
            "No published checkpoint is called SmolVLM-3B: smolvlm-3b stands for smolvlm2-2.2b, the nearest; "
            "NEARFAR_SMOLVLM_3B=BUNDLE puts one of your own in its place.",
            (Claim("3B parameters, runs on the device", None, _REVIEW_ONLY),),
        ),
    }
)

# int8 is missing on purpose: the published 8-bit files multiply in dynamic int8 everywhere, which measured a mean KL of
# 0.53 on SmolLM2-135M's weights where this project's int8 holds 0.02. It is exported from the checkpoint instead.
PUBLISHED: Mapping[str, Mapping[GraphName, GraphChoice]] = MappingProxyType(
    {
        "fp32": {
            "vision_encoder": GraphChoice("", "the reference"),
            "embed_tokens": GraphChoice("", "the reference"),
            "decoder_model_merged": GraphChoice("", "the reference"),
        },
        "fp16": {
            "vision_encoder": GraphChoice("_fp16", "half the bytes; made for a GPU, a CPU widens it to fp32"),
            "embed_tokens": GraphChoice("_fp16", "half the bytes; a look-up loses nothing that the decoder keeps"),
            "decoder_model_merged": GraphChoice("_fp16", "half the bytes and half the cache; made for a GPU"),
        },
        "int4": {
            "vision_encoder": GraphChoice("", "fp32: a CPU widens fp16 anyway, and no quality of the others is known"),
            "embed_tokens": GraphChoice("_fp16", "half the bytes; a look-up loses nothing that the decoder keeps"),
            "decoder_model_merged": GraphChoice(
                "_q4", "fewest bytes a token; accuracy_level is set to 4, which doubles its speed on a CPU"
            ),
        },
    }
)
# MatMulNBits in blocks of 32 adds a float32 scale and half a byte of zero point to every 32 weights.
_SUFFIX_BYTES = MappingProxyType({"": 4.0, "_fp16": 2.0, "_q4": 0.5 + 4.5 / 32})
_INT8: Mapping[GraphName, float] = MappingProxyType(
    {"vision_encoder": 1.0, "embed_tokens": 1.0, "decoder_model_merged": 1 + 4 / 128}
)
# What `nearfar export` writes; int4 with its most careful rung, the smallest models' own.
EXPORTED_BYTES_PER_WEIGHT: Mapping[str, Mapping[GraphName, float]] = MappingProxyType(
    {
        "fp32": dict.fromkeys(_INT8, 4.0),
        "fp16": dict.fromkeys(_INT8, 2.0),
        "int8": dict(_INT8),
        "int4": {**_INT8, "decoder_model_merged": 115e6 / 134.6e6},
    }
)


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
