"""A bundle's three ONNX graphs as typed functions over NumPy arrays. The only module that opens ONNX Runtime sessions.

It knows graphs and buffers, not prompts: tiles in, features out; ids in, embeddings out; embeddings and a cache in,
logits out. Not safe for concurrent use: one thread owns a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from models.bundle import Bundle, GraphName
from models.errors import BundleError, ContextLengthExceeded, Unavailable

Floats = npt.NDArray[np.float32]
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
ExecutionProvider = Literal["auto", "cpu", "cuda"]
CACHE_STEP = 64  # positions; a cache's length is rounded up to it


def execution_providers(choice: ExecutionProvider) -> list[str]:
    """ONNX Runtime's names, in order, for `cpu`, `cuda`, or `auto`: CUDA where this build and machine have it.

    Raises Unavailable where CUDA is asked for and absent. The CPU always stands behind it, for operators without a
    kernel.
    """
    has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if choice == "cuda" and not has_cuda:
        raise Unavailable("CUDA is asked for, and this onnxruntime has none: install onnxruntime-gpu in its place")
    cuda = ["CUDAExecutionProvider"] if has_cuda and choice != "cpu" else []
    return [*cuda, "CPUExecutionProvider"]


def available_cores() -> int:
    """Cores this process may run on. A container's quota of processor time does not show in it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _memory_errors() -> Iterator[None]:
    """ONNX Runtime's failed allocations as MemoryError: its own exceptions tell them from others by text alone."""
    try:
        yield
    except Exception as error:
        if "Failed to allocate memory" in str(error) or "bad_alloc" in str(error):
            raise MemoryError(str(error)[:200]) from error
        raise


class KvCache:
    """Keys and values of one sequence in buffers of fixed length: past and present share them, so nothing is copied.

    `buffers[layer]` is a key and a value array, each [1, kv_head, position, head_dim].
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, positions: int, dtype: npt.DTypeLike) -> None:
        self.positions = -(-positions // CACHE_STEP) * CACHE_STEP
        self.filled = 0
        shape = (1, kv_heads, self.positions, head_dim)
        # Zeros, not empty: attention multiplies what lies behind the filled part by 0, and 0 * NaN is NaN.
        self.buffers = [(np.zeros(shape, dtype), np.zeros(shape, dtype)) for _ in range(layers)]


class OnnxModel:
    """Sessions over a checked bundle. Raises BundleError where a graph does not load."""

    def __init__(self, bundle: Bundle, *, threads: int = 0, provider: ExecutionProvider = "cpu") -> None:
        self.bundle = bundle
        self.shapes = bundle.manifest.shapes
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Waiting threads that spin take the other core from HTTP and the next request's preparation. tiny-scenes, two
        # Zen 3 cores, `nearfar bench` with 8 clients: 95 requests/s without spinning, 60 with it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._options, self._providers = options, execution_providers(provider)
        self._vision = self._open("vision_encoder")
        self._embed = self._open("embed_tokens")
        self._decoder = self._open("decoder_model_merged")
        self._vision_inputs = {item.name for item in self._vision.get_inputs()}
        self._decoder_inputs = {item.name: item for item in self._decoder.get_inputs()}
        cache_input = self._decoder_inputs.get("past_key_values.0.key")
        if cache_input is None or cache_input.type not in _TYPES:
            raise BundleError(f"{bundle.folder}: the decoder graph has no float cache input past_key_values.0.key")
        self._cache_type = _TYPES[cache_input.type]

    def _open(self, name: GraphName) -> ort.InferenceSession:
        path = self.bundle.graph(name)
        try:
            return ort.InferenceSession(str(path), self._options, providers=self._providers)
        except Exception as error:  # ONNX Runtime raises its own kinds, all straight from Exception
            reason = str(error).splitlines()[0][:300]
            raise BundleError(f"{path.name} does not load: {reason}") from error

    def new_cache(self, positions: int) -> KvCache:
        """An empty cache for at most that many positions. Raises ContextLengthExceeded above the model's."""
        if positions > self.shapes.max_positions:
            raise ContextLengthExceeded(
                f"{positions} positions asked for, the model has {self.shapes.max_positions}", param="prompt"
            )
        return KvCache(self.shapes.layers, self.shapes.kv_heads, self.shapes.head_dim, positions, self._cache_type)

    def encode_tiles(self, pixels: Floats) -> Floats:
        """[tile, 3, height, width] -> image features [tile, image token, hidden]."""
        feeds: dict[str, Any] = {"pixel_values": pixels[np.newaxis]}
        if "pixel_attention_mask" in self._vision_inputs:
            feeds["pixel_attention_mask"] = np.ones((1, len(pixels), *pixels.shape[2:]), dtype=bool)
        with _memory_errors():
            features: Floats = self._vision.run(["image_features"], feeds)[0]
        return features

    def embed(self, ids: Sequence[int], features: Floats | None = None) -> Floats:
        """[position] -> embeddings [1, position, hidden], the image tokens' rows being those of `features` in order."""
        array = np.asarray(ids, dtype=np.int64)[np.newaxis]
        embeds: Floats = self._embed.run(["inputs_embeds"], {"input_ids": array})[0]
        if features is not None:
            places = array == self.shapes.image_token_id
            embeds[places] = features.reshape(-1, features.shape[-1])
        return embeds

    def decode(self, embeds: Floats, cache: KvCache) -> Floats:
        """Append [1, position, hidden] to the cache and return the last position's logits [vocabulary]."""
        new = embeds.shape[1]
        total = cache.filled + new
        if total > cache.positions:
            raise ContextLengthExceeded(f"{total} positions in a cache of {cache.positions}")
        binding = self._decoder.io_binding()
        held = {"inputs_embeds": np.ascontiguousarray(embeds), "attention_mask": np.ones((1, total), dtype=np.int64)}
        if "position_ids" in self._decoder_inputs:
            held["position_ids"] = np.arange(cache.filled, total, dtype=np.int64)[np.newaxis]
        rows = new
        if "num_logits_to_keep" in self._decoder_inputs:
            held["num_logits_to_keep"] = np.array(1, dtype=np.int64)
            rows = 1
        for name, array in held.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        logits = np.empty((1, rows, self.shapes.vocab_size), dtype=np.float32)
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        for layer, pair in enumerate(cache.buffers):
            for kind, buffer in zip(("key", "value"), pair, strict=True):
                place = ("cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
                binding.bind_input(f"past_key_values.{layer}.{kind}", *place)
                binding.bind_output(f"present.{layer}.{kind}", *place)
        with _memory_errors():
            self._decoder.run_with_iobinding(binding)
        cache.filled = total
        last: Floats = logits[0, -1]
        return last

    def greedy(self, ids: Sequence[int], features: Floats | None, max_tokens: int) -> list[int]:
        """Token ids of the likeliest answer, without the stop token: the plain loop, for checks and evaluations."""
        cache = self.new_cache(min(len(ids) + max_tokens, self.shapes.max_positions))
        logits = self.decode(self.embed(ids, features), cache)
        generated: list[int] = []
        while len(generated) < max_tokens:
            token = int(logits.argmax())
            if token in self.shapes.stop_token_ids or cache.filled == self.shapes.max_positions:
                break
            generated.append(token)
            logits = self.decode(self.embed([token]), cache)
        return generated
