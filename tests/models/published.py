"""tiny-scenes in the published ONNX layout, as other exporters write it: several kinds of decoder, types and files.

The concatenating decoder is traced from torch; the others are our own float32 graphs, converted.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16
from transformers import DynamicCache

from export.checkpoint import load_checkpoint
from models.tiny_scenes import BUNDLES

CHECKPOINT = Path(__file__).parents[2] / "models" / "tiny_scenes" / "checkpoint"
OURS = BUNDLES["tiny-scenes@fp32"]
GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")


def publish(folder: Path) -> Path:
    """Write the folder: suffixes none (concatenating decoder), fp16, q4 (shared cache), q4f16; other files beside."""
    shutil.copytree(OURS, folder, ignore=shutil.ignore_patterns("manifest.json", "decoder_model_merged.onnx"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "model.safetensors").write_bytes(b"not needed here")
    onnx_folder = folder / "onnx"
    write_concatenating_decoder(onnx_folder / "decoder_model_merged.onnx")
    for graph in GRAPHS:
        whole = onnx.load(onnx_folder / f"{graph}.onnx")
        # Published fp16 decoders take and give float32, with a float16 cache; ours here has the vision graph in float16
        # to its edges.
        edges = {"vision_encoder": [], "embed_tokens": ["inputs_embeds"]}.get(graph, ["inputs_embeds", "logits"])
        onnx.save(half(whole, keep=edges), onnx_folder / f"{graph}_fp16.onnx")
    shared = onnx.load(OURS / "onnx" / "decoder_model_merged.onnx")
    four_bits = in_four_bits(shared)
    onnx.save(four_bits, onnx_folder / "decoder_model_merged_q4.onnx")
    onnx.save(half(four_bits, keep=["inputs_embeds", "logits"]), onnx_folder / "decoder_model_merged_q4f16.onnx")
    return folder


def in_four_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights in 4 bits as published: accuracy_level is left unset."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=None)
    quantizer = MatMulNBitsQuantizer(copy, algo_config=config)
    quantizer.process()
    result: onnx.ModelProto = quantizer.model.model
    return result


def half(model: onnx.ModelProto, keep: list[str]) -> onnx.ModelProto:
    """The graph in float16, with those inputs and outputs left in float32."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says of every tiny weight that it was rounded
        result: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=keep, disable_shape_infer=True)
    return result


def with_external_data(path: Path) -> None:
    """Move a graph's weights into `<file>_data`, as files over 2 GB have them."""
    onnx.save(onnx.load(path), path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=1024)


class _Concatenating(torch.nn.Module):
    """The text model with its cache as plain inputs and outputs, each step's being a longer copy."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text, self.head = model.model.text_model, model.lm_head
        self.text.config._attn_implementation = "eager"

    def forward(self, embeds: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, *past: torch.Tensor) -> Any:
        cache = DynamicCache()
        for layer, pair in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(*pair, layer)
        seen = (torch.arange(mask.shape[1])[None, :] <= positions[0][:, None]) & mask.bool()
        bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        out = self.text(inputs_embeds=embeds, attention_mask=bias, position_ids=positions, past_key_values=cache)
        present = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (self.head(out.last_hidden_state), *present)


def write_concatenating_decoder(path: Path) -> None:
    """The decoder as a traced graph: position_ids, logits of every position, past and present of different lengths."""
    model = load_checkpoint(CHECKPOINT).model
    text = model.config.text_config
    places = [f"{layer}.{part}" for layer in range(text.num_hidden_layers) for part in ("key", "value")]
    past = [torch.randn(1, text.num_key_value_heads, 5, text.head_dim) for _ in places]
    inputs = ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{place}" for place in places)]
    outputs = ["logits", *(f"present.{place}" for place in places)]
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in (inputs[0], inputs[2], "logits")}
    axes["attention_mask"] = {0: "batch_size", 1: "total_sequence_length"}
    axes |= {name: {0: "batch_size", 2: "past_sequence_length"} for name in inputs[3:]}
    axes |= {name: {0: "batch_size", 2: "total_sequence_length"} for name in outputs[1:]}
    example = (torch.randn(1, 3, text.hidden_size), torch.ones(1, 8, dtype=torch.int64), torch.arange(5, 8)[None])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's notes on constants, and its own deprecation
        torch.onnx.export(
            _Concatenating(model).eval(), (*example, *past), str(path), input_names=inputs, output_names=outputs,
            dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip
