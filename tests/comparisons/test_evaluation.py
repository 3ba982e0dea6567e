"""A data set through scripted targets: what is asked, in which order, what is stored, what a cap and a cut leave."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

from comparisons.corruptions import Corruption
from comparisons.dataset import Dataset, Media, Row
from comparisons.evaluation import Arm, Evaluation, Plan
from comparisons.run_file import Answered, Ask, RunFile
from comparisons.scoreboard import scoreboard
from models.errors import BadRequest, BudgetSpent, InvalidValue, Unavailable, UpstreamError
from models.events import Cost, Egress, Failed, TextDelta, Timings, Usage
from tests.serving.conftest import wait_for


def dataset(count: int = 6, **changes: object) -> Dataset:
    rows = [
        Row(**{
            "row_id": str(number), "prompt": f"question {number}", "references": ("red" if number % 2 else "blue",),
            "slices": (f"odd={number % 2}",), **changes,
        })
        for number in range(count)
    ]  # fmt: skip
    return Dataset(name="d", rows=tuple(rows), licence="ours")


class Counting:
    """Answers every question alike, and notes who was asked when, and how many at once."""

    def __init__(self, inner, log: list[str], hand: Counter[str]) -> None:
        self.inner, self.name, self.log, self.hand = inner, inner.name, log, hand
        self.most = 0

    async def stream(self, request):
        self.log.append(f"{self.name} {request.messages[0].parts[-1].text}")
        self.hand[self.name] += 1
        self.most = max(self.most, self.hand.total())
        try:
            async for event in self.inner.stream(request):
                yield event
        finally:
            self.hand[self.name] -= 1


async def evaluated(path: Path, data: Dataset, arms: list[Arm], plan: Plan, *, resume: bool = False) -> RunFile:
    run = (RunFile.resume if resume else RunFile.begin)(path, plan.header(data, arms))
    try:
        async for _ in Evaluation(data, arms, plan, run).answers():
            pass
    finally:
        run.close()
    return run


@pytest.mark.asyncio
async def test_every_row_goes_to_every_target_as_often_as_asked_in_random_order(tmp_path, answering):
    log: list[str] = []
    hand: Counter[str] = Counter()
    arms = [Arm(answerer=Counting(answering(name, "red"), log, hand)) for name in ("local/a", "local/b")]
    run = await evaluated(tmp_path / "r", dataset(12), arms, Plan(repeats=2))
    assert len(log) == 48
    assert set(Counter(log).values()) == {2}
    assert len(run.answers) == 48
    first = [entry.split()[0] for entry in log[::2]]
    assert 4 < first.count("local/a") < 20  # who goes first is random
    questions = [entry.split()[-1] for entry in log[:24:2]]
    assert questions != sorted(questions, key=int)
    pairs = [{entry.split(maxsplit=1)[1] for entry in log[at : at + 2]} for at in range(0, 48, 2)]
    assert all(len(pair) == 1 for pair in pairs)  # targets are interleaved row by row
    board = scoreboard(dataset(12).rows, ["local/a", "local/b"], run.answers)
    assert [(each.n, each.answers, each.accuracy.value) for each in board.targets] == [(12, 24, 0.5), (12, 24, 0.5)]
    assert {name: standings[0].accuracy.value for name, standings in board.slices.items()} == {"odd=0": 0, "odd=1": 1}
    assert [(each.same, each.n) for each in board.agreements] == [(12, 12)]
    first = json.loads((tmp_path / "r").read_text().splitlines()[0])
    assert [row["prompt"] for row in first["rows"]] == [f"question {number}" for number in range(12)]
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o600


@pytest.mark.asyncio
async def test_hosted_targets_are_asked_several_at_once_and_local_ones_alone(tmp_path, answering):
    hand: Counter[str] = Counter()
    local, far = (Counting(answering(name, pause_s=0.002), [], hand) for name in ("local/a", "far/b"))
    arms = [Arm(answerer=local), Arm(answerer=far, alone=False)]
    run = await evaluated(tmp_path / "r", dataset(12), arms, Plan(concurrency=4))
    assert (local.most, far.most) == (1, 4)
    assert {answered.at_once for ask, answered in run.answers.items() if ask.target == "far/b"} == {4}
    hand.clear()
    far.most = 0
    await evaluated(tmp_path / "s", dataset(4), arms, Plan())
    assert far.most == 1


@pytest.mark.asyncio
async def test_local_targets_with_replicas_are_asked_as_many_at_once_and_the_board_says_so(tmp_path, answering):
    hand: Counter[str] = Counter()
    local, far = (Counting(answering(name, pause_s=0.002), [], hand) for name in ("local/a", "far/b"))
    arms = [Arm(answerer=local), Arm(answerer=far, alone=False)]
    run = await evaluated(tmp_path / "r", dataset(70), arms, Plan(workers=3))
    assert (local.most, far.most) == (3, 1)
    assert len(run.answers) == 140
    board = scoreboard(dataset(70).rows, ["local/a", "far/b"], run.answers)
    assert [each.at_once for each in board.targets] == [3, 1]


@pytest.mark.asyncio
async def test_targets_that_do_not_fit_into_memory_together_take_turns_by_blocks_of_rows(tmp_path, finish):
    class Swapped:
        """One of two models of which one is in memory at a time."""

        in_memory: ClassVar[list[str]] = []

        def __init__(self, name: str) -> None:
            self.name = name

        async def stream(self, request):
            load_ms = None if self.in_memory[-1:] == [self.name] else 1000.0
            self.in_memory.append(self.name)
            yield finish(self.name, timings=Timings(load_ms=load_ms, total_ms=1.0))

    arms = [Arm(answerer=Swapped(name)) for name in ("local/a", "local/b")]
    run = await evaluated(tmp_path / "r", dataset(100), arms, Plan())
    assert len(run.answers) == 200
    loads = sum(answered.load_ms is not None for answered in run.answers.values())
    assert loads < 30  # 100 or more, were each row asked of both in turn


@pytest.mark.asyncio
async def test_a_run_that_was_cut_off_goes_on_where_it_was_and_a_torn_line_counts_for_nothing(tmp_path, answering):
    log: list[str] = []
    arms = [Arm(answerer=Counting(answering("far/a", "red"), log, Counter()))]
    data, path = dataset(10), tmp_path / "run.jsonl"
    run = RunFile.begin(path, Plan().header(data, arms))
    async with aclosing(Evaluation(data, arms, Plan(), run).answers()) as answers:
        for _ in range(4):
            await anext(answers)
    run.close()
    with path.open("ab") as file:
        file.write(b'{"kind": "answer", "row_id": "9", "tar')
    again = await evaluated(path, data, arms, Plan(), resume=True)
    assert len(again.answers) == 10
    assert max(Counter(log).values()) == 1
    assert all(json.loads(line) for line in path.read_text().splitlines())
    once_more = await evaluated(path, data, arms, Plan(), resume=True)
    assert (len(log), once_more.answers) == (10, again.answers)


@pytest.mark.asyncio
async def test_a_file_of_another_run_another_process_or_nothing_like_it_is_refused(tmp_path, answering):
    arms = [Arm(answerer=answering("local/a"))]
    path = tmp_path / "run.jsonl"
    await evaluated(path, dataset(2), arms, Plan())
    for data, plan, targets, said in (
        (dataset(3), Plan(), arms, "its dataset differs"),
        (dataset(2, prompt="other"), Plan(), arms, "its dataset differs"),
        (dataset(2), Plan(repeats=2), arms, "its repeats differs"),
        (dataset(2), Plan(), [Arm(answerer=answering("local/b"))], "its targets differs"),
    ):
        with pytest.raises(BadRequest, match=said):
            RunFile.resume(path, plan.header(data, targets))
    header = Plan().header(dataset(2), arms)
    with pytest.raises(BadRequest, match="there already: --resume"):
        RunFile.begin(path, header)
    held = RunFile.resume(path, header)
    with pytest.raises(Unavailable, match="another process"):
        RunFile.resume(path, header)
    held.close()
    whole = path.read_text()
    for content, said in (
        ("", "no file of an evaluation"),
        ("{}\n", "no file of an evaluation"),
        (whole + "not json\n", "line 6: is not JSON"),
        (whole + '{"kind": "answer"}\n', "line 6: is no line of an evaluation"),
    ):
        path.write_text(content)
        with pytest.raises(BadRequest, match=said):
            RunFile.resume(path, header)
        assert path.read_text() == content


@pytest.mark.asyncio
async def test_errors_are_stored_counted_as_not_right_and_asked_again_when_told_to(tmp_path, answering, scripted):
    failing = scripted("far/a", [Failed(error=UpstreamError("far answered 500"))])
    arms = [Arm(answerer=failing, alone=False), Arm(answerer=answering("local/b", "red"))]
    data, path = dataset(4), tmp_path / "run.jsonl"
    run = await evaluated(path, data, arms, Plan())
    far, near = scoreboard(data.rows, ["far/a", "local/b"], run.answers).targets
    assert (far.errors, far.n, far.accuracy.value, far.total_ms) == (4, 4, 0.0, None)
    assert (near.errors, near.accuracy.value) == (0, 0.5)
    healed = [Arm(answerer=answering("far/a", "red"), alone=False), arms[1]]
    failed = frozenset(ask for ask, answered in run.answers.items() if answered.error)
    assert len(failed) == 4
    again = await evaluated(path, data, healed, Plan(), resume=True)
    assert again.answers == run.answers
    healed_run = await evaluated(path, data, healed, Plan(again=failed), resume=True)
    assert not any(answered.error for answered in healed_run.answers.values())


@pytest.mark.asyncio
async def test_a_damaged_picture_is_an_error_of_every_target_and_nothing_is_sent(tmp_path, answering):
    gone = Media(source=tmp_path / "gone.png")
    (tmp_path / "gone.png").write_bytes(b"x")
    data = dataset(2, images=(gone,))
    fingerprint = data.fingerprint
    arms = [Arm(answerer=answering("local/a"))]
    run = RunFile.begin(tmp_path / "r", Plan().header(data, arms))
    (tmp_path / "gone.png").unlink()
    async for answered in Evaluation(data, arms, Plan(), run).answers():
        assert "No such file" in answered.error
    run.close()
    assert arms[0].answerer.log == []
    assert fingerprint


def paid(usd: float | None) -> dict[str, object]:
    return {"cost": Cost(usd=usd, basis="test"), "egress": Egress(left_device=True, bytes_sent=9, destination="far")}


@pytest.mark.asyncio
@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_cap_stops_before_it_is_passed_and_a_higher_one_goes_on(tmp_path, answering, concurrency):
    arms = [
        Arm(answerer=answering("far/a", **paid(0.02)), alone=False, at_most_usd=lambda request: 0.05),
        Arm(answerer=answering("local/b")),
    ]
    data, path = dataset(20), tmp_path / "run.jsonl"
    with pytest.raises(BudgetSpent, match="--resume with a higher --max-usd"):
        await evaluated(path, data, arms, Plan(max_usd=0.20, concurrency=concurrency))
    log = arms[0].answerer.log
    asked = log.count("started")
    # The last one leaves while what is spent and what is held leave 5 cents.
    assert 0.02 * asked <= 0.20
    assert asked == 8 if concurrency == 1 else 5 <= asked <= 8
    await evaluated(path, data, arms, Plan(max_usd=2.0, concurrency=concurrency), resume=True)
    assert log.count("started") == 20


@pytest.mark.asyncio
async def test_what_has_no_known_cost_counts_its_highest_and_what_was_refused_nothing(tmp_path, answering, scripted):
    sent = Egress(left_device=True, bytes_sent=9, destination="far")
    unsent = Egress(left_device=False, bytes_sent=0, destination="far")
    broken = partial(UpstreamError, "far broke off")
    refused = partial(UpstreamError, "far answered 429", upstream_status=429)
    for number, (answerer, counted) in enumerate([
        (answering("far/a", **paid(None)), 0.05),
        (answering("far/a", **paid(0.01)), 0.01),
        (scripted("far/a", [TextDelta(text="r"), Failed(error=broken(), egress=sent)]), 0.05),
        (scripted("far/a", [Failed(error=broken(), egress=unsent)]), 0.0),
        (scripted("far/a", [Failed(error=refused(), egress=sent)]), 0.0),
        (scripted("far/a", [Failed(error=refused(), egress=sent, usage=Usage(prompt_tokens=5))]), 0.05),
    ]):  # fmt: skip
        arms = [Arm(answerer=answerer, alone=False, at_most_usd=lambda request: 0.05)]
        run = await evaluated(tmp_path / str(number), dataset(1), arms, Plan(max_usd=1.0))
        assert run.usd_counted == pytest.approx(counted), number


@pytest.mark.asyncio
async def test_a_question_in_hand_when_the_process_died_counts_its_highest_price(tmp_path, answering):
    arms = [Arm(answerer=answering("far/a", pause_s=30), alone=False, at_most_usd=lambda request: 0.05)]
    run = RunFile.begin(tmp_path / "r", Plan().header(dataset(3), arms))
    task = asyncio.create_task(anext(Evaluation(dataset(3), arms, Plan(max_usd=1.0), run).answers()))
    await asyncio.to_thread(wait_for, lambda: arms[0].answerer.log == ["started"])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    run.close()
    again = RunFile.resume(tmp_path / "r", Plan().header(dataset(3), arms))
    assert (again.answers, again.usd_counted) == ({}, 0.05)
    again.close()


@pytest.mark.parametrize(
    "wrong",
    [{"repeats": 0}, {"concurrency": 0}, {"concurrency": 65}, {"max_usd": -1.0}, {"max_usd": float("nan")}],
)
def test_a_plan_checks_itself(wrong):
    with pytest.raises(InvalidValue):
        Plan(**wrong)


def test_repeats_of_a_row_are_no_new_rows_and_those_that_differ_are_counted():
    rows = dataset(4).rows
    answers = {}
    for row in rows:
        for repeat in range(3):
            ask = Ask(row.row_id, "t", repeat)
            right = row.row_id != "0" and not (row.row_id == "1" and repeat == 2)
            answers[ask] = Answered(ask=ask, text="x", correct=right, score=float(right), usd=0.01, bytes_sent=10)
    (found,) = scoreboard(rows, ["t"], answers).targets
    assert (found.n, found.answers, found.changed) == (4, 12, 1)
    assert found.accuracy.value == pytest.approx((0 + 2 / 3 + 1 + 1) / 4)
    assert (found.usd, found.bytes_sent) == (pytest.approx(0.12), 120)


def test_the_first_target_is_decided_against_each_other_one_on_what_both_were_asked_about_clean_pictures():
    worse = Media(source=b"", corruption=Corruption(kind="blur", severity=1))
    clean = dataset(40).rows
    blurred = [replace(row, row_id=f"{row.row_id}#blur-1", images=(worse,)) for row in clean]
    answers = {}
    for row in (*clean, *blurred):
        for target in ("local/a", "far/b", "far/c"):
            if target == "far/c" and int(row.row_id.partition("#")[0]) > 20:
                continue  # cut off there
            ask, right = Ask(row.row_id, target, 0), target != "local/a"
            answers[ask] = Answered(ask=ask, text="x", correct=right, score=float(right), usd=0.0, total_ms=5.0)
    found = scoreboard([*clean, *blurred], ["local/a", "far/b", "far/c"], answers).decisions
    assert [(each.first, each.second, each.n) for each in found] == [("local/a", "far/b", 40), ("local/a", "far/c", 21)]
    assert (found[0].choice, found[0].target) == ("ship hosted", "far/b")
