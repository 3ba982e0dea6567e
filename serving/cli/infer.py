"""`nearfar infer`, and the question that a command line makes."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from models.errors import NearfarError
from models.expand import file_kind
from models.request import GenerationSettings, Task, question
from serving.cli.console import FileArgument, JsonFlag, OfflineFlag, YesFlag, fail, say, settings_from
from serving.cli.fetching import fetch_absent
from serving.local_models import default_models


def infer(
    file: FileArgument,
    prompt: Annotated[
        str | None, typer.Argument(help="the question; may be left out with --task caption, ocr or document")
    ] = None,
    model: Annotated[str | None, typer.Option(help="model, target or route name, or bundle folder")] = None,
    task: Annotated[Task, typer.Option()] = "vqa",
    detail: Annotated[str, typer.Option(help="low, high or auto")] = "auto",
    max_tokens: Annotated[int, typer.Option()] = 256,
    temperature: Annotated[float, typer.Option()] = 0.0,
    seed: Annotated[int | None, typer.Option()] = None,
    yes: YesFlag = False,
    offline: OfflineFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Answer one question about one picture, video or document, on this machine. An absent model is fetched first."""
    from serving.once import infer_once

    request = request_from(file, prompt, task, detail, max_tokens, temperature, seed)
    folder = model is not None and Path(model).is_dir()
    configured = settings_from(offline=offline or None)
    named = model in configured.routes or model in configured.aliases
    # A model of this machine alone is loaded then.
    local = model is not None and not named and (folder or "/" not in model.removeprefix("local/"))
    settings = settings_from(models=(model,), offline=offline or None) if local else configured
    fetch_absent(settings, yes=yes)
    if model is None and not settings.models:
        default = default_models(settings).bundles[0]
        settings = settings.model_copy(update={"models": (str(default.folder),)})
    result = run(infer_once(settings, os.environ, request, None if folder else model))
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        print(result["text"])
        _tell_unread_pages(result)
        _tell_attempts(result)


def request_from(
    file: Path, prompt: str | None, task: Task, detail: str, max_tokens: int, temperature: float, seed: int | None
) -> Any:
    try:
        data = file.read_bytes()
    except OSError as error:
        fail(f"{file}: {error.strerror}", status=2)
    try:
        settings = GenerationSettings(max_tokens=max_tokens, temperature=temperature, seed=seed)
        files: dict[str, Any] = {"images": (data,)} if (kind := file_kind(data)) == "image" else {kind: data}
        return question(prompt, **files, task=task, settings=settings, detail=detail)  # type: ignore[arg-type]
    except NearfarError as error:
        fail(error.message, status=2)


def _tell_unread_pages(result: dict[str, Any]) -> None:
    last = result["images"][-1] if result["images"] else {}
    if last.get("page", 0) < last.get("pages", 0):
        say(f"pages 1 to {last['page']} of {last['pages']} were read")


def _tell_attempts(result: dict[str, Any]) -> None:
    """Of a route: who answered, and what became of the targets before."""
    *others, _ = result["attempts"] or [None]
    for attempt in others:
        what = "failed" if attempt["outcome"] == "failed" else "was skipped"
        say(f"{attempt['target']} {what}: {attempt['reason']}")
    if result["attempts"]:
        say(f"{result['target']} answered")


def run(work: Any) -> dict[str, Any]:
    try:
        result: dict[str, Any] = asyncio.run(work)
    except NearfarError as error:
        fail(error.message)
    return result
