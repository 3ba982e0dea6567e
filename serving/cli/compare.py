"""`nearfar compare`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from comparisons.measures import Measure, Tolerance
from comparisons.rating import WINNERS, Winner
from models.errors import BadRequest, NearfarError
from models.request import Policy, Task
from serving.cli.console import FileArgument, JsonFlag, fail, settings_from
from serving.cli.infer import request_from, run
from serving.settings import Settings

VOTER = "command line"


def compare(
    file: FileArgument,
    prompt: Annotated[str | None, typer.Argument(help="the question")] = None,
    targets: Annotated[str, typer.Option(help="comma-separated target names  [default: all the policy allows]")] = "",
    reference: Annotated[str | None, typer.Option(help="the right answer")] = None,
    measure: Annotated[Measure, typer.Option(help="how an answer is held against the reference")] = "exact",
    tolerance: Annotated[str, typer.Option(help="by how much a number may be off, as 0.5 or 5%")] = "0",
    repeats: Annotated[int, typer.Option(help="rounds, each in a new random order; the first is cold")] = 1,
    judge: Annotated[str | None, typer.Option(help="target that says which of two answers is better")] = None,
    policy: Annotated[Policy | None, typer.Option(help="how far the picture may travel  [default: local-only]")] = None,
    endpoint: Annotated[list[str] | None, typer.Option(help="OpenAI-compatible endpoint NAME=URL,MODEL")] = None,
    task: Annotated[Task, typer.Option()] = "vqa",
    detail: Annotated[str, typer.Option(help="low, high or auto")] = "auto",
    max_tokens: Annotated[int, typer.Option()] = 256,
    keep_inputs: Annotated[
        bool | None, typer.Option("--keep-inputs", help="keep question and file with the record")
    ] = None,
    blind: Annotated[
        bool,
        typer.Option("--blind", help="two of them without names and figures, until you have voted on the terminal"),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Ask several targets the same and show how answers and figures differ."""
    from serving.once import compare_once
    from serving.tables.comparisons import comparison_table

    request = request_from(file, prompt, task, detail, max_tokens, 0.0, None)
    settings = settings_from(policy=policy, endpoints=tuple(endpoint or ()), keep_inputs=keep_inputs)
    names = [name.strip() for name in targets.split(",") if name.strip()]
    if blind and (as_json or not sys.stdin.isatty()):
        fail("--blind asks for a vote: it takes a terminal, and no --json", status=2)
    with Console(stderr=True).status("loading the models") as status:

        def show(event: object) -> None:
            done = getattr(event, "result", None)
            if done is not None and not blind:  # who has answered first is not told
                turn = f", round {getattr(event, 'round', 0) + 1} of {repeats}" if repeats > 1 else ""
                status.update(f"{done.target} has answered{turn}")

        asking = compare_once(
            settings,
            os.environ,
            request,
            names,
            task=task,
            reference=reference,
            on_event=show,
            measure=measure,
            tolerance=_tolerance(tolerance),
            repeats=repeats,
            judge=judge,
            blind=blind,
        )
        result = run(asking)
    if blind:
        result = _voted(settings, result)
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        comparison_table(result, Console())
    if not any(each["ok"] for each in result["results"]):
        raise typer.Exit(1)


def _voted(settings: Settings, sides: Mapping[str, Any]) -> dict[str, Any]:
    """Both answers without names, the vote on them, and the comparison that it opens."""
    from comparisons.ballots import Ballots
    from serving.records import Records, record_object

    console = Console()
    for each in sides["results"]:
        console.print(f"\nSide {each['side'].upper()}", style="bold")
        console.print(each["text"] if each["ok"] else each["error"]["message"], markup=False)
    records = Records(settings)
    try:
        store = records.store()
        if sides["votable"]:
            Ballots(store).cast(sides["id"], owner="", voter=VOTER, winner=_winner())
        else:
            console.print("\nA side gave no answer, so there is nothing to vote on.")
        found = store.get(sides["id"])
    except NearfarError as error:
        fail(error.message)
    finally:
        records.close()
    if found is None:
        fail(f"{sides['id']} is no longer kept")
    shown = record_object(found, VOTER)
    if "sides" in shown:
        console.print(f"Side A was {shown['sides']['a']}, side B was {shown['sides']['b']}.\n", markup=False)
    return shown


def _winner() -> Winner:
    """Asks until it is one of them."""
    while True:
        said = typer.prompt(f"\nWhich is better: {', '.join(WINNERS)}").strip().lower()
        for winner in WINNERS:
            if said == winner:
                return winner


def _tolerance(text: str) -> Tolerance:
    """`0.5` or `5%`."""
    try:
        number = float(text.removesuffix("%"))
        return Tolerance(relative=number / 100) if text.endswith("%") else Tolerance(absolute=number)
    except (ValueError, BadRequest):
        fail(f"tolerance: a number from 0 on, as 0.5 or 5%, got {text!r}", status=2)
