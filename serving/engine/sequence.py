"""One answer in the making: its prompt, its cache, its text so far and its clock readings.

The engine's thread alone advances it; others make it, ask to cancel it, and read its figures once it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from models.events import FinishReason, Timings, Usage
from models.loaded_model import LoadedModel
from models.onnx_model import POSITIONS_PER_STEP, Floats, KvCache, in_batches
from models.request import GenerationSettings
from models.tokenizer import IncrementalText
from serving.engine.prepare import PreparedPrompt
from serving.engine.sampler import make_sampler


class StopText:
    """Holds text back while it may be the beginning of a stop string, and cuts at the first that is whole."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown now."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        beginnings = (stop[:size] for stop in self._stops for size in range(1, len(stop)))
        keep = max((len(begun) for begun in beginnings if self._held.endswith(begun)), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """The rest: no stop string came after all."""
        shown, self._held = self._held, ""
        return shown


class Sequence:
    """Mutable state of one running answer. `advance` does one step and returns new text.

    A step is a few tiles, a piece of the prompt, or one token: what it holds in memory is bounded, and other sequences
    get their turn, and a cancellation its effect, in between.
    """

    def __init__(
        self,
        model: LoadedModel,
        prompt: PreparedPrompt,
        settings: GenerationSettings,
        *,
        arrived: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        # Without the pixels: they go as they are encoded.
        self.model, self.prompt, self.settings = model, replace(prompt, tiles=()), settings
        self.cancelled = False
        self.finish_reason: FinishReason | None = None
        self._clock, self._arrived, self._queued = clock, arrived, clock()
        self._sample = make_sampler(settings)
        self._text, self._stops = IncrementalText(model.tokenizer), StopText(settings.stop)
        self._last_id = 0
        self._completion_tokens = 0
        self._shown = False
        self._tiles = [batch for tiled in prompt.tiles for batch in in_batches(tiled.pixels)]
        self._features: list[Floats] = []
        self._cache: KvCache | None = None
        self._prompt: Floats | None = None  # embeddings [1, position, hidden] while they go into the cache
        self._queue_ms: float | None = None
        self._vision_ms: float | None = None
        self._prefill_ms: float | None = None
        self._ttft_ms: float | None = None
        self._first_token_at = self._last_token_at = 0.0
        # The context bounds the answer: what the prompt leaves of it.
        self._max_tokens = min(settings.max_tokens, model.onnx.shapes.max_positions - len(prompt.ids))

    def advance(self) -> str:
        """Run one step and return the text it adds, often empty. Sets `finish_reason` with the last piece."""
        logits = self._decode_one() if self._completion_tokens else self._read_prompt()
        if logits is None:
            return ""
        token = self._sample(logits)
        self._last_token_at = self._clock()
        self._completion_tokens += 1
        if self._completion_tokens == 1:
            self._first_token_at = self._last_token_at
        if token in self.model.onnx.shapes.stop_token_ids and not self.settings.ignore_eos:
            self.finish_reason = "stop"
            return self._show(self._stops.push(self._text.flush()) + self._stops.flush())
        self._last_id = token
        text = self._stops.push(self._text.push(token))
        if self._stops.stopped:
            self.finish_reason = "stop"
        elif self._completion_tokens >= self._max_tokens:
            self.finish_reason = "length"
            text += self._stops.push(self._text.flush()) + self._stops.flush()
        return self._show(text)

    def _read_prompt(self) -> Floats | None:
        """Encode the next tiles, or take in the next piece of the prompt; after the last one, its logits."""
        begun = self._clock()
        if self._queue_ms is None:  # both waits: for a preparation thread, and for the engine
            self._queue_ms = (self.prompt.begun - self._arrived + begun - self._queued) * 1000
        onnx = self.model.onnx
        if self._tiles:
            self._features.append(onnx.encode_tiles(self._tiles.pop(0)))
            self._vision_ms = (self._vision_ms or 0.0) + (self._clock() - begun) * 1000
            return None
        if self._cache is None or self._prompt is None:
            self._cache = onnx.new_cache(len(self.prompt.ids) + self._max_tokens)
            self._prompt = onnx.embed(self.prompt.ids, np.concatenate(self._features) if self._features else None)
            self._features.clear()
        piece = self._prompt[:, self._cache.filled : self._cache.filled + POSITIONS_PER_STEP]
        logits = onnx.decode(piece, self._cache)
        self._prefill_ms = (self._prefill_ms or 0.0) + (self._clock() - begun) * 1000
        if self._cache.filled < len(self.prompt.ids):
            return None
        self._prompt = None
        return logits

    def _decode_one(self) -> Floats:
        assert self._cache is not None
        return self.model.onnx.decode(self.model.onnx.embed([self._last_id]), self._cache)

    def _show(self, text: str) -> str:
        # The template ends in "Assistant:", so an answer begins with the space of its first word.
        text = text if self._shown else text.lstrip()
        if text and not self._shown:
            self._shown = True
            self._ttft_ms = (self._clock() - self._arrived) * 1000
        return text

    def usage(self) -> Usage:
        """Tokens so far; nothing is cached between requests yet, which is a measured 0."""
        return Usage(
            prompt_tokens=len(self.prompt.ids),
            completion_tokens=self._completion_tokens,
            image_tokens=self.prompt.image_tokens,
            cached_tokens=0,
        )

    def timings(self) -> Timings:
        """Clock readings so far, in milliseconds."""
        decode_s = self._last_token_at - self._first_token_at
        decoded = self._completion_tokens - 1
        return Timings(
            queue_ms=self._queue_ms,
            image_decode_ms=self.prompt.image_decode_ms,
            preprocess_ms=self.prompt.preprocess_ms,
            vision_ms=self._vision_ms,
            prefill_ms=self._prefill_ms,
            ttft_ms=self._ttft_ms,
            decode_ms=decode_s * 1000 if decoded > 0 else None,
            total_ms=(self._clock() - self._arrived) * 1000,
            tokens_per_second=decoded / decode_s if decoded > 0 and decode_s > 0 else None,
        )
