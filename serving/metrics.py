"""What Prometheus reads. Every target's stream passes through `Metrics.watch`, and is counted nowhere else."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Literal, assert_never

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from models.errors import NearfarError
from models.events import AnswerEvent, Attempt, Failed, Finished, Restarted, TextDelta, ToolCallDelta
from serving.engine.loop import EngineFigures
from serving.spending import NANO, Spending

log = logging.getLogger("nearfar")
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
STAGES = ("load", "queue", "image_decode", "preprocess", "vision", "prefill", "decode")
BREAKER_STATES = ("closed", "half-open", "open")
# From a token of the toy to a picture of 17 tiles on a small machine.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class _Money(Collector):
    """Today's spending, of all processes that share the account, and what is left; nothing where it cannot be read."""

    def __init__(self, spending: Spending) -> None:
        self._spending = spending

    def describe(self) -> list[GaugeMetricFamily]:
        return list(self._families())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        spent, held, left = self._families()
        try:
            for entry in self._spending.entries():
                labels = [entry.purpose.target, entry.purpose.key, entry.purpose.route]
                spent.add_metric(labels, entry.nano / NANO)
                held.add_metric(labels, entry.held_nano / NANO)
            for budget, nano in self._spending.left():
                left.add_metric([str(budget)], nano / NANO)
        except NearfarError as error:
            log.warning(error.message)
        yield from (spent, held, left)

    def _families(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        labels, left = ["target", "key", "route"], "Dollars left today of a budget"
        return (
            GaugeMetricFamily("nearfar_spent_today_dollars", "Dollars spent today (UTC)", labels=labels),
            GaugeMetricFamily("nearfar_held_today_dollars", "Dollars held for requests under way", labels=labels),
            GaugeMetricFamily("nearfar_budget_left_dollars", left, labels=["budget"]),
        )


class _Merged(Collector):
    """The figures of several services, each with a label more."""

    def __init__(self, texts: Mapping[str, bytes]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for found in text_string_to_metric_families(text.decode()):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for name, labels, value, *_ in found.samples:
                    family.add_sample(name, {"replica": replica, **labels}, value)
        yield from families.values()


def merged(texts: Mapping[str, bytes]) -> bytes:
    """The texts of several replicas by their names as one, in which every series has the label `replica`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(texts))
    return generate_latest(registry)


class Metrics:
    """One service's figures, in a registry of their own. Used on the event loop's thread alone."""

    def __init__(
        self,
        engine: Callable[[], EngineFigures],
        spending: Spending | None = None,
        breakers: Callable[[], Mapping[str, str]] = dict,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock, self._breakers = clock, breakers
        self._registry = CollectorRegistry(auto_describe=True)
        if spending:
            self._registry.register(_Money(spending))
        self._gauge("requests_running", "Sequences that the engine advances", lambda: engine().running)
        self._gauge("requests_waiting", "Local requests that have not begun", lambda: engine().waiting)
        self._gauge("slots", "Cache slots of the models in memory", lambda: engine().slots)
        self._gauge("slots_in_use", "Those of them that a running sequence holds", lambda: engine().slots_in_use)
        self._gauge(
            "session_seconds", "Time within ONNX Runtime's runs, of the models in memory",
            lambda: engine().session_seconds,
        )  # fmt: skip
        self._answers = self._counter("answers", "Answers by how they ended: finished, left, or an error", "outcome")
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to the first text", "cache")
        self._gaps = self._histogram("inter_token_seconds", "From one piece of an answer to the next")
        self._total = self._histogram("answer_seconds", "Arrival to the end of a whole answer")
        self._stages = self._histogram("stage_seconds", "Time of one stage of a whole answer", "stage")
        self._prompt = self._counter(
            "prompt_tokens", "Prompt tokens: found in a cache, written to a hosted one, or neither", "cache"
        )
        # A gauge: writing to a cache costs more than not to, and takes of the sum.
        saved = "Dollars that hosted models' caches saved, what writing to them cost subtracted"
        self._saved = Gauge("nearfar_cache_saved_dollars", saved, ["target"], registry=self._registry)
        self._completion = self._counter("completion_tokens", "Tokens of whole answers")
        self._images = self._counter("images", "Pictures, their features found in a cache or computed", "cache")
        self._bytes = self._counter("sent_bytes", "Request-body bytes sent to a target, of whole answers", "place")
        self._dollars = self._counter("answer_dollars", "Cost of whole answers, near and far, where it is known")
        self._joules = self._counter("energy_joules", "Measured energy of local answers, idling subtracted")
        self._attempts = self._counter("route_attempts", "What became of a target on a route", "route", "outcome")
        self._fallbacks = self._counter("route_fallbacks", "Answers of a route that another than its first target gave")
        self._restarts = self._counter("restarts", "Streams that began anew with another target")
        self._broken = self._counter("broken_streams", "Answers that failed behind their first text", "error")
        text = "Of the breaker before a route's target: 0 closed, 1 half-open, 2 open"
        self._breaker = Gauge("nearfar_breaker_state", text, ["target"], registry=self._registry)
        self._errors = Counter(
            "nearfar_errors", "HTTP requests that ended in an error, by its type", ["type"], registry=self._registry
        )

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        for target, state in self._breakers().items():
            self._breaker.labels(target).set(BREAKER_STATES.index(state))
        return generate_latest(self._registry)

    def error(self, kind: str) -> None:
        """A request was refused, or its answer broke off."""
        self._errors.labels(kind).inc()

    async def watch(self, target: str, stream: AsyncGenerator[AnswerEvent, None]) -> AsyncGenerator[AnswerEvent, None]:
        """That target's stream, unchanged."""
        outcome, last = "left", None
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    match event:
                        case TextDelta() | ToolCallDelta():
                            now = self._clock()
                            if last is not None:
                                self._gaps.labels(target).observe(now - last)
                            last = now
                        case Restarted():
                            last = None
                            self._restarts.labels(target).inc()
                        case Finished():
                            outcome = "finished"
                            self._finished(target, event)
                            self._tried(target, event.attempts)
                        case Failed(error=error):
                            outcome = error.type
                            self._tried(target, event.attempts)
                            if last is not None:
                                self._broken.labels(target, error.type).inc()
                        case _:
                            assert_never(event)
                    yield event
        finally:
            self._answers.labels(target, outcome).inc()

    def _tried(self, route: str, attempts: Sequence[Attempt]) -> None:
        for attempt in attempts:
            outcome = attempt.error_type or attempt.outcome
            self._attempts.labels(attempt.target, route, outcome).inc()
        if any(attempt.outcome == "served" and attempt.target != attempts[0].target for attempt in attempts):
            self._fallbacks.labels(route).inc()

    def _finished(self, target: str, finished: Finished) -> None:
        timings, usage, egress = finished.timings, finished.usage, finished.egress
        if timings.ttft_ms is not None:
            self._ttft.labels(target, _warmth(finished)).observe(timings.ttft_ms / 1000)
        if timings.total_ms is not None:
            self._total.labels(target).observe(timings.total_ms / 1000)
        for stage in STAGES:
            if (took_ms := getattr(timings, f"{stage}_ms")) is not None:
                self._stages.labels(target, stage).observe(took_ms / 1000)
        cached, written = usage.cached_tokens or 0, usage.cache_write_tokens or 0
        self._prompt.labels(target, "hit").inc(cached)
        self._prompt.labels(target, "write").inc(written)
        # An endpoint may count wrongly, or not at all; that is no reason to lose its answer.
        self._prompt.labels(target, "miss").inc(max(0, (usage.prompt_tokens or 0) - cached - written))
        if usage.cache_saved_usd is not None:
            self._saved.labels(target).inc(usage.cache_saved_usd)
        self._completion.labels(target).inc(usage.completion_tokens or 0)
        if finished.images and timings.vision_ms is not None:
            self._images.labels(target, "miss" if timings.vision_ms else "hit").inc(len(finished.images))
        if finished.cost.usd is not None:
            self._dollars.labels(target).inc(finished.cost.usd)
        if finished.energy and finished.energy.joules is not None:
            self._joules.labels(target).inc(finished.energy.joules)
        if egress.destination is not None:
            place = "elsewhere" if egress.left_device else "this_device"
            self._bytes.labels(target, place).inc(egress.bytes_sent or 0)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(f"nearfar_{name}", text, registry=self._registry).set_function(read)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"nearfar_{name}", text, ["target", *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"nearfar_{name}", text, ["target", *labels], buckets=SECONDS, registry=self._registry)


def _warmth(finished: Finished) -> Literal["cold", "warm", "unknown"]:
    """Did a cache shorten this answer's way to its first text? By half at least: all prompts begin alike somewhat."""
    if finished.usage.cached_tokens is None:
        return "unknown"
    encoded_none = bool(finished.images) and finished.timings.vision_ms == 0
    half_cached = 2 * finished.usage.cached_tokens >= (finished.usage.prompt_tokens or math.inf)
    return "warm" if half_cached or encoded_none else "cold"
