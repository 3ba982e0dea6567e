"""`nearfar report` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from comparisons.decision import MAX_VOLUME, VOLUME
from models.errors import InvalidValue, NearfarError
from serving.cli.console import ConfigOption, JsonFlag, fail, say, settings_from, write_page
from serving.cli.records import CorrectOption, SinceOption, TargetOption, TaskOption, UntilOption, opened, where_of


def report(
    out: Annotated[Path | None, typer.Option(help="the page: one HTML file that needs nothing else")] = None,
    run: Annotated[
        Path | None, typer.Option(help="file of an evaluation  [default: the comparisons that were kept]")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="the verdict's two, comma-separated  [default: the most compared]")
    ] = None,
    weights: Annotated[str, typer.Option(help="as quality=1,cost=0.2; as `nearfar verdict` has them")] = "",
    volume: Annotated[int, typer.Option(min=1, max=MAX_VOLUME, help="inputs a month, for the buyer")] = VOLUME,
    rows: Annotated[int, typer.Option(help="inputs that are shown one by one, 500 at most")] = 100,
    target: TargetOption = None,
    task: TaskOption = None,
    correct: CorrectOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """All that comparisons come to, for whoever decides: verdict, answers side by side, plots, method, claims.

    From the comparisons that were kept, or with --run from an evaluation, finished or not.
    """
    from serving.report import Terms, report_of_records, report_of_run
    from serving.report_page import page_of

    where = where_of(target, task, correct, since, until)
    if out is None and not as_json:
        fail("name the page with --out FILE.html, or print the figures with --json", status=2)
    if run and where != where_of(None, None, None, None, None):
        fail(
            "--target, --task, --right, --wrong, --since and --until choose among kept comparisons: not with --run",
            status=2,
        )
    try:
        terms = Terms(
            targets=targets, weights=weights, volume=volume, rows=rows, data_dir=settings_from(config=config).data_dir
        )
        if run:
            made = report_of_run(run, terms)
        else:
            with opened(config) as store:
                made = report_of_records(store, where, terms)
        page = page_of(made) if out else ""
    except InvalidValue as error:
        fail(error.message, status=2)
    except NearfarError as error:
        fail(error.message)
    except OSError as error:
        fail(str(error))
    if out:
        write_page(out, page)
    if as_json:
        print(json.dumps(made.object, ensure_ascii=False, indent=2, allow_nan=False))
    if out:
        say(f"{out}: {made.object['source']['inputs']} inputs, {out.stat().st_size / 1000:,.0f} kB")
