"""A checkpoint's three ONNX graphs in float32, in the published layout.

- Vision: `export.vision`.
- Decoder: onnxruntime-genai's model builder. It writes GroupQueryAttention with rotary embedding inside, whose past and
  present may share one buffer; a traced graph would copy the whole cache at every token. Its classes are called
  directly: `create_model` wants the text model on disk a second time and loads tokenizers by Auto classes.
- Embeddings: one Gather, written by hand.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime_genai.models.builders.llama import LlamaModel
from transformers import AutoModelForCausalLM

from export.checkpoint import Checkpoint

OPSET = 20  # the newest that the TorchScript exporter writes; LayerNormalization and Gelu are one node each
EXTERNAL_DATA_BYTES = 1_800_000_000  # a protobuf file ends at 2 GiB
LM_HEAD = "/lm_head/MatMul"


def write_embeddings(checkpoint: Checkpoint, path: Path, *, int8: bool) -> None:
    """Write input_ids [batch, position] -> inputs_embeds [batch, position, hidden]; in int8 with one scale per row."""
    table = checkpoint.model.get_input_embeddings().weight.detach().numpy()
    shape: list[str | int | None] = ["batch_size", "sequence_length"]
    if int8:
        scale = np.maximum(np.abs(table).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)
        rows = np.round(table / scale).astype(np.int8)
        weights = {"embed_tokens.weight": rows, "embed_tokens.scale": scale.astype(np.float32)}
        nodes = [
            helper.make_node("Gather", ["embed_tokens.weight", "input_ids"], ["rows"]),
            helper.make_node("Gather", ["embed_tokens.scale", "input_ids"], ["scales"]),
            helper.make_node("Cast", ["rows"], ["levels"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["levels", "scales"], ["inputs_embeds"]),
        ]
    else:
        weights = {"embed_tokens.weight": table}
        nodes = [helper.make_node("Gather", ["embed_tokens.weight", "input_ids"], ["inputs_embeds"])]
    graph = helper.make_graph(
        nodes,
        "embed_tokens",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape)],
        [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, [*shape, table.shape[1]])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    save_graph(model, path)


def build_decoder(checkpoint: Checkpoint) -> onnx.ModelProto:
    """The fused decoder: inputs_embeds, attention_mask, num_logits_to_keep, past_key_values.* -> logits, present.*."""
    model = checkpoint.model
    config = model.config.text_config
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):  # a causal model around the weights that are loaded already
        causal = AutoModelForCausalLM.from_config(config)
    causal.model, causal.lm_head = model.model.text_model, model.lm_head
    options = {"exclude_embeds": True, "hf_token": "false", "hf_remote": False}
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        float32 = onnx_ir.DataType.FLOAT
        builder = LlamaModel(config, float32, float32, "cpu", cache, options)
        builder.window_size = -1  # its sign for none; smollm3's configuration says None
        builder.load_weights = lambda _path: causal
        # The builder takes any Linear with as many outputs as the vocabulary has entries for the head.
        builder.has_lm_head = lambda module: module is causal.lm_head
        builder.make_model("")
        builder.model.graph.sort()
        decoder: onnx.ModelProto = onnx_ir.to_proto(builder.model)
    _leave_unrotated(decoder, [layer for layer, rope in enumerate(getattr(config, "no_rope_layers", [])) if not rope])
    keep_last_logits(decoder)
    return decoder


def _leave_unrotated(decoder: onnx.ModelProto, layers: list[int]) -> None:
    """Take the rotary embedding out of those layers' attention: smollm3 has none in every fourth.

    The builder's own class for smollm3 (0.14.1) puts a separate RotaryEmbedding there instead.
    """
    names = [f"/model/layers.{layer}/attn/GroupQueryAttention" for layer in layers]
    for node in decoder.graph.node:
        if node.name in names:
            node.input[7] = node.input[8] = ""  # cosines and sines
            next(attribute for attribute in node.attribute if attribute.name == "do_rotary").i = 0


def keep_last_logits(decoder: onnx.ModelProto) -> None:
    """Add the scalar input `num_logits_to_keep`: logits of the last that many positions, 0 for all.

    A prompt step needs the last position's alone, and computes vocabulary x hidden products for each one more.
    """
    graph = decoder.graph
    head = next(node for node in graph.node if node.name == LM_HEAD)
    first_last_axis = {"first": [-1], "end": [np.iinfo(np.int64).max], "axis": [1]}
    for name, values in first_last_axis.items():
        graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), f"keep/{name}"))
    # hidden[:, -n:], and for n = 0 hidden[:, 0:], which is everything
    nodes = [
        helper.make_node("Mul", ["num_logits_to_keep", "keep/first"], ["keep/start"], name="/keep/Mul"),
        helper.make_node(
            "Slice", [head.input[0], "keep/start", "keep/end", "keep/axis"], ["keep/hidden"], name="/keep/Slice"
        ),
    ]
    head.input[0] = "keep/hidden"
    place = list(graph.node).index(head)
    for offset, node in enumerate(nodes):
        graph.node.insert(place + offset, node)
    graph.input.append(helper.make_tensor_value_info("num_logits_to_keep", TensorProto.INT64, []))
    logits = next(output for output in graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "num_logits"
    del graph.value_info[:]  # the builder's shapes behind the slice no longer hold


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Save as one file, or with its weights in `<file>_data` where one file would pass protobuf's 2 GiB."""
    data = path.with_name(path.name + "_data")
    for old in (path, data):
        old.unlink(missing_ok=True)
    weights_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if weights_bytes < EXTERNAL_DATA_BYTES:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=1024)
