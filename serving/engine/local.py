"""A model in memory as an Answerer: worker threads, the engine's thread, events back again."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from comparisons.cost import LOCAL_COST
from models.errors import NearfarError, Overloaded, Unavailable
from models.events import AnswerEvent, Delta, Egress, Failed, Finished, Memory
from models.loaded_model import LoadedModel
from models.machine import process_peak_bytes
from models.memory import feature_cache_bytes
from models.request import AnswerRequest
from serving.engine.constraints import Grammars
from serving.engine.crew import Job
from serving.engine.features import FeatureCache
from serving.engine.loop import EngineFigures, EngineLoop
from serving.engine.pixels import PixelRoom
from serving.engine.prepare import Outline, Patience, outline, read_pictures
from serving.engine.sequence import Sequence

PREPARATION_THREADS = 2
Result = TypeVar("Result")
log = logging.getLogger("nearfar.engine")


class LocalEngine:
    """One per service: the loop, the worker threads, the count of requests in hand and room for their pixels.

    All local models share it.
    """

    def __init__(self, *, max_waiting: int, max_running: int, pixel_bytes: int) -> None:
        self.loop = EngineLoop(max_running=max_running)
        self.pixels = PixelRoom(pixel_bytes)
        self.workers = ThreadPoolExecutor(PREPARATION_THREADS, thread_name_prefix="nearfar-prepare")
        self.max_waiting = max_waiting
        self.in_hand = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the requests in hand, as long as the block runs. Raises Overloaded where they are too many."""
        if self.in_hand >= self.max_waiting:
            raise Overloaded(f"no more than {self.max_waiting} requests are in hand at a time; try again shortly")
        self.in_hand += 1
        try:
            yield
        finally:
            self.in_hand -= 1

    def figures(self) -> EngineFigures:
        """How full it is; a request that is being prepared waits."""
        figures = self.loop.figures()
        return replace(figures, waiting=max(0, self.in_hand - figures.running))

    def close(self) -> None:
        """End the threads. What runs or waits ends in Failed."""
        self.loop.close()
        self.workers.shutdown(wait=False)


class LocalAnswerer:
    """Answers with one loaded model."""

    def __init__(
        self, model: LoadedModel, engine: LocalEngine, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.model, self._engine, self._clock = model, engine, clock
        self._features = FeatureCache(feature_cache_bytes(model.onnx.shapes))
        self._grammars = Grammars(model)

    @property
    def name(self) -> str:
        return self.model.bundle.target

    async def aclose(self) -> None:
        """Nothing of its own: the engine is closed by whoever made it."""

    async def stream(self, request: AnswerRequest) -> AsyncGenerator[AnswerEvent, None]:
        """Text as it is decoded, then Finished or Failed. Closing it early cancels the sequence within one step."""
        arrived = self._clock()
        patience = Patience.of(request, arrived)
        job: Job | None = None
        held = 0  # bytes of pixels, until the first text shows that they are encoded
        try:
            event_loop = asyncio.get_running_loop()
            found = await self._outline(request, patience)
            await self._in_time(self._engine.pixels.take(found.pixel_bytes), patience)
            held = found.pixel_bytes
            prompt = await self._work(patience, read_pictures, found)
            sequence = Sequence(
                self.model,
                prompt,
                request,
                arrived=arrived,
                patience=patience,
                features=self._features,
                clock=self._clock,
            )
            events: asyncio.Queue[Delta | NearfarError | None] = asyncio.Queue()

            def tell(event: Delta | NearfarError | None) -> None:
                event_loop.call_soon_threadsafe(events.put_nowait, event)

            job = Job(sequence=sequence, on_delta=tell, on_end=tell)
            self._engine.loop.submit(job)
            while isinstance(event := await events.get(), Delta):
                self._engine.pixels.give_back(held)
                held = 0
                yield event
            yield Failed(error=event) if event else self._finished(sequence)
        except NearfarError as error:
            yield Failed(error=error)
        except MemoryError:
            yield Failed(error=Unavailable("out of memory while the pictures were decoded"))
        except Exception:
            log.exception("a request could not be prepared")
            yield Failed(error=NearfarError("the request could not be prepared; the log says how"))
        finally:
            patience.left = True
            self._engine.pixels.give_back(held)
            if job:
                self._engine.loop.cancel(job)

    async def count_tokens(self, request: AnswerRequest) -> int:
        """The prompt's length. No picture is decoded for it; of a video, the frames. Raises what `outline` does."""
        patience = Patience.of(request, self._clock())
        try:
            return len((await self._outline(request, patience)).ids)
        except MemoryError as error:
            raise Unavailable("out of memory while the pictures were decoded") from error
        finally:
            patience.left = True

    async def _outline(self, request: AnswerRequest, patience: Patience) -> Outline:
        return await self._work(patience, functools.partial(outline, grammars=self._grammars), request)

    async def _work(self, patience: Patience, work: Callable[..., Result], what: object) -> Result:
        """A step of the preparation in a worker thread. It is not waited for beyond the deadline, and stops itself."""
        run = functools.partial(work, patience=patience, features=self._features)
        running = asyncio.get_running_loop().run_in_executor(self._engine.workers, run, self.model, what, self._clock)
        return await self._in_time(running, patience)

    async def _in_time(self, work: Awaitable[Result], patience: Patience) -> Result:
        left_s = None if patience.deadline is None else patience.deadline - self._clock()
        try:
            return await asyncio.wait_for(work, left_s)
        except TimeoutError:
            raise patience.exceeded() from None

    def _finished(self, sequence: Sequence) -> Finished:
        assert sequence.finish_reason is not None
        return Finished(
            model=self.model.bundle.manifest.name,
            target=self.name,
            finish_reason=sequence.finish_reason,
            usage=sequence.usage(),
            timings=sequence.timings(),
            images=sequence.prompt.images,
            memory=Memory(model_bytes=self.model.bundle.model_bytes, process_peak_bytes=process_peak_bytes()),
            egress=Egress(left_device=False, bytes_sent=0, destination=None),
            cost=LOCAL_COST,
            confidence=sequence.generation.confidence,
            stop=sequence.generation.stop,
            notice=self.model.bundle.manifest.notice,
        )
