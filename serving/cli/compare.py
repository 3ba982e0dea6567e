"""`nearfar compare`."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich.console import Console

from comparisons.measures import Measure, Tolerance
from models.errors import BadRequest
from models.request import Policy, Task
from serving.cli.console import FileArgument, JsonFlag, fail, settings_from
from serving.cli.infer import request_from, run


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
    as_json: JsonFlag = False,
) -> None:
    """Ask several targets the same and show how answers and figures differ."""
    from serving.once import compare_once
    from serving.tables import comparison_table

    request = request_from(file, prompt, task, detail, max_tokens, 0.0, None)
    settings = settings_from(policy=policy, endpoints=tuple(endpoint or ()), keep_inputs=keep_inputs)
    names = [name.strip() for name in targets.split(",") if name.strip()]
    with Console(stderr=True).status("loading the models") as status:

        def show(event: object) -> None:
            done = getattr(event, "result", None)
            if done is not None:
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
        )
        result = run(asking)
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        comparison_table(result, Console())
    if not any(each["ok"] for each in result["results"]):
        raise typer.Exit(1)


def _tolerance(text: str) -> Tolerance:
    """`0.5` or `5%`."""
    try:
        number = float(text.removesuffix("%"))
        return Tolerance(relative=number / 100) if text.endswith("%") else Tolerance(absolute=number)
    except (ValueError, BadRequest):
        fail(f"tolerance: a number from 0 on, as 0.5 or 5%, got {text!r}", status=2)
