"""`nearfar calibrate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from comparisons.calibration import Goal
from comparisons.store import Filter
from models.errors import NearfarError
from models.request import Task
from serving.cli.console import ConfigOption, JsonFlag, fail, settings_from, write_page
from serving.cli.records import opened
from serving.settings import Settings, settings_file


def calibrate(
    route: Annotated[
        str | None, typer.Argument(help="a route of nearfar.toml: its first target, and the next where that is unsure")
    ] = None,
    local: Annotated[str | None, typer.Option(help="without a route: the local target")] = None,
    hosted: Annotated[str | None, typer.Option(help="without a route: the target that unsure questions go to")] = None,
    target_error: Annotated[
        float | None, typer.Option(help="largest share of wrong answers; the fewest questions go on that keep it")
    ] = None,
    max_cloud_rate: Annotated[
        float | None, typer.Option(help="largest share of questions that go on; the most that keep it do")
    ] = None,
    sureness: Annotated[float, typer.Option(help="with which the bound holds for questions to come")] = 0.9,
    task: Annotated[Task, typer.Option(help="a threshold holds for one task alone")] = "vqa",
    seed: Annotated[int, typer.Option(help="of the parting into records to fit and to report on")] = 0,
    page: Annotated[Path | None, typer.Option("--html", help="write figures and curves as one HTML page")] = None,
    write: Annotated[bool, typer.Option("--write", help="put it into the route in the settings file")] = False,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """From which confidence on a local answer may stay, out of one's own comparisons with a reference.

    Fitted on half of the records and reported on the others: wrong answers, questions that go to the hosted model and
    dollars, each with its interval.
    """
    from serving.calibration import calibrated, evidence_of, page_of, written

    settings = settings_from(config=config)
    first, second = _two_targets(settings, route, local, hosted)
    file = settings_file(settings.config)
    if write and (route is None or file is None):
        fail("--write needs a route, and the settings file that has it", status=2)
    try:
        goal = Goal(target_error=target_error, max_cloud_rate=max_cloud_rate, sureness=sureness)
    except NearfarError as error:
        fail(f"{error.message}: --target-error or --max-cloud-rate", status=2)
    with opened(config) as store:
        evidence = evidence_of(store.all(Filter(task=task), whole=False), local=first, hosted=second, task=task)
        made = calibrated(evidence, goal, seed=seed, day=datetime.now(UTC).date())
        if write and route and file:
            written(file, route, made.hop())
    print(json.dumps(made.object(), indent=2) if as_json else "\n".join([*made.lines(), *_section(made.hop(), route)]))
    if page:
        write_page(page, page_of(made))


def _two_targets(
    settings: Settings, route: str | None, local: str | None, hosted: str | None
) -> tuple[str, str | None]:
    if route is None:
        if local is None:
            fail("name a route of nearfar.toml, or --local and --hosted", status=2)
        return local, hosted and settings.aliases.get(hosted, hosted)
    row = settings.routes.get(route)
    if row is None or local or hosted:
        fail(f"{settings_file(settings.config) or 'nearfar.toml'} has no route {route}" if row is None
             else "a route has its own targets: leave --local and --hosted out", status=2)  # fmt: skip
    names = [settings.aliases.get(hop.target, hop.target) for hop in row.hops[:2]]
    return names[0], names[1] if len(names) > 1 else None


def _section(hop: Mapping[str, Any], route: str | None) -> list[str]:
    """For nearfar.toml, as --write puts it there."""
    from serving.calibration import inline

    return ["", "[routes]", f"{route or 'NAME'} = [{inline(hop).as_string()}, ...]  # the next target behind it"]
