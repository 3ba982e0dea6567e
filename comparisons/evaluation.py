"""A data set through many targets: every row, every target, interleaved, each answer stored before the next is asked.

Targets of this machine are measured alone. Hosted ones may be asked several questions at once, but not meanwhile; so
may local ones of a service with several replicas. Such times count in no decision.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from comparisons.cost import dollars
from comparisons.dataset import Dataset, Row
from comparisons.records import input_record
from comparisons.run_file import Answered, Ask, RunFile
from models.answerer import Answer, Answerer, whole
from models.errors import BudgetSpent, InvalidValue, NearfarError, Unavailable, UpstreamError
from models.images import Detail
from models.reduction import Reduction
from models.request import AnswerRequest, GenerationSettings, Policy

MAX_CONCURRENCY = 64
MAX_WORKERS = 1024
LOAD_ROWS = 16  # asked of one target after another, where only one of them fits into memory


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A target. `alone`: it runs on this machine, where two at once would slow each other.

    `at_most_usd` is what a request to it can cost at most, None where that is not known; without it, nothing.
    """

    answerer: Answerer
    alone: bool = True
    versions: Mapping[str, Any] = field(default_factory=dict)  # of what makes its answers; empty: not known
    at_most_usd: Callable[[AnswerRequest], float | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a data set is asked. `seed` fixes the order of rows and targets.

    At once, hosted targets get `concurrency` questions, local ones `workers`: as many as there are replicas of them.
    """

    repeats: int = 1
    concurrency: int = 1
    workers: int = 1
    seed: int = 0
    max_usd: float | None = None
    max_tokens: int = 256
    detail: Detail = "auto"
    policy: Policy = "local-only"
    reduction: Reduction | None = None  # of every picture, for every target alike
    again: frozenset[Ask] = field(default_factory=frozenset)  # answered, and asked again all the same

    def __post_init__(self) -> None:
        bounds = {
            "repeats": (self.repeats, 1000),
            "concurrency": (self.concurrency, MAX_CONCURRENCY),
            "workers": (self.workers, MAX_WORKERS),
        }
        for name, (value, most) in bounds.items():
            if not 1 <= value <= most:
                raise InvalidValue(f"{name} must be 1 to {most}, got {value}", param=name)
        if self.max_usd is not None and not 0 <= self.max_usd < float("inf"):
            raise InvalidValue("max-usd is a number of dollars, 0 or more", param="max_usd")

    def header(self, dataset: Dataset, arms: Sequence[Arm]) -> dict[str, Any]:
        """What a run file begins with."""
        return {
            "dataset": {"name": dataset.name, "rows": len(dataset.rows), "sha256": dataset.fingerprint},
            "licence": dataset.licence,
            "targets": [arm.answerer.name for arm in arms],
            "repeats": self.repeats,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "detail": self.detail,
            "reduction": asdict(self.reduction) if self.reduction else None,
            "rows": [row.shown for row in dataset.rows],
        }


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """One question on its way to one target."""

    row: Row
    arm: Arm
    ask: Ask
    order: int


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A turn with its files read, or why they cannot be, and the money that is set aside for it."""

    turn: _Turn
    request: AnswerRequest | NearfarError
    at_most_usd: float = 0.0


class Evaluation:
    """One run, from the first or from where a run file stands."""

    def __init__(self, dataset: Dataset, arms: Sequence[Arm], plan: Plan, run: RunFile) -> None:
        self.rows = random.Random(f"{plan.seed}:rows").sample(dataset.rows, len(dataset.rows))
        self._arms, self._plan, self._run = arms, plan, run
        self._rng = random.Random(f"{plan.seed}:order")
        self._held_usd = 0.0  # of what is in hand
        self._loads: Counter[str] = Counter()  # how often each target had to be loaded
        self.total = len(self.rows) * len(arms) * plan.repeats
        self.done = sum(1 for turn in self._turns() if self._is_done(turn))

    async def answers(self) -> AsyncGenerator[Answered, None]:
        """Each answer once it is stored. What the run file has already is not asked again.

        Raises BudgetSpent before a question that could pass `max_usd`, once what is in hand is stored, and Unavailable
        where the file cannot be written. Closing the iterator early cancels what is in hand.
        """
        at_once, workers = self._plan.concurrency, self._plan.workers
        for block in self._blocks():
            one_by_one = at_once == workers == 1
            alone = [turn for turn in block if turn.arm.alone or one_by_one]
            together = [] if one_by_one else [turn for turn in block if not turn.arm.alone]
            if self._take_turns:
                targets = [turn.ask.target for turn in alone]
                alone.sort(key=lambda turn: targets.index(turn.ask.target))
            groups = [(alone, workers), (together, at_once)]
            for turns, limit in self._rng.sample(groups, len(groups)):
                async with aclosing(self._asked(turns, limit)) as answers:
                    async for answered in answers:
                        self._loads[answered.ask.target] += answered.load_ms is not None
                        yield answered

    @property
    def _take_turns(self) -> bool:
        """Some target had to be loaded again: they do not fit into memory together."""
        return max(self._loads.values(), default=0) > 1

    def _blocks(self) -> Iterator[list[_Turn]]:
        """Rows that are asked together: one, as many as hosted targets are asked at once, or enough to load for, or to
        keep all replicas at work.
        """
        for repeat in range(self._plan.repeats):
            start = 0
            while start < len(self.rows):
                many = self._take_turns or self._plan.workers > 1
                end = start + max(self._plan.concurrency, LOAD_ROWS * self._plan.workers if many else 1)
                turns = [turn for row in self.rows[start:end] for turn in self._turns_of(row, repeat)]
                yield [turn for turn in turns if not self._is_done(turn)]
                start = end

    def _turns(self) -> Iterator[_Turn]:
        for repeat in range(self._plan.repeats):
            for row in self.rows:
                yield from self._turns_of(row, repeat)

    def _turns_of(self, row: Row, repeat: int) -> list[_Turn]:
        """In an order of its own, the same however often the run was cut off."""
        arms = random.Random(f"{self._plan.seed}:{row.row_id}:{repeat}").sample(self._arms, len(self._arms))
        return [
            _Turn(row=row, arm=arm, ask=Ask(row.row_id, arm.answerer.name, repeat), order=order)
            for order, arm in enumerate(arms)
        ]

    def _is_done(self, turn: _Turn) -> bool:
        return turn.ask in self._run.answers and turn.ask not in self._plan.again

    async def _asked(self, turns: Sequence[_Turn], at_once: int) -> AsyncGenerator[Answered, None]:
        waiting = list(reversed(turns))
        running: set[asyncio.Task[Answered]] = set()
        stop: BudgetSpent | None = None
        try:
            while waiting or running:
                try:
                    while waiting and len(running) < at_once:
                        running.add(asyncio.create_task(self._answer(await self._prepared(waiting[-1]), at_once)))
                        waiting.pop()
                except BudgetSpent as error:
                    stop, waiting = error, []
                if running:
                    finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in finished:
                        yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if stop:
            raise stop

    async def _prepared(self, turn: _Turn) -> _Prepared:
        """Read its files, and set its highest price aside. Raises BudgetSpent where too little is left for it."""
        plan = self._plan
        try:
            settings = GenerationSettings(max_tokens=plan.max_tokens)
            request = await asyncio.to_thread(turn.row.request, settings, plan.detail)
            if turn.row.row_id not in self._run.inputs:
                self._run.note_input(turn.row.row_id, await asyncio.to_thread(input_record, request, keep=False))
            # A salt of its own: what was asked before is no merit of a target on this machine.
            salt = f"{turn.row.row_id} {turn.ask.repeat}"
            request = replace(request, policy=plan.policy, reduction=plan.reduction, cache_salt=salt)
            at_most = await asyncio.to_thread(self._highest_price, turn.arm, request)
        except NearfarError as error:
            return _Prepared(turn=turn, request=error)
        counted = self._run.usd_counted + self._held_usd
        if plan.max_usd is not None and at_most and counted + at_most > plan.max_usd:
            raise BudgetSpent(
                f"stopped before {dollars(plan.max_usd)} could be passed: {dollars(counted)} may be spent so far, "
                f"and the next question to {turn.ask.target} can cost {dollars(at_most)}; "
                "--resume with a higher --max-usd goes on"
            )
        if at_most:
            self._run.note_asking(turn.ask, at_most)
            self._held_usd += at_most
        return _Prepared(turn=turn, request=request, at_most_usd=at_most)

    def _highest_price(self, arm: Arm, request: AnswerRequest) -> float:
        """0 where it is not known. Where there is a cap to hold, raises what hinders it."""
        try:
            usd = arm.at_most_usd(request) if arm.at_most_usd else 0.0
        except NearfarError:
            usd = None
            if self._plan.max_usd is not None:
                raise
        if usd is None and self._plan.max_usd is not None:
            raise Unavailable(f"no price is known for {arm.answerer.name}, so a cap could not be held")
        return usd or 0.0

    async def _answer(self, prepared: _Prepared, at_once: int) -> Answered:
        turn, request = prepared.turn, prepared.request
        start = Answered(ask=turn.ask, order=turn.order, at_once=at_once)
        try:
            if isinstance(request, NearfarError):
                raise request
            answer = await whole(turn.arm.answerer, request)
        except NearfarError as error:
            counted = _counted_after(error, prepared.at_most_usd)
            answered = _failed(start, error, counted)
        else:
            answered = _finished(start, turn.row, answer, prepared.at_most_usd)
        self._held_usd -= prepared.at_most_usd
        self._run.add(answered)
        return answered


def _finished(start: Answered, row: Row, answer: Answer, at_most_usd: float) -> Answered:
    finished, score = answer.finished, row.score(answer.text)
    return replace(
        start,
        text=answer.text,
        score=score.score if score else None,
        correct=score.correct if score else None,
        model=finished.model,
        finish_reason=finished.finish_reason,
        confidence=finished.confidence,
        load_ms=finished.timings.load_ms,
        ttft_ms=finished.timings.ttft_ms,
        total_ms=finished.timings.total_ms,
        prompt_tokens=finished.usage.prompt_tokens,
        completion_tokens=finished.usage.completion_tokens,
        cached_tokens=finished.usage.cached_tokens,
        cache_saved_usd=finished.usage.cache_saved_usd,
        usd=finished.cost.usd,
        usd_counted=at_most_usd if finished.cost.usd is None else finished.cost.usd,
        bytes_sent=finished.egress.bytes_sent,
        left_device=finished.egress.left_device,
        destination=finished.egress.destination,
        model_bytes=finished.memory.model_bytes,
        process_peak_bytes=finished.memory.process_peak_bytes,
        images=tuple(image.sha256 for image in finished.images),
    )


def _failed(start: Answered, error: NearfarError, usd_counted: float) -> Answered:
    account = error.account
    return replace(
        start,
        error=error.message,
        error_type=error.type,
        usd=account.cost.usd if account and account.cost else None,
        usd_counted=usd_counted,
        bytes_sent=account.egress.bytes_sent if account and account.egress else None,
        left_device=account.egress.left_device if account and account.egress else None,
    )


def _counted_after(error: NearfarError, at_most_usd: float) -> float:
    """What a failure counts: nothing where nothing was sent or the provider refused it, else the most it can cost."""
    account = error.account
    if account is None or (account.egress and account.egress.bytes_sent == 0):
        return 0.0
    refused = isinstance(error, UpstreamError) and error.upstream_status is not None and error.upstream_status < 500
    return 0.0 if refused and account.usage is None else at_most_usd
