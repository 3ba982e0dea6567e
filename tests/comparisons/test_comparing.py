"""The runner: every arm runs, alone or together, and none harms another."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

import pytest

from comparisons.runner import ArmDelta, ArmFinished, ArmRepeated, Compared, compare
from models.errors import BadRequest, InvalidValue, NearfarError, UpstreamError
from models.events import Failed, TextDelta, Timings
from models.request import question
from tests.serving.conftest import wait_for

ASKED = question("what colour?")


async def run(arms, *, reference=None, parallel=False, seed=0, **more):
    events = compare(
        ASKED, arms, reference=reference, parallel=parallel, rng=random.Random(seed), comparison_id="cmp_1", **more
    )
    return [event async for event in events]


@pytest.mark.asyncio
@pytest.mark.parametrize("parallel", [False, True])
async def test_every_arm_runs_once_and_the_comparison_comes_last(answering, parallel):
    arms = [answering(f"local/{letter}", letter * 3) for letter in "abcd"]
    events = await run(arms, parallel=parallel)
    assert sum(isinstance(event, ArmFinished) for event in events) == 4
    comparison = events[-1].comparison
    assert comparison.comparison_id == "cmp_1"
    assert [result.target for result in comparison.results] == ["local/a", "local/b", "local/c", "local/d"]
    assert [result.text for result in comparison.results] == ["aaa", "bbb", "ccc", "ddd"]
    assert sorted(result.order for result in comparison.results) == [0, 1, 2, 3]
    assert comparison.tradeoff.baseline == "local/a"
    assert all(arm.log == ["started", "closed"] for arm in arms)


@pytest.mark.asyncio
async def test_the_order_of_arms_is_random_and_told(answering):
    seen = set()
    for seed in range(20):
        arms = [answering(f"local/{letter}") for letter in "abc"]
        events = await run(arms, seed=seed)
        ran = tuple(event.result.target for event in events if isinstance(event, ArmFinished))
        told = sorted(events[-1].comparison.results, key=lambda result: result.order)
        assert tuple(result.target for result in told) == ran
        seen.add(ran)
    assert len(seen) > 3


@pytest.mark.asyncio
async def test_arms_run_one_at_a_time_unless_they_are_told_to_run_together(answering):
    for parallel in (False, True):
        arms = [answering(f"local/{letter}", pause_s=0.01) for letter in "ab"]
        events = await run(arms, parallel=parallel)
        targets = [event.target for event in events if isinstance(event, ArmDelta)]
        assert (targets[0] != targets[1]) == parallel
        assert all(result.contended == parallel for result in events[-1].comparison.results)


@pytest.mark.asyncio
@pytest.mark.parametrize("parallel", [False, True])
async def test_one_failing_arm_fails_no_other(answering, failing, scripted, parallel):
    arms = [
        failing("far/a", UpstreamError("far answered 500")),
        answering("local/b"),
        scripted("local/c", [TextDelta(text="x"), RuntimeError("the prompt was: secret")]),
        scripted("local/d", []),
        scripted("local/e", [asyncio.CancelledError()]),
    ]
    comparison = (await run(arms, parallel=parallel, reference="red"))[-1].comparison
    failed, good, raised, silent, cancelled = comparison.results
    assert (failed.error.message, failed.text, failed.finished) == ("far answered 500", None, None)
    assert (good.text, good.error, good.correct) == ("red", None, True)
    for result in (raised, silent, cancelled):
        assert type(result.error) is NearfarError
        assert result.error.message == "internal error"
        assert result.correct is None
    assert "secret" not in repr(comparison)


@pytest.mark.asyncio
@pytest.mark.parametrize("parallel", [False, True])
async def test_leaving_early_closes_every_running_stream(answering, parallel):
    arms = [answering(f"local/{letter}", pause_s=0.005) for letter in "abc"]
    before = asyncio.all_tasks()
    events = compare(ASKED, arms, reference=None, parallel=parallel, rng=random.Random(0), comparison_id="cmp_1")
    async with aclosing(events):
        async for event in events:
            assert isinstance(event, ArmDelta)
            break
    started = [arm for arm in arms if arm.log]
    assert len(started) == (3 if parallel else 1)
    assert all(arm.log == ["started", "closed"] for arm in started)
    assert asyncio.all_tasks() == before


@pytest.mark.asyncio
@pytest.mark.parametrize("parallel", [False, True])
async def test_cancelling_the_reader_closes_every_running_stream(answering, parallel):
    arms = [answering(f"local/{letter}", pause_s=10) for letter in "abc"]
    task, asked = asyncio.create_task(run(arms, parallel=parallel)), 3 if parallel else 1
    await asyncio.to_thread(wait_for, lambda: sum(arm.log == ["started"] for arm in arms) == asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sum(arm.log == ["started", "closed"] for arm in arms) == asked


@pytest.mark.asyncio
async def test_a_slow_reader_holds_arms_back_and_leaving_it_blocked_leaks_nothing(scripted, finish):
    chatty = [TextDelta(text="x") for _ in range(1000)]
    arms = [scripted(name, [*chatty, finish(name)]) for name in ("local/a", "local/b")]
    events = compare(ASKED, arms, reference=None, parallel=True, rng=random.Random(0), comparison_id="cmp_1")
    await anext(events)
    await asyncio.sleep(0.01)
    await events.aclose()
    assert all(arm.log == ["started", "closed"] for arm in arms)


@pytest.mark.asyncio
async def test_no_arms_or_two_of_one_name_are_refused(answering):
    with pytest.raises(BadRequest):
        await run([])
    with pytest.raises(BadRequest):
        await run([answering("local/a"), answering("local/a")])


@pytest.mark.asyncio
async def test_nothing_follows_the_terminal_event_of_an_arm(scripted, finish):
    arm = scripted("local/a", [finish("local/a"), TextDelta(text="late")])
    events = await run([arm])
    assert [type(event) for event in events] == [ArmFinished, Compared]


@pytest.mark.asyncio
async def test_rounds_interleave_the_arms_in_a_new_order_each(answering):
    arms = [answering(f"local/{letter}", letter) for letter in "abc"]
    events = await run(arms, repeats=10)
    ran = [event.result.target for event in events if isinstance(event, ArmFinished | ArmRepeated)]
    rounds = [tuple(ran[at : at + 3]) for at in range(0, 30, 3)]
    assert all(sorted(each) == ["local/a", "local/b", "local/c"] for each in rounds)
    assert len(set(rounds)) > 2
    told = events[-1].comparison.results
    assert [tuple(sorted(told, key=lambda one: one.repeats.orders[at])) for at in range(10)] == [
        tuple(next(one for one in told if one.target == name) for name in each) for each in rounds
    ]
    assert [event.round for event in events if isinstance(event, ArmRepeated)] == [
        at for at in range(1, 10) for _ in "abc"
    ]
    assert sum(isinstance(event, ArmDelta) for event in events) == 3


@pytest.mark.asyncio
async def test_rounds_tell_cold_from_warm_and_count_errors_and_answers(changing, finish):
    arm = changing(
        "far/a",
        [
            ["red", finish("far/a", timings=Timings(total_ms=100.0))],
            ["Red.", finish("far/a", timings=Timings(total_ms=10.0))],
            ["blue", finish("far/a", timings=Timings(total_ms=30.0))],
            [Failed(error=UpstreamError("far is down"))],
        ],
    )
    (result,) = (await run([arm], reference="red", repeats=4))[-1].comparison.results
    assert (result.text, result.correct) == ("red", True)  # the first round's
    found = result.repeats
    assert (found.asked, dict(found.errors), found.answers) == (4, {"upstream_error": 1}, (("red", 2), ("blue", 1)))
    assert (found.cold["total_ms"].n, found.cold["total_ms"].median) == (1, 100.0)
    warm = found.warm["total_ms"]
    assert (warm.n, warm.median, warm.min, warm.max, warm.p95) == (2, 20.0, 10.0, 30.0, None)
    assert found.warm["ttft_ms"] is None
    assert (found.score.n, found.score.mean) == (4, 0.5)


@pytest.mark.asyncio
async def test_one_round_is_told_as_ever(answering):
    events = await run([answering("local/a")])
    assert [type(event) for event in events] == [ArmDelta, ArmDelta, ArmFinished, Compared]
    assert events[-1].comparison.results[0].repeats is None


@pytest.mark.asyncio
@pytest.mark.parametrize("more", [{"repeats": 0}, {"repeats": 21}, {"measure": "number", "reference": "red"}])
async def test_rounds_out_of_range_and_references_of_the_wrong_type_are_refused_unasked(answering, more):
    arm = answering("local/a")
    with pytest.raises(InvalidValue):
        await run([arm], **more)
    assert arm.log == []


@pytest.mark.asyncio
async def test_the_measure_that_was_asked_for_marks_the_answers(answering):
    arms = [answering("local/a", "It is red."), answering("local/b", "blue")]
    first, second = (await run(arms, reference="red", measure="contains"))[-1].comparison.results
    assert (first.correct, first.score, second.correct, second.score) == (True, 1.0, False, 0.0)
    (result,) = (await run([answering("local/a", '{"a": 1}')], reference='{"a": 1, "b": 2}', measure="json"))[
        -1
    ].comparison.results
    assert (result.correct, result.score) == (False, 0.5)
    assert [(each.path, each.right) for each in result.fields] == [("a", True), ("b", False)]
