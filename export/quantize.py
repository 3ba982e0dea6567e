"""The recipes as data, and how each graph's weights are stored under them.

- Decoder: MatMulNBits by onnxruntime's own quantizer, weights in blocks, round to nearest, symmetric. accuracy_level 4
  multiplies in int8; left unset, it costs half the speed on a CPU.
- Vision: dynamic int8, in `export.vision`.
- Embeddings: int8 with a scale per row, in `export.graphs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx
import onnx_ir
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from models.bundle import GraphName, Recipe
from models.quality import GATES, Gate

ACCURACY_LEVEL_INT8 = 4
SMALLEST_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class RecipePlan:
    """One recipe: file suffix, bits of the decoder's matrices, and the gate its bundle must pass.

    `eight_bit_ladder` names, by parts of their names, matrices that stay at 8 bits all the same. Its rungs are tried in
    order until the gate is passed: large models stand 4 bits everywhere, the smallest do not. (SmolLM2-135M's weights
    over 2,048 tokens of English prose, mean KL by rung: 0.37, 0.24, 0.11; in 8 bits everywhere 0.009.)
    """

    suffix: str
    gate: Gate
    int8_vision_and_embeddings: bool = True
    decoder_bits: int | None = None
    decoder_block: int = 128
    eight_bit_ladder: tuple[tuple[str, ...], ...] = ((),)

    def weights(self, eight_bit_parts: tuple[str, ...]) -> dict[GraphName, str]:
        """In words, how each graph's weights are stored on that rung."""
        if self.decoder_bits is None:
            return {"vision_encoder": "float32", "embed_tokens": "float32", "decoder_model_merged": "float32"}
        decoder = f"{self.decoder_bits}-bit MatMulNBits in blocks of at most {self.decoder_block}"
        return {
            "vision_encoder": "MatMul in dynamic int8, 7 bits signed per channel; the rest float32",
            "embed_tokens": "int8, one scale per row",
            "decoder_model_merged": decoder + "".join(f"; {part} in 8 bits" for part in eight_bit_parts),
        }


RECIPES: Mapping[Recipe, RecipePlan] = MappingProxyType(
    {
        "fp32": RecipePlan(suffix="", gate=GATES["fp32"], int8_vision_and_embeddings=False),
        "int8": RecipePlan(suffix="_int8", gate=GATES["int8"], decoder_bits=8),
        "int4": RecipePlan(
            suffix="_q4",
            gate=GATES["int4"],
            decoder_bits=4,
            decoder_block=32,
            eight_bit_ladder=((), ("lm_head", "down_proj"), ("lm_head", "down_proj", "attn")),
        ),
    }
)


def quantize_decoder(model: onnx_ir.Model, plan: RecipePlan, eight_bit_parts: tuple[str, ...] = ()) -> onnx_ir.Model:
    """The decoder with its constant matrices as the plan says."""
    if plan.decoder_bits is None:
        return model
    decoder: onnx.ModelProto = onnx_ir.to_proto(model)
    rows_of = {tensor.name: tensor.dims[0] for tensor in decoder.graph.initializer}
    choices: dict[str, tuple[int, int]] = {}  # of each node: bits and block size
    for node in decoder.graph.node:
        if node.op_type == "MatMul" and node.input[1] in rows_of:
            eight = any(part in node.name for part in eight_bit_parts)
            bits, most = (8, 128) if eight else (plan.decoder_bits, plan.decoder_block)
            choices[node.name] = bits, _block_size(rows_of[node.input[1]], most)
    for bits, block_size in sorted(set(choices.values())):
        config = DefaultWeightOnlyQuantConfig(
            block_size=block_size, is_symmetric=True, accuracy_level=ACCURACY_LEVEL_INT8, bits=bits
        )
        others = [name for name, choice in choices.items() if choice != (bits, block_size)]
        quantizer = MatMulNBitsQuantizer(decoder, bits=bits, nodes_to_exclude=others, algo_config=config)
        quantizer.process()
        decoder = quantizer.model.model
    quantized: onnx_ir.Model = onnx_ir.from_proto(decoder)
    return quantized


def _block_size(rows: int, most: int) -> int:
    """The largest block that divides a matrix's rows: a remainder would be padded to a whole block of zeros."""
    block = most
    while rows % block and block > SMALLEST_BLOCK:
        block //= 2
    return block
