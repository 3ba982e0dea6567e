"""The vision graph: tiles in, image features out, in float32, in float16, and with its matrices in int8.

optimum's exporter and its output validation write it, with a configuration of our own (optimum has none for this
family). It traces with TorchScript, whose graph is the plain one that ONNX Runtime's fusions and quantizer know.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantFormat, QuantizationMode, QuantType
from onnxruntime.transformers.float16 import convert_float_to_float16
from optimum.exporters.onnx import OnnxConfig, export, validate_model_outputs
from optimum.onnxruntime import ORTQuantizer, QuantizationConfig
from optimum.utils import DummyInputGenerator, NormalizedConfig
from torch import nn
from transformers import PretrainedConfig

from export.checkpoint import Checkpoint, CheckpointError
from export.graphs import OPSET, save_graph

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
        export(encoder, config, path, opset=OPSET)
    validate_model_outputs(config, encoder, path, ["image_features"], atol=VALIDATION_TOLERANCE, use_subprocess=False)
    graph = onnx.load(path)
    # The published layout has this input. Tiles are always full, so nothing reads it, and tracing would drop it.
    mask_shape: list[str | int | None] = [
        "batch_size",
        "num_images",
        checkpoint.processing.tile_px,
        checkpoint.processing.tile_px,
    ]
    graph.graph.input.append(helper.make_tensor_value_info("pixel_attention_mask", TensorProto.BOOL, mask_shape))
    save_graph(onnx_ir.from_proto(graph), path)


def halve_vision(source: Path, target: Path) -> None:
    """Write `source` with weights and arithmetic in float16; inputs and outputs stay float32."""
    # Its shape inference would serialize the model, which may be near protobuf's 2 GiB.
    half = convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=True)
    save_graph(onnx_ir.from_proto(half), target)


def quantize_vision(source: Path, target: Path, *, reduce_range: bool = True) -> None:
    """Write `source` with its constant MatMul weights in int8.

    reduce_range keeps weights to 7 bits. On processors without VNNI (AVX2, early AVX-512) the kernels add two u8 * s8
    products in 16 bits, which saturates at full range: the same file then gives other features there than elsewhere.
    Measured with AVX2 on tiny-scenes: lowest cosine of a feature 0.9998 with 7 bits, 0.9991 with 8.
    """
    graph = onnx.load(source, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    # Attention multiplies two activations; quantizing those at run time measured slower than float.
    excluded = [node.name for node in products if not constants & set(node.input)]
    if any(not node.name for node in products):
        raise CheckpointError("the vision graph has MatMul nodes without names")
    config = QuantizationConfig(
        is_static=False,
        format=QuantFormat.QOperator,
        mode=QuantizationMode.IntegerOps,
        activations_dtype=QuantType.QUInt8,
        weights_dtype=QuantType.QInt8,
        weights_symmetric=True,
        per_channel=True,
        reduce_range=reduce_range,
        nodes_to_exclude=excluded,
        operators_to_quantize=["MatMul"],
    )
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # The configuration is only written beside the graph; without one, optimum looks for it and warns.
        ORTQuantizer(source, config=PretrainedConfig()).quantize(config, folder, file_suffix=None)
        Path(folder, source.name).replace(target)
