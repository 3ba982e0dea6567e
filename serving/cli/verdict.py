"""`nearfar verdict` and `leaderboard`: what the kept comparisons say together."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from comparisons.decision import VOLUME
from serving.cli.console import ConfigOption, JsonFlag
from serving.cli.records import SinceOption, TaskOption, UntilOption, opened, where_of
from serving.verdicts import decided, decision_object


def verdict(
    targets: Annotated[
        str | None, typer.Option(help="two names, comma-separated  [default: the most compared]")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="as quality=1,cost=0.2; of quality, reliability, speed, cost, privacy")
    ] = "",
    volume: Annotated[int, typer.Option(help="inputs a month, for the buyer")] = VOLUME,
    task: TaskOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Which of two targets to ship, from the comparisons that were kept, and what speaks against it."""
    from serving.tables.decisions import decision_table

    where = where_of(None, task, None, since, until)
    with opened(config) as store:
        found = decision_object(decided(store, where, targets=targets, weights=weights, volume=volume))
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        decision_table(found, Console())


def leaderboard(config: ConfigOption = None, as_json: JsonFlag = False) -> None:
    """The targets by blind votes on this machine's comparisons, beside what their answers cost, took and sent."""
    from comparisons.ballots import Ballots
    from serving.api.votes import leaderboard_object
    from serving.tables.decisions import leaderboard_table

    with opened(config) as store:
        result = leaderboard_object(Ballots(store).leaderboard(None))
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        leaderboard_table(result, Console())
