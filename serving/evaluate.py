"""`nearfar evaluate`: finds the data set, asks targets in this process or of a running service, shows the way."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress

from comparisons.cost import dollars
from comparisons.dataset import Dataset
from comparisons.decision import VOLUME
from comparisons.egress import leaves_device
from comparisons.evaluation import Arm, Evaluation, Plan
from comparisons.loading import Defaults, load
from comparisons.pairs import Priority
from comparisons.presets import PRESETS, preset
from comparisons.run_file import Answered, RunFile
from comparisons.scoreboard import Scoreboard, scoreboard
from models.errors import BudgetSpent, Forbidden, InvalidValue, NearfarError, NotFound
from models.expand import Expansion, expand
from models.images import read_header
from models.request import AnswerRequest, GenerationSettings, Policy, TextPart, question
from serving.once import loaded
from serving.pull import cached_dataset
from serving.records import target_versions
from serving.remote import PictureSize, RemoteService, RemoteTarget
from serving.settings import Settings
from serving.targets import Target, allows
from serving.verdicts import decision_object

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ROUTE_TRIES = 2  # of each of its targets at most
FRAMING_BYTES = 1000  # what a protocol puts around the words, which a provider may count too


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run. `url`: of a running service, whose targets are asked; else this process loads them itself."""

    dataset: Dataset
    names: Sequence[str]
    plan: Plan
    out: Path
    resume: bool = False
    retry_failed: bool = False
    url: str | None = None
    weights: Mapping[Priority, float] = field(default_factory=dict)  # of priorities, for the decisions
    volume: int = VOLUME  # inputs a month


class Outcome(NamedTuple):
    """As far as the run has come. `stopped`: why it went no further, None where it is whole."""

    board: Scoreboard
    targets: Sequence[str]
    done: int
    total: int
    stopped: str | None

    def as_json(self, job: Job) -> dict[str, Any]:
        """What `--json` prints."""
        dataset = {"name": job.dataset.name, "rows": len(job.dataset.rows), "licence": job.dataset.licence}
        progress = {"answers": self.done, "of": self.total, "stopped": self.stopped, "file": str(job.out)}
        return {"dataset": dataset, **progress, **self.board.as_json(), "decisions": self.decisions}

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """The first target against each of the others, as `GET /verdict` has it."""
        return [decision_object(each) for each in self.board.decisions]


def find_dataset(name: str, defaults: Defaults, *, limit: int | None, seed: int) -> Dataset:
    """A preset, a file or folder, or what the hub's cache on this machine has. Raises NotFound, BadRequest."""
    path = Path(name)
    if name in PRESETS:
        return preset(name, limit, seed)
    if path.exists():
        return load(path, defaults)
    if _HUB_ID.fullmatch(name):
        return load(cached_dataset(name), defaults)
    raise NotFound(f"there is no file or folder {name}, and no data set of that name; there are {', '.join(PRESETS)}")


def run_path(dataset: Dataset, settings: Settings, out: Path | None, *, resume: bool) -> Path:
    """Where the answers go: as named, or into the data folder under a name with the time. To resume, the newest one."""
    if out:
        return out
    folder = settings.data_dir / "evaluations"
    if not resume:
        return folder / f"{dataset.name}-{datetime.now():%Y%m%d-%H%M%S}.jsonl"
    found = sorted(folder.glob(f"{dataset.name}-????????-??????.jsonl"))
    if not found:
        raise NotFound(f"there is no run of {dataset.name} in {folder} to go on with")
    return found[-1]


async def run(job: Job, settings: Settings, environment: Mapping[str, str], progress: Progress) -> Outcome:
    """Ask what is not answered yet. Raises Forbidden under the policy, BadRequest for another run's file."""
    async with _arms(job, settings, environment) as arms:
        plan = job.plan
        _check_prices(arms, plan)
        targets = [arm.answerer.name for arm in arms]
        header = {**plan.header(job.dataset, arms), "begun": _now(), "url": job.url}
        file = (RunFile.resume if job.resume else RunFile.begin)(job.out, header)
        try:
            file.note_session(_now(), {arm.answerer.name: arm.versions for arm in arms})
            if job.retry_failed:
                failed = [ask for ask, answered in file.answers.items() if answered.error is not None]
                plan = replace(plan, again=frozenset(failed))
            evaluation = Evaluation(job.dataset, arms, plan, file)
            for line in _foretold(job, arms):
                progress.console.print(line, markup=False, style="dim")
            stopped = await _follow(evaluation, _Running(targets, file.answers.values()), progress)
            board = scoreboard(evaluation.rows, targets, file.answers, weights=job.weights, volume=job.volume)
        finally:
            file.close()
    answers = list(file.answers.values())
    if stopped is None and all(answered.error for answered in answers):
        stopped = f"no question was answered; the first failed with: {answers[0].error}"
    return Outcome(board, targets, len(answers), evaluation.total, stopped)


def _now() -> str:
    return datetime.now().astimezone().isoformat()


def _foretold(job: Job, arms: Sequence[Arm]) -> list[str]:
    """What hosted targets can cost at most, were all rows like the first."""
    count, first = len(job.dataset.rows) * job.plan.repeats, job.dataset.rows[0]
    lines = []
    for arm in arms:
        if arm.at_most_usd:
            with suppress(NearfarError):  # a damaged first row is told with the others
                asked = first.request(GenerationSettings(max_tokens=job.plan.max_tokens), job.plan.detail)
                usd = arm.at_most_usd(replace(asked, policy=job.plan.policy))
                most = (
                    "an unknown amount" if usd is None else f"at most {dollars(usd * count)}, if all are like the first"
                )
                lines.append(f"{arm.answerer.name}: {count} questions can cost {most}")
    return lines


async def _follow(evaluation: Evaluation, running: _Running, progress: Progress) -> str | None:
    """Show each answer as it comes. Returns why the run stopped before its end."""
    task = progress.add_task(running.text, total=evaluation.total, completed=evaluation.done)
    try:
        async with aclosing(evaluation.answers()) as answers:
            async for answered in answers:
                running.add(answered)
                progress.update(task, advance=1, description=running.text)
    except BudgetSpent as error:
        return error.message
    return None


class _Running:
    """Accuracy of each target so far, for one line."""

    def __init__(self, targets: Sequence[str], answers: Any) -> None:
        self._right = dict.fromkeys(targets, 0)
        self._asked = dict.fromkeys(targets, 0)
        for answered in answers:
            self.add(answered)

    def add(self, answered: Answered) -> None:
        self._right[answered.ask.target] += bool(answered.correct)
        self._asked[answered.ask.target] += 1

    @property
    def text(self) -> str:
        shown = [
            f"{target.removeprefix('local/')} {self._right[target] / asked:.0%}" if asked else target
            for target, asked in self._asked.items()
        ]
        return " · ".join(shown)


@asynccontextmanager
async def _arms(job: Job, settings: Settings, environment: Mapping[str, str]) -> AsyncIterator[list[Arm]]:
    if job.url is None:
        async with loaded(settings, environment) as services:
            chosen = services.targets().choose_several(job.names, settings.policy)
            yield [
                Arm(
                    answerer=target.answerer,
                    alone=target.kind != "hosted",
                    versions=target_versions(target),
                    at_most_usd=None if target.kind == "local" else partial(highest_price_usd, target),
                )
                for target in chosen
            ]
        return
    if settings.policy == "local-only" and leaves_device(job.url):
        raise Forbidden(f"{job.url} is not on this device, and policy local-only lets nothing leave it")
    service = RemoteService(url=job.url, key=environment.get("NEARFAR_API_KEY", ""))
    yield [_remote_arm(service, target) for target in _chosen(service.targets(), job.names, settings.policy)]


def _remote_arm(service: RemoteService, listed: Mapping[str, Any]) -> Arm:
    target, kind = RemoteTarget(service, listed["name"]), listed["kind"]
    price = None if kind == "local" else partial(_remote_price_usd, target, tries=ROUTE_TRIES if kind == "route" else 1)
    return Arm(answerer=target, alone=kind != "hosted", at_most_usd=price)


def _remote_price_usd(target: RemoteTarget, request: AnswerRequest, *, tries: int) -> float | None:
    """As the service itself estimates it."""
    size = size_of(request)
    told = target.estimate(text_bytes=size.text_bytes, pictures=size.pictures, max_tokens=request.settings.max_tokens)
    usd = told["usd"]
    return _own_or_unknown(leaves_device=told["leaves_device"]) if usd is None else usd * tries


def _chosen(listed: Sequence[Mapping[str, Any]], names: Sequence[str], policy: Policy) -> list[Mapping[str, Any]]:
    """Of what a service lists. Without names, what it compares by default and this side's policy allows too."""
    allowed = [each for each in listed if each["allowed"] and (policy != "local-only" or not each["leaves_device"])]
    by_name = {alias: each for each in reversed(allowed) for alias in (each["name"], *each["aliases"])}
    by_name |= {each["name"].removeprefix("local/"): each for each in allowed}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise NotFound(f"the service has no target {unknown[0]!r} that policy {policy} allows", param="targets")
    chosen = [by_name[name] for name in names] or [each for each in allowed if each["compared_by_default"]]
    if len({each["name"] for each in chosen}) < len(chosen):
        raise InvalidValue("a target is named twice", param="targets")
    return chosen


def highest_price_usd(target: Target, request: AnswerRequest) -> float | None:
    """What a request to it can cost at most, before it is sent; None where no price is known.

    A route may ask each of its targets, and ask it again.
    """
    if target.kind == "route":
        hops = [highest_price_usd(each, request) for each in target.chain if allows(request.policy, each)]
        known = [usd for usd in hops if usd is not None]
        return ROUTE_TRIES * sum(known) if len(known) == len(hops) else None
    if target.estimate is None:
        return 0.0
    size = size_of(request)
    found = target.estimate(
        text_bytes=FRAMING_BYTES + size.text_bytes,
        pictures=[(picture.width, picture.height) for picture in size.pictures],
        max_tokens=request.settings.max_tokens,
    )
    return _own_or_unknown(leaves_device=target.leaves_device) if found.usd is None else found.usd


def _own_or_unknown(*, leaves_device: bool) -> float | None:
    """Without a price: what listens on this device is one's own and counts nothing, all else is not known."""
    return None if leaves_device else 0.0


class Size(NamedTuple):
    """How much a request is, frames and pages of it as the pictures that they become."""

    text_bytes: int
    pictures: Sequence[PictureSize]


def size_of(request: AnswerRequest) -> Size:
    """Reads the headers of its pictures. Raises BadRequest and its kin."""
    whole = expand(request, Expansion(lossless=False))
    parts = [part for message in whole.messages for part in message.parts]
    found = [(read_header(picture.data), len(picture.data)) for picture in whole.images]
    return Size(
        text_bytes=sum(len(part.text.encode()) for part in parts if isinstance(part, TextPart)),
        pictures=[PictureSize(header.width, header.height, size) for header, size in found],
    )


def _check_prices(arms: Sequence[Arm], plan: Plan) -> None:
    """A cap holds only where prices are known, and says so before the first question."""
    if plan.max_usd is None:
        return
    for arm in arms:
        if arm.at_most_usd and arm.at_most_usd(replace(question("?"), policy=plan.policy)) is None:
            raise InvalidValue(
                f"no price is known for {arm.answerer.name}, so --max-usd could not be held", param="max_usd"
            )
