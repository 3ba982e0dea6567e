"""The engine's thread: it alone touches sessions, sequences and caches of all loaded models.

Sequences come in through a bounded inbox and run in turn, one step each, so that a long answer does not hold up a short
one. A sequence leaves by finishing, failing or being cancelled, and all three end in the one `finally` that forgets it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from models.errors import NearfarError, Unavailable
from serving.engine.sequence import Sequence

log = logging.getLogger("nearfar.engine")


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A sequence and where its outcome goes. The callbacks are called on the engine's thread and must not block."""

    sequence: Sequence
    on_text: Callable[[str], None]
    on_end: Callable[[NearfarError | None], None]  # None: finished


class EngineLoop:
    """Owns the thread. `submit` may be called from any thread."""

    def __init__(self, *, max_running: int) -> None:
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._running: list[Job] = []
        self._max_running = max_running
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="nearfar-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Sequences that are being advanced; those waiting are not counted."""
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Queue a sequence. Its bound is the caller's admission, which counts requests, not jobs."""
        self._inbox.put(job)

    def close(self) -> None:
        """Fail what runs and waits, and end the thread."""
        self._closing = True
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._closing:
            self._admit()
            for job in tuple(self._running):
                self._step(job)
        error = Unavailable("the service is going down")
        while not self._inbox.empty():
            waiting = self._inbox.get()
            if waiting:
                self._running.append(waiting)
        for job in self._running:
            job.on_end(error)

    def _admit(self) -> None:
        """Take waiting sequences up to the bound; with nothing to run, wait for one."""
        while len(self._running) < self._max_running and (not self._running or not self._inbox.empty()):
            job = self._inbox.get()
            if job is None:
                return
            self._running.append(job)

    def _step(self, job: Job) -> None:
        outcome: NearfarError | None = None
        over = True
        try:
            if not job.sequence.cancelled:
                text = job.sequence.advance()
                if text:
                    job.on_text(text)
                over = job.sequence.finish_reason is not None
        except NearfarError as error:
            outcome = error
        except MemoryError:
            outcome = Unavailable("out of memory while answering; a smaller picture or a shorter prompt may fit")
        except Exception:
            log.exception("the engine failed on a sequence")
            outcome = NearfarError("the engine failed on this request; the log says how")
        finally:
            if over:
                self._running.remove(job)
                job.on_end(outcome)
