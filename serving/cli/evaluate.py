"""`nearfar evaluate` on the command line: its options, and what it prints."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from comparisons.corruptions import KINDS, parse_corruptions
from comparisons.dataset import Dataset, with_corruptions
from comparisons.decision import MAX_VOLUME, VOLUME
from comparisons.evaluation import Plan
from comparisons.loading import Defaults
from comparisons.measures import Measure
from comparisons.pairs import parse_weights
from models.errors import InvalidValue, NearfarError
from models.images import Detail
from models.reduction import settled
from models.request import Policy, Task
from serving.cli.console import JsonFlag, fail, settings_from
from serving.settings import Settings

if TYPE_CHECKING:
    from serving.evaluate import Job, Outcome

COLUMNS = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())


def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            help="JSONL file, folder, file of TextVQA, DocVQA, ChartQA, MMBench or POPE, id in the hub's cache, or "
            "scenes, scenes-absent, scenes-many, documents, alt-text, inspection, which are drawn here"
        ),
    ],
    targets: Annotated[str, typer.Option(help="comma-separated target names  [default: all the policy allows]")] = "",
    measure: Annotated[
        Measure | None, typer.Option(help="of rows that name none  [default: by their reference]")
    ] = None,
    task: Annotated[Task, typer.Option(help="of rows that name none")] = "vqa",
    prompt: Annotated[str | None, typer.Option(help="of rows that have none")] = None,
    images: Annotated[Path | None, typer.Option(help="folder of the pictures  [default: the file's]")] = None,
    repeats: Annotated[int, typer.Option(help="times that every row is asked")] = 1,
    concurrency: Annotated[int, typer.Option(help="questions to hosted targets at once; local ones run alone")] = 1,
    workers: Annotated[
        int, typer.Option(help="questions to local targets of --url at once: as many as it has replicas")
    ] = 1,
    limit: Annotated[int | None, typer.Option(help="rows to ask, drawn by the seed")] = None,
    seed: Annotated[int, typer.Option(help="of the order, of corruptions and of drawn sets")] = 0,
    max_usd: Annotated[float | None, typer.Option(help="stop before a question that could pass it")] = None,
    max_tokens: Annotated[int, typer.Option()] = 256,
    detail: Annotated[Detail, typer.Option()] = "auto",
    corrupt: Annotated[str, typer.Option(help=f"ask again about worse pictures: {','.join(KINDS)}")] = "",
    severity: Annotated[str, typer.Option(help="how much worse, of 1 to 5")] = "1,3,5",
    policy: Annotated[
        Policy | None, typer.Option(help="how far the pictures may travel  [default: local-only]")
    ] = None,
    endpoint: Annotated[list[str] | None, typer.Option(help="OpenAI-compatible endpoint NAME=URL,MODEL")] = None,
    url: Annotated[str | None, typer.Option(help="a running service to ask; its key in NEARFAR_API_KEY")] = None,
    weights: Annotated[str, typer.Option(help="of priorities in the decision: quality=1,cost=0.2 and such")] = "",
    volume: Annotated[int, typer.Option(min=1, max=MAX_VOLUME, help="inputs a month, for the buyer")] = VOLUME,
    out: Annotated[Path | None, typer.Option(help="file of the answers  [default: one in the data folder]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with that file; no answer is paid for twice")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="with --resume, ask failed ones again")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Ask several targets every question of a data set: accuracy with intervals, times, dollars, bytes that left.

    Every answer is on disk before the next question: Ctrl-C and worse lose none, and --resume goes on. A stop by
    --max-usd is status 1.
    """
    from serving.evaluate import Job, run_path

    settings = settings_from(policy=policy, endpoints=tuple(endpoint or ()))
    if workers > 1 and not url:
        fail("--workers needs --url of a service with replicas: nearfar serve --ray --replicas N", status=2)
    try:
        plan = Plan(
            repeats=repeats,
            concurrency=concurrency,
            workers=workers,
            seed=seed,
            max_usd=max_usd,
            max_tokens=max_tokens,
            detail=detail,
            policy=settings.policy,
            reduction=settled(settings.reduce, compared=True),
        )
        corruptions = parse_corruptions(corrupt, severity)
        defaults = Defaults(prompt=prompt, task=task, measure=measure, images=images)
        dataset = _dataset(data, defaults, limit, seed, remote=url is not None)
        if corruptions:
            dataset = with_corruptions(dataset, corruptions, seed)
        job = Job(
            dataset=dataset,
            names=[name.strip() for name in targets.split(",") if name.strip()],
            plan=plan,
            out=run_path(dataset, settings, out, resume=resume),
            resume=resume,
            retry_failed=retry_failed,
            url=url,
            weights=parse_weights(weights),
            volume=volume,
        )
        outcome = _followed(job, settings)
    except InvalidValue as error:
        fail(error.message, status=2)
    except NearfarError as error:
        fail(error.message)
    _show(job, outcome, as_json=as_json)
    if outcome.stopped:
        fail(outcome.stopped)


def _followed(job: Job, settings: Settings) -> Outcome:
    from serving.evaluate import run

    console, dataset = Console(stderr=True), job.dataset
    told = [f"{dataset.name}: {len(dataset.rows)} rows", dataset.about, f"licence: {dataset.licence}"]
    console.print("; ".join(filter(None, told)), markup=False, style="dim")
    try:
        with Progress(*COLUMNS, console=console) as progress:
            return asyncio.run(run(job, settings, os.environ, progress))
    except KeyboardInterrupt:
        kept = f"{job.out} keeps what was answered, --resume goes on" if job.out.exists() else "nothing was asked yet"
        fail(f"interrupted: {kept}", status=130)


def _dataset(data: str, defaults: Defaults, limit: int | None, seed: int, *, remote: bool) -> Dataset:
    from serving.evaluate import find_dataset

    if limit is not None and limit < 1:
        raise InvalidValue(f"limit must be at least 1, got {limit}", param="limit")
    found = find_dataset(data, defaults, limit=limit, seed=seed)
    if remote:
        found = found.only([row for row in found.rows if not row.text_first])  # POST /infer shows pictures first
    return found.sample(limit, seed)


def _show(job: Job, outcome: Outcome, *, as_json: bool) -> None:
    from serving.tables.decisions import evaluation_tables

    if as_json:
        print(json.dumps(outcome.as_json(job), ensure_ascii=False, indent=2, allow_nan=False))
    else:
        evaluation_tables(outcome.board, outcome.decisions, Console())
        Console(stderr=True).print(f"answers: {job.out}", markup=False, soft_wrap=True)
