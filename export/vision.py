"""The vision graph: tiles in, image features out, in float32, in float16, and with its matrices in int8.

optimum's exporter and its output validation write it, with a configuration of our own (optimum has none for this
family). It traces with TorchScript, whose graph is the plain one that ONNX Runtime's fusions and quantizer know.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from optimum.exporters.onnx import OnnxConfig, export, validate_model_outputs
from optimum.utils import DummyInputGenerator, NormalizedConfig
from torch import nn

from export.checkpoint import Checkpoint
from export.graphs import OPSET, save_graph
from export.quantize import constant_products, to_dynamic_int8
from models.quality import Floats, QualityGateFailed, cosines

LEAST_COSINE = 0.999  # mean over image tokens
VALIDATION_TOLERANCE = 1e-3


class TileEncoder(nn.Module):
    """Vision tower and connector: pixel_values [batch, n, 3, H, W] -> image_features [batch * n, S, hidden]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config.vision_config
        self.vision, self.connector = model.model.vision_model, model.model.connector

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.vision.embeddings(pixel_values.flatten(0, 1))
        # Called without the tower's own forward: that builds a mask, and in a full tile every patch sees every other.
        hidden = self.vision.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        return {"image_features": self.connector(self.vision.post_layernorm(hidden))}


class _TileInputs(DummyInputGenerator):  # type: ignore[misc]
    """Random tiles to trace with: two pictures of two tiles, so that neither dimension is taken for a constant."""

    SUPPORTED_INPUT_NAMES = ("pixel_values",)

    def __init__(self, task: str, config: Any, **_: Any) -> None:
        self.side_px, self.channels = config.image_size, config.num_channels

    def generate(self, input_name: str, framework: str = "pt", **_: Any) -> Any:
        pixels = np.random.default_rng(0).uniform(-1, 1, (2, 2, self.channels, self.side_px, self.side_px))
        return torch.from_numpy(pixels).float() if framework == "pt" else pixels.astype(np.float32)


class _VisionOnnxConfig(OnnxConfig):  # type: ignore[misc]
    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (_TileInputs,)
    DEFAULT_ONNX_OPSET = OPSET
    inputs: ClassVar = {"pixel_values": {0: "batch_size", 1: "num_images"}}
    outputs: ClassVar = {"image_features": {0: "num_tiles"}}


def write_vision(checkpoint: Checkpoint, path: Path) -> None:
    """Write the vision graph and check it against torch on random tiles (optimum raises where it differs)."""
    encoder = TileEncoder(checkpoint.model)
    config = _VisionOnnxConfig(checkpoint.model.config.vision_config)
    with warnings.catch_warnings():
        # TracerWarning: pixel_shuffle turns constant sizes into ints; DeprecationWarning: of the TorchScript exporter.
        warnings.simplefilter("ignore")
        # Its fix of the axes would run the graph, unoptimized, to learn two sizes: minutes with a large model.
        export(encoder, config, path, opset=OPSET, disable_dynamic_axes_fix=True)
    graph = onnx.load(path)
    _, image_tokens, hidden = graph.graph.output[0].type.tensor_type.shape.dim
    image_tokens.dim_value, hidden.dim_value = checkpoint.shapes.image_tokens_per_tile, checkpoint.shapes.hidden_size
    onnx.save(graph, path)
    validate_model_outputs(config, encoder, path, ["image_features"], atol=VALIDATION_TOLERANCE, use_subprocess=False)
    # The published layout has this input. Tiles are always full, so nothing reads it, and tracing would drop it.
    mask_shape: list[str | int | None] = [
        "batch_size",
        "num_images",
        checkpoint.processing.tile_px,
        checkpoint.processing.tile_px,
    ]
    graph.graph.input.append(helper.make_tensor_value_info("pixel_attention_mask", TensorProto.BOOL, mask_shape))
    save_graph(ir.from_proto(graph), path)


def halve_vision(source: Path, target: Path) -> None:
    """Write `source` with weights and arithmetic in float16; inputs and outputs stay float32."""
    # Its shape inference would serialize the model, which may be near protobuf's 2 GiB.
    half = convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=True)
    save_graph(ir.from_proto(half), target)


def quantize_vision(source: Path, target: Path, tiles: Floats) -> str:
    """Write `source` with its constant matrices in dynamic int8; returns in words how, checked on those tiles.

    One scale for all that a matrix is fed is the faster way (933 ms a tile of SmolVLM2-256M against 1,007 by row; fp32
    1,342; two Zen 3 cores, AVX2), and by row the one that stands rows of very different size. Raises QualityGateFailed
    where neither reaches the cosine that int8 asks for.
    """
    expected = _encode(source, tiles)
    for by_row in (False, True):
        graph = ir.load(source)
        to_dynamic_int8(graph, constant_products(graph), by_row=by_row)
        save_graph(graph, target)
        cosine = float(cosines(expected, _encode(target, tiles)).mean())
        if cosine >= LEAST_COSINE:
            return f"MatMul in dynamic int8{' by row' if by_row else ''}, one scale per output; the rest float32"
    raise QualityGateFailed(f"the vision graph's cosine in int8 is {cosine:.5f}, at least {LEAST_COSINE} is asked for")


def _encode(graph: Path, tiles: Floats) -> Floats:
    """One tile at a time: a tile of SmolVLM2-2.2B has 200 MB of attention."""
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    mask = np.ones((1, 1, *tiles.shape[2:]), dtype=bool)
    feeds = [{"pixel_values": tile[None, None], "pixel_attention_mask": mask} for tile in tiles]
    return np.concatenate([session.run(["image_features"], feed)[0] for feed in feeds])
