"""A route as an Answerer: it asks its targets in turn until one answers. What follows an error, `rules` say."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import assert_never

from models.errors import Fate, NearfarError, TooSlow
from models.events import AnswerEvent, Failed, Finished, Restarted, TextDelta, ToolCallDelta
from models.request import AnswerRequest
from serving.routes.breaker import Health
from serving.routes.doubt import sure_alone
from serving.routes.rules import (
    PATIENCE_S,
    Hop,
    Next,
    Retry,
    Standing,
    Step,
    Stop,
    Verdict,
    after,
    barred,
    in_order,
    takes_more,
    verdict,
)
from serving.routes.trip import Trip, nothing_allowed

RETRY_WAIT_S = 0.5  # at most, by chance: those that failed together do not come back together
LEAST_S = 0.001  # is left of a time that has just ended: a deadline is above 0
GRACE_S = 0.1  # for an answerer that keeps its deadlines to say so itself, with what it had sent until then
log = logging.getLogger("nearfar.routes")


class Router:
    """Answers with the first of its targets that does. `health` is theirs by name, and shared between routes."""

    def __init__(
        self,
        name: str,
        hops: Sequence[Hop],
        *,
        health: Mapping[str, Health],
        deadline_s: float,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self.hops, self._health = name, tuple(hops), health
        self.deadline_s, self._rng, self._clock = deadline_s, rng, clock

    @property
    def name(self) -> str:
        return self._name

    async def stream(self, request: AnswerRequest) -> AsyncGenerator[AnswerEvent, None]:
        """The events of the target that answers; its Finished has all attempts, what they cost and what they sent."""
        trip = self._begin(request)
        for place, hop in enumerate(trip.hops):
            if self._clock() >= trip.until:
                trip.failed, trip.step = Failed(error=trip.late()), Stop()
                break
            if why := self._why_not(hop, trip):
                trip.skip(hop, why)
                continue
            async with aclosing(self._visit(trip, hop, trip.hops[place + 1 :])) as events:
                async for event in events:
                    trip.read(event)
                    yield event
                    if isinstance(event, Finished):
                        return
            if isinstance(trip.step, Stop):
                break
        for event in trip.end():
            yield event

    async def count_tokens(self, request: AnswerRequest) -> int:
        """As the target counts that would be asked first. Raises Forbidden where the policy allows none."""
        for hop in in_order(self.hops, request.policy):
            if hop.target and not barred(hop, request.policy):
                return await hop.target.answerer.count_tokens(request)
        raise nothing_allowed(self._name, request.policy)

    async def aclose(self) -> None:
        """Nothing of its own: its targets are closed by whoever made them."""

    def _begin(self, request: AnswerRequest) -> Trip:
        begun = self._clock()
        return Trip(
            route=self._name,
            request=replace(request, route=self._name),
            hops=in_order(self.hops, request.policy),
            clock=self._clock,
            begun=begun,
            until=begun + min(self.deadline_s, request.deadline_s or self.deadline_s),
        )

    def _why_not(self, hop: Hop, trip: Trip) -> str | None:
        if why := barred(hop, trip.request.policy):
            return why
        if trip.too_much and not takes_more(hop, *trip.too_much):
            return f"it is not declared to take more than {trip.too_much[0].name}"
        if self._health[hop.name].breaker.admits or (trip.failed is None and self._all_open(trip)):
            return None
        return "it failed too often of late, and is left alone for a while"

    def _all_open(self, trip: Trip) -> bool:
        possible = [hop for hop in trip.hops if not barred(hop, trip.request.policy)]
        return not any(self._health[hop.name].breaker.admits for hop in possible)

    async def _visit(self, trip: Trip, hop: Hop, later: Sequence[Hop]) -> AsyncGenerator[AnswerEvent, None]:
        """One target, asked once or twice. Ends in its Finished, or leaves `trip.failed` and the step after it."""
        retries, until = self._health[hop.name].retries, min(trip.until, self._clock() + hop.deadline_s)
        retries.asked()
        for askings in itertools.count(1):
            may_go_on = any(not barred(each, trip.request.policy) for each in later)
            async with aclosing(self._ask(trip, hop, until, may_go_on)) as events:
                async for event in events:
                    yield event
                    if isinstance(event, Finished):
                        return
            trip.step = self._step(trip, hop, later, askings=askings, left_s=until - self._clock())
            if not isinstance(trip.step, Retry):
                return
            await asyncio.sleep(trip.step.wait_s)
            if self._clock() >= until:  # on a busy machine a sleep is longer than it was asked to be
                trip.step = Next()
                return
            retries.retried()

    def _step(self, trip: Trip, hop: Hop, later: Sequence[Hop], *, askings: int, left_s: float) -> Step:
        assert trip.failed
        error, health = trip.failed.error, self._health[hop.name]
        possible = [each for each in later if not barred(each, trip.request.policy)]
        if error.fate in (Fate.LONGER, Fate.LARGER):
            trip.too_much = hop, error.fate
        standing = Standing(
            askings=askings,
            wait_s=self._rng.uniform(0, RETRY_WAIT_S),
            left_s=min(left_s, PATIENCE_S) if possible else left_s,
            may_retry=health.retries.allows and health.breaker.admits,
            passed_on=trip.passed_on,
            restart=trip.request.restart,
            larger_ahead=any(takes_more(each, hop, error.fate) for each in possible),
        )
        return after(error, standing)

    async def _ask(self, trip: Trip, hop: Hop, until: float, may_go_on: bool) -> AsyncGenerator[AnswerEvent, None]:
        """One asking, which is one attempt. Ends in Finished, or leaves `trip.failed`."""
        breaker, begun_ms = self._health[hop.name].breaker, trip.ms
        said: Verdict | None = None
        if restarted := trip.restarted(hop):
            yield restarted
        probe = breaker.begin()
        try:
            holds = may_go_on and hop.escalate_below is not None
            source = self._timely(trip, hop, until, whole=holds)
            async with aclosing(sure_alone(source, hop, trip.hold) if holds else source) as events:
                async for event in events:
                    match event:
                        case TextDelta() | ToolCallDelta():
                            yield event
                        case Finished():
                            said = "well"
                            yield trip.served(hop, event, begun_ms)
                        case Failed():
                            said = verdict(event.error)
                            trip.fail(hop, event, begun_ms)
                        case Restarted():
                            raise AssertionError("a target is no route")
                        case _:
                            assert_never(event)
        finally:
            breaker.over(probe=probe, verdict=said)

    async def _timely(self, trip: Trip, hop: Hop, until: float, *, whole: bool) -> AsyncGenerator[AnswerEvent, None]:
        """What a target answers, within its time: its first text, or where that is held back, the whole of it.

        Ends in Finished or Failed, whatever it does.
        """
        now = min(self._clock(), until - LEAST_S)  # its time may have ended since it was looked at
        first_s = min(hop.first_token_s or math.inf, until - now)
        due = min(now + first_s, trip.until)
        begin_within_s, missing = None if due >= trip.until else first_s, f"no text within {round(first_s, 3):g} s"
        request = replace(trip.request, deadline_s=trip.until - now, begin_within_s=begin_within_s)
        assert hop.target
        try:
            async with aclosing(hop.target.answerer.stream(request)) as events:
                while True:
                    async with asyncio.timeout(max(0.0, due + GRACE_S - self._clock())):
                        event = await anext(events)
                    due = until if whole else trip.until
                    missing = f"no whole answer within {round(until - now, 3):g} s"
                    yield event
                    if isinstance(event, Finished | Failed):
                        return
        except TimeoutError:
            yield Failed(error=trip.late() if due >= trip.until else TooSlow(f"{hop.name} gave {missing}"))
        except Exception as error:  # a bug of the answerer's: its text may hold an input, and is told to nobody
            log.error("target %s raised %s", hop.name, type(error).__name__)
            yield Failed(error=NearfarError(f"{hop.name} ended without an answer"))
