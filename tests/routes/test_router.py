"""The router alone, before scripted answerers: whatever they do, a reader gets one answer or one error."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import AllFailed, BadRequest, BudgetSpent, DeadlineExceeded, Forbidden, NearfarError, UpstreamError
from models.events import (
    AnswerEvent,
    Cost,
    Egress,
    Failed,
    Finished,
    Memory,
    Restarted,
    TextDelta,
    Timings,
    ToolCallDelta,
    Usage,
)
from models.request import AnswerRequest, Policy, question
from serving.routes import router as router_module
from serving.routes.breaker import Breaker, Health
from serving.routes.router import Router
from serving.routes.rules import Hop
from serving.targets import POLICIES, Target

ASKED = replace(question("What is red?"), policy="any")
SENT = Egress(left_device=True, bytes_sent=100, destination="far.test:443")
COST = Cost(usd=0.25, basis="as told")
ERRORS: dict[str, NearfarError] = {
    "busy": UpstreamError("busy", upstream_status=529),
    "unknown key": UpstreamError("unknown key", upstream_status=401),
    "at fault": BadRequest("at fault"),
    "spent": BudgetSpent("spent"),
    "late": DeadlineExceeded("late"),
}
Word = str  # "text", "call", or how the answer ends: "finish", "unsure", "silence", "raise", or the name of an error


@dataclass
class Scripted:
    """Says its words, another script at each asking, the last one for ever."""

    name: str
    scripts: Sequence[Sequence[Word]]
    asked: list[AnswerRequest] = field(default_factory=list)
    closed: int = 0

    async def stream(self, request: AnswerRequest) -> AsyncGenerator[AnswerEvent, None]:
        script = self.scripts[min(len(self.asked), len(self.scripts) - 1)]
        self.asked.append(request)
        try:
            for word in script:
                match word:
                    case "text":
                        yield TextDelta(text=self.name)
                    case "call":
                        yield ToolCallDelta(index=0, arguments="{", call_id="c", name=self.name)
                    case "finish" | "unsure":
                        yield self._finished(0.25 if word == "unsure" else 0.75)
                    case "silence":
                        await asyncio.sleep(60)
                    case "raise":
                        raise RuntimeError("a bug")
                    case _:
                        yield Failed(error=ERRORS[word], usage=Usage(prompt_tokens=3), cost=COST, egress=SENT)
        finally:
            self.closed += 1

    def _finished(self, confidence: float) -> Finished:
        return Finished(
            model="m",
            target=self.name,
            finish_reason="stop",
            usage=Usage(prompt_tokens=3, completion_tokens=1),
            timings=Timings(ttft_ms=1.0, total_ms=2.0),
            images=(),
            memory=Memory(),
            egress=SENT,
            cost=COST,
            confidence=confidence,
        )

    async def count_tokens(self, request: AnswerRequest) -> int:
        return 7

    async def aclose(self) -> None:
        pass


def hop(answerer: Scripted, *, leaves: bool = True, **options: Any) -> Hop:
    target = Target(answerer=answerer, kind="hosted", model="m", destination="far.test:443", leaves_device=leaves)
    return Hop(name=answerer.name, target=target, **options)


def health(hops: Sequence[Hop]) -> dict[str, Health]:
    return {each.name: Health(Breaker(clock=lambda: 0.0, rng=random.Random(1))) for each in hops}


def routed(*hops: Hop, deadline_s: float = 30.0) -> Router:
    return Router("smart", hops, health=health(hops), deadline_s=deadline_s, rng=random.Random(1))


async def events_of(router: Router, request: AnswerRequest = ASKED) -> list[AnswerEvent]:
    return [event async for event in router.stream(request)]


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "RETRY_WAIT_S", 0.0)
    monkeypatch.setattr(router_module, "GRACE_S", 0.0)


ENDINGS = st.sampled_from(["finish", "unsure", "raise", "nothing", *ERRORS])
SCRIPTS = st.builds(
    lambda words, end: (*words, *(() if end == "nothing" else (end,))),
    st.lists(st.sampled_from(["text", "text", "call"]), max_size=3),
    ENDINGS,
)
CHAINS = st.lists(
    st.tuples(st.lists(SCRIPTS, min_size=1, max_size=3), st.booleans(), st.booleans()), min_size=1, max_size=4
)


@given(chain=CHAINS, restart=st.booleans(), policy=st.sampled_from(POLICIES), askings=st.integers(1, 4))
def test_whatever_targets_do_a_reader_gets_one_answer_or_one_error_and_nothing_is_joined(
    chain: list[tuple[list[tuple[Word, ...]], bool, bool]], restart: bool, policy: Policy, askings: int
) -> None:
    answerers = [Scripted(f"far/{number}", scripts) for number, (scripts, _, _) in enumerate(chain)]
    hops = [
        hop(each, leaves=leaves, escalate_below=0.5 if escalates else None)
        for each, (_, leaves, escalates) in zip(answerers, chain, strict=True)
    ]
    router = routed(*hops)
    request = replace(ASKED, restart=restart, policy=policy)

    async def ask() -> None:
        before = sum(len(each.asked) for each in answerers)
        *deltas, last = await events_of(router, request)
        assert isinstance(last, Finished | Failed)
        assert not any(isinstance(event, Finished | Failed) for event in deltas)
        # Of one reading, all text and calls are of one target: the one that was announced, or served.
        speakers: set[str] = set()
        called = False
        for event in deltas:
            match event:
                case TextDelta(text=name):
                    speakers.add(name)
                case ToolCallDelta(name=name):
                    speakers.add(name or "")
                    called = True
                case Restarted(target=target):
                    assert restart
                    assert not called
                    speakers = set()
                    announced = target
                case _:
                    raise AssertionError(event)
            assert len(speakers) <= 1
            if any(isinstance(each, Restarted) for each in deltas[: deltas.index(event) + 1]):
                assert speakers <= {announced}
        if isinstance(last, Finished):
            assert speakers <= {last.target}
            doubted = last.confidence == 0.25 and any(each.name == last.target and each.escalate_below for each in hops)
            assert doubted == ("no other target" in (last.notice or ""))
            assert [attempt.target for attempt in last.attempts if attempt.outcome == "served"] == [last.target]
        # Every asking is an attempt, and what was not asked cost nothing.
        asked = [attempt for attempt in last.attempts if attempt.error_type or attempt.outcome == "served"]
        assert len(asked) == sum(len(each.asked) for each in answerers) - before
        counted = [attempt for attempt in asked if attempt.outcome != "skipped"]
        if counted and all(attempt.cost for attempt in counted):
            assert last.cost
            assert last.cost.usd == pytest.approx(0.25 * len(counted))
        assert all(each.closed == len(each.asked) for each in answerers)
        for each, (_, leaves, _) in zip(answerers, chain, strict=True):
            assert not (leaves and policy == "local-only" and each.asked)

    for _ in range(askings):
        asyncio.run(ask())


pytest_asyncio = pytest.mark.asyncio


@pytest_asyncio
async def test_a_target_is_asked_at_most_twice_and_with_the_time_that_is_left() -> None:
    one, two = Scripted("far/1", [["busy"]]), Scripted("far/2", [["text", "finish"]])
    *_, finished = await events_of(routed(hop(one, deadline_s=4.0), hop(two)), replace(ASKED, deadline_s=10.0))
    assert isinstance(finished, Finished)
    assert [len(one.asked), len(two.asked)] == [2, 1]
    assert all(request.route == "smart" for request in one.asked)
    assert all(0 < (request.deadline_s or 0) <= 10 for request in (*one.asked, *two.asked))
    assert all(0 < (request.begin_within_s or 0) <= 4 for request in one.asked)
    assert two.asked[0].begin_within_s is None
    assert finished.cost == Cost(usd=0.75, basis="3 askings together: as told")
    assert finished.egress == Egress(left_device=True, bytes_sent=300, destination="far.test:443")


@pytest_asyncio
async def test_a_wait_that_takes_longer_than_it_should_ends_at_the_next_target(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    async def oversleep(_: float) -> None:
        nonlocal now
        now += 5.0

    monkeypatch.setattr(router_module.asyncio, "sleep", oversleep)
    one, two = Scripted("far/1", [["busy"]]), Scripted("far/2", [["text", "finish"]])
    hops = hop(one, deadline_s=4.0), hop(two)
    router = Router("smart", hops, health=health(hops), deadline_s=30.0, rng=random.Random(1), clock=lambda: now)
    *_, finished = await events_of(router)
    assert isinstance(finished, Finished)
    assert [attempt.target for attempt in finished.attempts] == ["far/1", "far/2"]
    assert [len(one.asked), len(two.asked)] == [1, 1]


@pytest_asyncio
async def test_time_that_ends_while_it_is_looked_at_is_no_bad_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "GRACE_S", 0.5)
    clock = iter([0.0, 0.0, 3.9, 4.1])  # begun, looked at, until when, asked
    one = Scripted("far/1", [["late"]])
    hops = (hop(one, deadline_s=0.1),)
    router = Router(
        "smart", hops, health=health(hops), deadline_s=30.0, rng=random.Random(1), clock=lambda: next(clock, 4.1)
    )
    [failed] = await events_of(router)
    assert isinstance(failed, Failed)
    assert one.asked[0].deadline_s
    assert [attempt.error_type for attempt in failed.attempts] == ["deadline_exceeded"]


@pytest_asyncio
async def test_without_a_retry_left_a_target_is_asked_once() -> None:
    one, two = Scripted("far/1", [["busy"]]), Scripted("far/2", [["text", "finish"]])
    router = routed(hop(one), hop(two))
    retries = router._health["far/1"].retries
    while retries.allows:
        retries.retried()
    await events_of(router)
    assert [len(one.asked), len(two.asked)] == [1, 1]


@pytest_asyncio
async def test_an_answerer_that_keeps_no_time_is_left() -> None:
    one, two = Scripted("far/1", [["silence"]]), Scripted("far/2", [["text", "silence"]])
    router = routed(hop(one, deadline_s=0.05), hop(two), deadline_s=1.0)
    *_, delta, failed = await events_of(router)
    assert delta == TextDelta(text="far/2")
    assert isinstance(failed, Failed)
    assert failed.error.message == "the answer was not whole within 1 s"
    assert [attempt.error_type for attempt in failed.attempts] == ["too_slow", "deadline_exceeded"]
    assert failed.egress == Egress(left_device=True, bytes_sent=None, destination="far.test:443")
    assert one.closed == two.closed == 1


@pytest_asyncio
async def test_an_answer_that_is_held_back_has_its_hops_deadline_to_be_whole() -> None:
    near, far = Scripted("near/1", [["text", "silence"]]), Scripted("far/2", [["text", "finish"]])
    router = routed(hop(near, deadline_s=0.1, escalate_below=0.5), hop(far))
    *_, finished = await events_of(router)
    assert isinstance(finished, Finished)
    assert finished.target == "far/2"
    assert [attempt.reason for attempt in finished.attempts] == ["near/1 gave no whole answer within 0.1 s", None]


@pytest_asyncio
@pytest.mark.parametrize(("script", "state"), [(["text", "finish"], "closed"), (["busy"], "open")])
async def test_where_every_breaker_is_open_the_first_is_asked_and_no_other(script: list[Word], state: str) -> None:
    one, two = Scripted("far/1", [script]), Scripted("far/2", [["text", "finish"]])
    router = routed(hop(one), hop(two))
    for each in router.hops:
        breaker = router._health[each.name].breaker
        breaker.over(probe=breaker.begin(), verdict="ill for long")
    *_, last = await events_of(router)
    assert isinstance(last, Finished) == (state == "closed")
    assert (len(one.asked), len(two.asked)) == (1, 0)
    assert router._health["far/1"].breaker.state == state


@pytest_asyncio
async def test_what_every_gate_refuses_is_that_refusal_and_no_outage() -> None:
    [failed] = await events_of(routed(hop(Scripted("far/1", [["spent"]])), hop(Scripted("far/2", [["spent"]]))))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, BudgetSpent)
    assert [attempt.outcome for attempt in failed.attempts] == ["skipped", "skipped"]
    assert failed.cost is None


@pytest_asyncio
async def test_a_route_without_anything_to_ask_says_why() -> None:
    gone = Hop(name="far/gone", target=None, absent="far/gone needs a key")
    [absent] = await events_of(routed(gone, hop(Scripted("far/1", [["busy"]]))))
    [nothing] = await events_of(routed(gone))
    [forbidden] = await events_of(routed(hop(Scripted("far/1", [["busy"]]))), replace(ASKED, policy="local-only"))
    assert isinstance(absent, Failed)
    assert isinstance(absent.error, AllFailed)
    assert "far/gone: far/gone needs a key; far/1: busy" in absent.error.message
    assert isinstance(nothing, Failed)
    assert nothing.error.message == "no target of smart answered. far/gone: far/gone needs a key"
    assert isinstance(forbidden, Failed)
    assert isinstance(forbidden.error, Forbidden)


@pytest_asyncio
async def test_tokens_are_counted_by_the_target_that_would_be_asked_first() -> None:
    gone = Hop(name="far/gone", target=None, absent="no key")
    router = routed(gone, hop(Scripted("far/1", [["busy"]])))
    assert await router.count_tokens(ASKED) == 7
    with pytest.raises(Forbidden):
        await router.count_tokens(replace(ASKED, policy="local-only"))


@pytest_asyncio
async def test_a_reader_who_leaves_leaves_no_mark_on_a_targets_health() -> None:
    one = Scripted("far/1", [["text", "silence"]])
    router = routed(hop(one))
    async with aclosing(router.stream(ASKED)) as events:
        await anext(events)
    assert one.closed == 1
    assert router._health["far/1"].breaker.state == "closed"


def said(events: Sequence[AnswerEvent]) -> str:
    return " ".join(event.text for event in events if isinstance(event, TextDelta))


UNSURE = ("text", "text", "unsure")


@pytest_asyncio
async def test_an_unsure_answer_is_not_taken_and_the_attempts_say_why() -> None:
    near, far = Scripted("near", [UNSURE]), Scripted("far/1", [["text", "finish"]])
    *events, finished = await events_of(routed(hop(near, escalate_below=0.5), hop(far)))
    assert isinstance(finished, Finished)
    assert (said(events), finished.target) == ("far/1", "far/1")
    first, second = finished.attempts
    assert (first.target, first.outcome, first.error_type) == ("near", "failed", "unsure")
    assert first.reason == "confidence 0.25 below 0.5"
    assert (second.outcome, second.reason) == ("served", None)
    assert finished.cost == Cost(usd=0.5, basis="2 askings together: as told")


@pytest_asyncio
async def test_a_sure_answer_stays_and_its_first_text_is_as_late_as_it_was_read() -> None:
    near, far = Scripted("near", [["text", "text", "finish"]]), Scripted("far/1", [["text", "finish"]])
    *events, finished = await events_of(routed(hop(near, escalate_below=0.75), hop(far)))
    assert isinstance(finished, Finished)
    assert (said(events), finished.target, far.asked) == ("near near", "near", [])
    assert finished.timings.ttft_ms == finished.timings.total_ms
    assert finished.notice is None


@pytest_asyncio
async def test_where_nobody_else_answers_the_unsure_answer_is_given_and_says_so() -> None:
    near, far = Scripted("near", [UNSURE]), Scripted("far/1", [["unknown key"]])
    *events, finished = await events_of(routed(hop(near, escalate_below=0.5), hop(far)))
    assert isinstance(finished, Finished)
    assert said(events) == "near near"
    assert finished.notice == "near: confidence 0.25 below 0.5, and no other target answered."
    assert [(each.target, each.outcome) for each in finished.attempts] == [("near", "served"), ("far/1", "failed")]
    assert finished.cost == Cost(usd=0.5, basis="2 askings together: as told")


@pytest_asyncio
async def test_an_unsure_answer_is_not_joined_to_what_another_had_begun() -> None:
    near, far = Scripted("near", [UNSURE]), Scripted("far/1", [["text", "busy"]])
    *events, failed = await events_of(routed(hop(near, escalate_below=0.5), hop(far)))
    assert said(events) == "far/1"
    assert isinstance(failed, Failed)


@pytest_asyncio
async def test_to_a_reader_who_drops_what_another_had_begun_the_unsure_answer_is_given() -> None:
    near, far = Scripted("near", [UNSURE]), Scripted("far/1", [["text", "busy"]])
    router = routed(hop(near, escalate_below=0.5), hop(far))
    begun, restarted, *events, finished = await events_of(router, replace(ASKED, restart=True))
    assert said([begun]) == "far/1"
    assert isinstance(restarted, Restarted)
    assert (restarted.target, said(events)) == ("near", "near near")
    assert isinstance(finished, Finished)
    assert finished.target == "near"


@pytest_asyncio
async def test_to_a_reader_who_drops_what_was_begun_all_have_failed() -> None:
    chain = [hop(Scripted(f"far/{number}", [["text", "busy"]])) for number in (1, 2)]
    *_, failed = await events_of(routed(*chain), replace(ASKED, restart=True))
    assert isinstance(failed, Failed)
    assert failed.error.message.startswith("no target of smart answered. far/1: ")
    *_, failed = await events_of(routed(*chain), ASKED)
    assert isinstance(failed, Failed)
    assert failed.error.type == "upstream_error"


@pytest_asyncio
async def test_under_local_only_an_unsure_answer_is_streamed_and_says_so() -> None:
    near, far = Scripted("near", [UNSURE]), Scripted("far/1", [["text", "finish"]])
    router = routed(hop(near, leaves=False, escalate_below=0.5), hop(far))
    *events, finished = await events_of(router, replace(ASKED, policy="local-only"))
    assert isinstance(finished, Finished)
    assert (said(events), far.asked) == ("near near", [])
    assert finished.notice == "near: confidence 0.25 below 0.5, and no other target may be asked."
    assert finished.timings.ttft_ms != finished.timings.total_ms


@pytest_asyncio
async def test_doubt_is_no_sign_of_bad_health() -> None:
    near, far = Scripted("near", [UNSURE]), Scripted("far/1", [["text", "finish"]])
    hops = [hop(near, escalate_below=0.5), hop(far)]
    found = health(hops)
    router = Router("smart", hops, health=found, deadline_s=30.0, rng=random.Random(1))
    for _ in range(30):
        await events_of(router)
    assert len(near.asked) == 30
    assert found["near"].breaker.state == "closed"
