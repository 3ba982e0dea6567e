"""A bundle's ONNX graphs as typed functions over NumPy arrays. The only module that opens ONNX Runtime sessions.

It knows graphs and buffers, not prompts: tiles in, features out; ids in, embeddings out; embeddings and a cache in,
logits out. Not safe for concurrent use: one thread owns a model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from models.bundle import Bundle, CacheKind
from models.errors import BundleError, ContextLengthExceeded, Unavailable
from models.execution import ExecutionProvider, chosen, fastmath, open_session, session_options
from models.kv_cache import GrowingCache, KvBuffer, KvCache, SharedCache, runs
from models.machine import processor

Floats = npt.NDArray[np.float32]
_TYPES: dict[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
# A batch may cover rows that take no part, where that is cheaper than a second run: on two Zen 3 cores four rows of the
# 256M shape in 8 bit take 1.5 times as long as one.
BRIDGED_ROWS = 2
# One step of the engine: what it holds in memory is bounded by these, and so is the wait for a cancellation.
POSITIONS_PER_STEP = 512
TILE_PIXELS_PER_STEP = 512 * 512  # one tile of the large models, sixteen of 128 px


@contextmanager
def _memory_errors() -> Iterator[None]:
    """ONNX Runtime's failed allocations as MemoryError: its own exceptions tell them from others by text alone."""
    try:
        yield
    except Exception as error:
        if "Failed to allocate memory" in str(error) or "bad_alloc" in str(error):
            raise MemoryError(str(error)[:200]) from error
        raise


def tiles_per_step(tile_px: int) -> int:
    """How many tiles of that side are one step."""
    return max(1, TILE_PIXELS_PER_STEP // tile_px**2)


def in_batches(pixels: Floats) -> list[Floats]:
    """Tiles [tile, 3, height, width] in batches of which each is one step."""
    size = tiles_per_step(pixels.shape[2])
    return [pixels[start : start + size] for start in range(0, len(pixels), size)]


class _Graph:
    """One session with the NumPy types of its inputs and outputs."""

    def __init__(self, path: Path, options: ort.SessionOptions, provider: ExecutionProvider) -> None:
        try:
            self.session = open_session(path, options, provider)
        except Unavailable:
            raise
        except Exception as error:  # ONNX Runtime raises its own kinds, all straight from Exception
            reason = str(error).splitlines()[0][:300]
            raise BundleError(f"{path.name} does not load: {reason}") from error
        self.file = path.name
        self.seconds = 0.0  # in runs so far
        self.inputs = {item.name: self._type(item) for item in self.session.get_inputs()}
        optional = {item.name: self._type(item) for item in self.session.get_overridable_initializers()}
        self.inputs |= {name: kind for name, kind in optional.items() if name == "num_logits_to_keep"}
        self.outputs = {item.name: self._type(item) for item in self.session.get_outputs()}

    def _type(self, item: ort.NodeArg) -> npt.DTypeLike:
        if item.type not in _TYPES:
            raise BundleError(f"{self.file}: {item.name} is a {item.type}, which is not supported")
        return _TYPES[item.type]

    def check(self, needed: set[str], known: set[str], output: str) -> None:
        """Raises BundleError for an input that is missing or that nobody here would feed, and a missing output."""
        names = set(self.inputs)
        for wrong in (*sorted(needed - names), *sorted(names - needed - known), *({output} - set(self.outputs))):
            what = "an unknown input" if wrong in names else "no input or output"
            raise BundleError(f"{self.file} has {what} {wrong}: it is not in the published layout")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.perf_counter()
        with _memory_errors():
            yield
        self.seconds += time.perf_counter() - begun

    def run_bound(self, binding: ort.IOBinding) -> None:
        """One run whose inputs and outputs are bound."""
        with self._timed():
            self.session.run_with_iobinding(binding)

    def run(self, output: str, feeds: dict[str, npt.NDArray[Any]]) -> Floats:
        """One output in float32; each input in the type that the graph reads."""
        typed = {name: feeds[name].astype(kind, copy=False) for name, kind in self.inputs.items()}
        with self._timed():
            result: npt.NDArray[Any] = self.session.run([output], typed)[0]
        return result.astype(np.float32, copy=False)


class OnnxModel:
    """Sessions over a checked bundle. Raises BundleError where a graph does not load."""

    def __init__(
        self, bundle: Bundle, *, threads: int = 0, provider: ExecutionProvider = "cpu", context: int | None = None
    ) -> None:
        """`context`: the most positions of a sequence, where memory allows fewer than the model was trained for."""
        self.bundle, shapes = bundle, bundle.manifest.shapes
        self.shapes = shapes.model_copy(
            update={"max_positions": min(context or shapes.max_positions, shapes.max_positions)}
        )
        provider, cpu = chosen(provider), processor()
        # What its numbers depend on beside graphs and processor.
        self.execution = f"{provider}{', bfloat16 products' if fastmath(bundle, cpu) else ''}"
        self._device = "cuda" if provider == "cuda" else "cpu"
        options = session_options(bundle, cpu, threads=threads)
        graphs = {name: _Graph(bundle.graph(name), options, provider) for name in bundle.manifest.graphs}
        self._graphs = tuple(graphs.values())
        self._vision, self._embed = graphs["vision_encoder"], graphs["embed_tokens"]
        self.other_encoder: Callable[[Floats], Floats] | None = None  # another runtime may do this part
        self._decoder = graphs["decoder_model_merged"]
        self._prompt = graphs.get("decoder_prompt", self._decoder)
        self._vision.check({"pixel_values"}, {"pixel_attention_mask"}, "image_features")
        self._embed.check({"input_ids"}, set(), "inputs_embeds")
        past = {f"past_key_values.{n}.{part}" for n in range(self.shapes.layers) for part in ("key", "value")}
        for decoder in (self._decoder, self._prompt):
            decoder.check({"inputs_embeds", "attention_mask"} | past, {"position_ids", "num_logits_to_keep"}, "logits")
        if self._prompt.inputs["past_key_values.0.key"] != self._decoder.inputs["past_key_values.0.key"]:
            raise BundleError(f"{self._prompt.file} and {self._decoder.file} do not share one type of cache")

    @property
    def session_seconds(self) -> float:
        """How long ONNX Runtime's sessions have run, in all."""
        return sum(graph.seconds for graph in self._graphs)

    def new_cache(self, positions: int, kind: CacheKind | None = None) -> KvCache:
        """An empty cache for at most that many positions. Raises ContextLengthExceeded above the model's."""
        return self.new_caches(1, positions, kind)[0]

    def new_caches(self, count: int, positions: int, kind: CacheKind | None = None) -> list[KvCache]:
        """Empty caches that can be decoded together. Raises ContextLengthExceeded above the model's positions."""
        if positions > self.shapes.max_positions:
            raise ContextLengthExceeded(
                f"{positions} positions asked for, the model has {self.shapes.max_positions}", param="prompt"
            )
        dtype = self._decoder.inputs["past_key_values.0.key"]
        with _memory_errors():
            if (kind or self.bundle.manifest.cache) == "growing":
                return [GrowingCache(self.shapes, positions, dtype, self._device) for _ in range(count)]
            buffer = KvBuffer(self.shapes, count, positions, dtype, self._device)
            return [SharedCache(buffer, row, positions) for row in range(count)]

    def encode_tiles(self, pixels: Floats) -> Floats:
        """[tile, 3, height, width] -> image features [tile, image token, hidden]."""
        return (self.other_encoder or self._encode)(pixels)

    def _encode(self, pixels: Floats) -> Floats:
        mask = np.ones((1, len(pixels), *pixels.shape[2:]), dtype=bool)
        return self._vision.run("image_features", {"pixel_values": pixels[np.newaxis], "pixel_attention_mask": mask})

    def embed(self, ids: Sequence[int], features: Floats | None = None) -> Floats:
        """[position] -> embeddings [1, position, hidden], the image tokens' rows being those of `features` in order."""
        array = np.asarray(ids, dtype=np.int64)[np.newaxis]
        embeds = self._embed.run("inputs_embeds", {"input_ids": array})
        if features is not None:
            places = array == self.shapes.image_token_id
            if places.sum() != features.shape[0] * features.shape[1]:
                found = f"{places.sum()} image tokens in the prompt, {features.shape[1]} a tile from the vision graph"
                raise BundleError(f"{self.bundle.folder}: {found}: the manifest does not fit its graphs")
            embeds[places] = features.reshape(-1, features.shape[-1])
        return embeds

    def decode(self, embeds: Floats, cache: KvCache) -> Floats:
        """Append [1, position, hidden] to the cache and return the last position's logits [vocabulary]."""
        new = embeds.shape[1]
        if cache.filled + new > cache.positions:
            raise ContextLengthExceeded(f"{cache.filled + new} positions in a cache of {cache.positions}")
        graph = self._decoder if new == 1 else self._prompt
        if isinstance(cache, SharedCache):
            binding = cache.buffer.binding(graph.session, cache.row, 1)
            logits = self._run_decoder(graph, embeds, [cache.filled], binding)
        else:
            binding = graph.session.io_binding()
            logits = self._run_decoder(graph, embeds, [cache.filled], binding, cache)
        cache.filled += new
        row: Floats = logits[0]
        return row

    def decode_together(self, ids: Sequence[int], caches: Sequence[KvCache]) -> Floats:
        """Append one token to each cache and return the logits [cache, vocabulary]. All are of one `new_caches`.

        Rows of a shared buffer run in one batch, whatever their lengths. A row between them that takes no part writes
        behind its filled positions, where the next run writes first. What fails has appended nothing to any cache. The
        logits are valid until the next call.
        """
        before = [cache.filled for cache in caches]
        try:
            return self._decode_rows(ids, caches)
        except BaseException:
            for cache, filled in zip(caches, before, strict=True):
                cache.truncate(filled)
            raise

    def _decode_rows(self, ids: Sequence[int], caches: Sequence[KvCache]) -> Floats:
        embeds = self._embed.run("inputs_embeds", {"input_ids": np.array(ids, dtype=np.int64)[:, np.newaxis]})
        shared = {cache.row: place for place, cache in enumerate(caches) if isinstance(cache, SharedCache)}
        parts: dict[int, Floats] = {}
        for place, cache in enumerate(caches):
            if cache.filled >= cache.positions:
                raise ContextLengthExceeded(f"{cache.filled + 1} positions in a cache of {cache.positions}")
            if not isinstance(cache, SharedCache):
                parts[place] = self.decode(embeds[place : place + 1], cache)
        for rows in runs(sorted(shared), BRIDGED_ROWS):
            buffer = next(cache.buffer for cache in caches if isinstance(cache, SharedCache))
            batch = np.zeros((len(rows), *embeds.shape[1:]), np.float32)
            active = {row: shared[row] for row in rows if row in shared}
            batch[[row - rows.start for row in active]] = embeds[[*active.values()]]
            binding = buffer.binding(self._decoder.session, rows.start, len(rows))
            found = self._run_decoder(
                self._decoder, batch, buffer.filled[rows.start : rows.stop], binding, kept=buffer.logits
            )
            for row in active:
                buffer.filled[row] += 1
            if len(rows) == len(caches) and [*active.values()] == [*range(len(caches))]:
                return found  # all of them, in order: the usual case, without a copy
            parts |= {place: found[row - rows.start].copy() for row, place in active.items()}
        return np.stack([parts[place] for place in range(len(caches))])

    def _run_decoder(
        self,
        graph: _Graph,
        embeds: Floats,
        filled: Sequence[int],
        binding: ort.IOBinding,
        growing: GrowingCache | None = None,
        kept: dict[int, npt.NDArray[Any]] | None = None,
    ) -> Floats:
        """Logits [row, vocabulary] of the last of the new positions, [row, position, hidden].

        `kept`: memory for them by the number of rows, which the next run writes again.
        """
        rows, new = embeds.shape[:2]
        before = np.array(filled)[:, np.newaxis]
        keep = 1 if "num_logits_to_keep" in graph.inputs else new
        feeds: dict[str, npt.NDArray[Any]] = {
            "inputs_embeds": embeds,
            # Right-padded: the graph takes each row's length from its sum, and the longest from its width.
            "attention_mask": np.arange(before.max() + new) < before + new,
            "position_ids": before + np.arange(new),
            "num_logits_to_keep": np.array(keep),
        }
        # Held until the run is over: the binding knows addresses alone.
        held = {name: np.ascontiguousarray(feeds[name], kind) for name, kind in graph.inputs.items() if name in feeds}
        for name, array in held.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        logits = None if kept is None else kept.get(rows)
        if logits is None:
            logits = np.empty((rows, keep, self.shapes.vocab_size), graph.outputs["logits"])
            if kept is not None:
                kept[rows] = logits
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        if growing:
            growing.bind(binding)
        graph.run_bound(binding)
        if growing:
            growing.take(binding)
        last: Floats = logits[:, -1].astype(np.float32, copy=False)
        return last

    def prefill(self, embeds: Floats, cache: KvCache) -> Floats:
        """`decode` of a whole prompt in the pieces that the engine takes; the last position's logits."""
        for start in range(0, embeds.shape[1], POSITIONS_PER_STEP):
            logits = self.decode(embeds[:, start : start + POSITIONS_PER_STEP], cache)
        return logits

    def find_cache_kind(self) -> CacheKind:
        """How this decoder's cache works, found by running it: three positions, in two steps, both ways.

        Handing out longer copies is right for every graph. Where one buffer gives the same logits, it is taken; a graph
        that concatenates raises, since its present does not fit into its past.
        """
        embeds = self.embed([0, 1, 2])

        def last(kind: CacheKind) -> Floats:
            cache = self.new_cache(3, kind)
            self.decode(embeds[:, :2], cache)
            return self.decode(embeds[:, 2:], cache)

        grown = last("growing")
        try:
            shared = last("shared")
        except Exception:  # the runtime's own kinds, all straight from Exception
            return "growing"
        return "shared" if np.allclose(shared, grown, atol=1e-2 * float(np.abs(grown).max())) else "growing"

    def greedy(self, ids: Sequence[int], features: Floats | None, max_tokens: int) -> list[int]:
        """Token ids of the likeliest answer, without the stop token: the plain loop, for checks and evaluations."""
        cache = self.new_cache(min(len(ids) + max_tokens, self.shapes.max_positions))
        logits = self.prefill(self.embed(ids, features), cache)
        generated: list[int] = []
        while len(generated) < max_tokens:
            token = int(logits.argmax())
            if token in self.shapes.stop_token_ids or cache.filled == self.shapes.max_positions:
                break
            generated.append(token)
            logits = self.decode(self.embed([token]), cache)
        return generated
