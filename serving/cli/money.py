"""`nearfar break-even` and `nearfar spend`: dollars to come, and dollars spent."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from models.errors import InvalidValue, NearfarError
from serving.cli.console import ConfigOption, JsonFlag, fail, settings_from


def break_even(
    volume: Annotated[float | None, typer.Option(help="images a month  [default: 10000]")] = None,
    given: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="any input that is printed; repeatable")
    ] = None,
    measured: Annotated[
        bool, typer.Option("--measured", help="times, right answers, failures and bytes from this machine's records")
    ] = False,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Cost of 1,000 accepted images here and at every provider, and the volume from which on here is cheaper."""
    from serving.api.break_even import break_even_object, measured_targets, stated_inputs
    from serving.hosted.rows import PROVIDERS
    from serving.services import priced_models
    from serving.tables.decisions import break_even_tables

    settings = settings_from(config=config)
    found = []
    if measured:
        from serving.cli.records import opened

        with opened(config) as store:
            found = measured_targets(store, None)
    try:
        inputs = dict(_input_of(text) for text in given or ())
        inputs |= {} if volume is None else {"volume": volume}
        result = break_even_object(inputs, stated_inputs(settings), priced_models(PROVIDERS), found)
    except NearfarError as error:
        fail(error.message, status=2)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        break_even_tables(result, Console())


def _input_of(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise InvalidValue(f"--set {text[:64]}: it takes NAME=VALUE, where VALUE is a number") from None


def spend(
    days: Annotated[int, typer.Option(min=1, max=3660, help="today and the days before it")] = 7,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what hosted models cost, by day, target, key and route, and what is left of each budget today."""
    from serving.spending import Spending, budgets_of, report
    from serving.tables.service import spending_table

    settings = settings_from(config=config)
    spending = Spending(settings.data_dir, budgets_of(settings))
    try:
        result = report(spending, days)
    except NearfarError as error:
        fail(error.message)
    finally:
        spending.close()
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        spending_table(result, Console())
