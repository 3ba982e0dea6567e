"""`nearfar records` and `replay`: the comparisons of this machine's store, whoever asked."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from comparisons.records import Record
from comparisons.store import MAX_PAGE, Filter, Store
from models.errors import NearfarError
from models.request import Task
from serving.cli.console import ConfigOption, JsonFlag, fail, settings_from
from serving.records import Records, exported, record_object, seconds_of, summary_object

app = typer.Typer(help="List, show, export and delete the comparisons that were kept.", no_args_is_help=True)
TargetOption = Annotated[str | None, typer.Option(help="those with an arm of this target")]
TaskOption = Annotated[Task | None, typer.Option(help="those of this task")]
CorrectOption = Annotated[
    bool | None, typer.Option("--right/--wrong", help="those where an arm, or that target's, was right or wrong")
]
SinceOption = Annotated[datetime | None, typer.Option(help="those from then on, UTC")]
UntilOption = Annotated[datetime | None, typer.Option(help="those before then, UTC")]


@contextmanager
def opened(config: Path | None) -> Iterator[Store]:
    """The store of these settings. Whatever is wrong with it ends the command in one line."""
    records = Records(settings_from(config=config))
    try:
        yield records.store()
    except NearfarError as error:
        fail(error.message)
    finally:
        records.close()


@app.command(name="list")
def listing(
    target: TargetOption = None,
    task: TaskOption = None,
    correct: CorrectOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_PAGE)] = 20,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """The newest comparisons, of all keys."""
    from serving.tables.comparisons import records_table

    where = where_of(target, task, correct, since, until)
    with opened(config) as store:
        page = store.page(where, limit=limit)
    rows = [summary_object(record) for record in page.records]
    if as_json:
        print(json.dumps({"comparisons": rows, "next": page.next}, ensure_ascii=False, indent=2))
    else:
        records_table(rows, Console())


@app.command()
def show(
    record_id: Annotated[str, typer.Argument(metavar="ID")], config: ConfigOption = None, as_json: JsonFlag = False
) -> None:
    """One comparison: its answers and figures as they were."""
    from serving.tables.comparisons import comparison_table

    with opened(config) as store:
        record = _found(store, record_id)
        shown = record_object(record)
    if as_json:
        print(json.dumps(shown, ensure_ascii=False, indent=2))
    else:
        question = shown["input"]["prompt"] or f"an input that was not kept, sha256 {shown['input']['sha256']}"
        print(f"{shown['id']}, {shown['created_at']}, {shown['task']}: {question}")
        if record.is_hidden():
            print("blind, and not voted on yet:")
            for side in shown["results"]:
                print(f"  {side['side']}: {side['text']}")
        else:
            comparison_table(shown, Console())


@app.command()
def export(
    form: Annotated[Literal["jsonl", "csv"], typer.Option("--format", help="one object, or one arm, a line")] = "jsonl",
    target: TargetOption = None,
    task: TaskOption = None,
    correct: CorrectOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    config: ConfigOption = None,
) -> None:
    """All comparisons that fit, to stdout."""
    where = where_of(target, task, correct, since, until)
    with opened(config) as store:
        for piece in exported(store.all(where), form):
            print(piece, end="")


@app.command()
def delete(
    record_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...")] = None,
    before: Annotated[datetime | None, typer.Option(help="all those before then, UTC")] = None,
    everything: Annotated[bool, typer.Option("--all", help="every comparison of every key")] = False,
    config: ConfigOption = None,
) -> None:
    """Remove comparisons for good, their bytes in the file too. There is no way back."""
    if bool(record_ids) + (before is not None) + everything != 1:
        fail("name comparisons, or --before a date, or --all", status=2)
    where = Filter(ids=tuple(record_ids) if record_ids else None, until=seconds_of(before))
    with opened(config) as store:
        count = store.delete(where)
    if record_ids and count < len(set(record_ids)):
        fail(f"{count} of {len(set(record_ids))} were there, and were removed")
    print(f"{count} removed")


def replay(
    record_id: Annotated[str, typer.Argument(metavar="ID")],
    file: Annotated[Path | None, typer.Argument(help="its picture, video or document, where it was not kept")] = None,
    prompt: Annotated[str | None, typer.Argument(help="its question, where it was not kept")] = None,
    local: Annotated[bool, typer.Option("--local", help="the arms of this machine alone; nothing leaves it")] = False,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Ask a kept comparison once more, keep that too, and show what is different: answers, figures, versions.

    Its input is the one that was kept, or that you name: the record's hash tells whether it is the same.
    """
    from serving.once import compare_once
    from serving.replay import difference, request_of, targets_of, terms_of, with_input
    from serving.tables.comparisons import difference_table

    settings = settings_from(config=config, policy="local-only" if local else None)
    if (file is None) != (prompt is None):
        fail("name both the file and its question", status=2)
    try:
        with opened(config) as store:
            then = _found(store, record_id)
        if file and prompt is not None:
            then = with_input(then, file.read_bytes(), prompt)
        names = targets_of(then, local=local)
        request = request_of(then)
        terms = terms_of(then, local=local)
        again = compare_once(
            settings,
            os.environ,
            request,
            names,
            task=then.task,
            reference=then.reference,
            on_event=lambda _: None,
            measure=terms.measure,
            tolerance=terms.tolerance,
            repeats=terms.repeats,
            judge=terms.judge,
        )
        made = asyncio.run(again)
        with opened(config) as store:
            found = difference(then, _found(store, made["id"]))
    except OSError as error:
        fail(f"{file}: {error.strerror}", status=2)
    except NearfarError as error:
        fail(error.message)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        difference_table(found, Console())


def _found(store: Store, record_id: str) -> Record:
    record = store.get(record_id)
    if record is None:
        fail(f"there is no comparison {record_id}")
    return record


def where_of(
    target: str | None, task: Task | None, correct: bool | None, since: datetime | None, until: datetime | None
) -> Filter:
    return Filter(target=target, task=task, correct=correct, since=seconds_of(since), until=seconds_of(until))
