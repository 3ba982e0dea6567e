"""Fetching a model that a command names and this machine has not: its size first, a terminal asked, a bar."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import typer

from models.catalog import NOT_VERIFIED, meaning
from models.errors import NearfarError, NotFound, Unavailable
from serving.cli.console import fail, say
from serving.local_models import aliases, model_folder
from serving.pull import Plan, fetch, is_there, plan_pull, record_source, reject, wanted
from serving.settings import Settings


def fetch_absent(settings: Settings, *, yes: bool) -> None:
    """Fetch the models that the settings name and this machine has not; say what an alias stands for."""
    try:
        for name in settings.models:
            _, notice = meaning(name, aliases(settings))
            if notice:
                say(notice)
            try:
                model_folder(name, settings)
            except NotFound:
                fetched(settings, name, yes=yes)
    except NearfarError as error:
        fail(error.message)


def fetched(
    settings: Settings,
    name: str,
    *,
    recipe: str | None = None,
    revision: str | None = None,
    checkpoint: bool = False,
    yes: bool,
) -> Path:
    """The folder of a catalog model, fetched if need be: its size is shown first, and a terminal is asked."""
    row, chosen = wanted(name, recipe)
    if not revision and not checkpoint:
        with suppress(NotFound):
            return model_folder(f"{row.name}@{chosen}", settings)
    if settings.offline:
        raise NotFound(f"{row.name}@{chosen} is not on this machine, and --offline forbids to fetch it")
    plan = plan_pull(name, settings.data_dir, recipe=recipe, revision=revision, checkpoint=checkpoint)
    if not is_there(plan):
        size, missing = f"{plan.bytes / 1e6:,.0f} MB", f"{plan.missing_bytes / 1e6:,.0f} MB to fetch"
        source = f"{row.hub_id} at {plan.revision[:12]}, {row.license}"
        say(f"{plan.name}: {size}, {missing}, from {source}, {NOT_VERIFIED}")
        asks = sys.stdin.isatty() and sys.stderr.isatty()
        if asks and not yes and not typer.confirm("fetch it?", err=True):
            raise NotFound(f"{plan.name} was not fetched")
        if not asks and not yes:
            say("no terminal to ask, so it is fetched; --offline forbids that")
        _fetch_with_bar(plan)
    elif plan.recipe:
        return plan.folder
    if checkpoint:
        return plan.folder
    out = settings.data_dir / "models" / f"{row.name}@{chosen}"
    folder = plan.folder if plan.recipe else _export_fetched(plan, chosen, out)
    say("checking it on this machine, which takes up to 20 seconds")
    rejected = reject(folder, settings)
    if rejected is None:
        return folder
    say(rejected.reason)
    return fetched(settings, row.name, recipe=rejected.safer, revision=revision, yes=yes)


def _export_fetched(plan: Plan, recipe: str, out: Path) -> Path:
    try:
        from export.bundling import export_bundle
    except ModuleNotFoundError:
        raise Unavailable(
            f"{plan.row.name} has no published ONNX files for {recipe}; its checkpoint is in {plan.folder}: "
            f"pip install 'nearfar[export]', then run this again"
        ) from None
    say(f"exporting {plan.folder} with recipe {recipe}")
    export_bundle(plan.folder, recipe=recipe, out=out, name=plan.row.name, license=plan.row.license, overwrite=True)
    record_source(out, plan)
    return out


def _fetch_with_bar(plan: Plan) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(plan.name, total=plan.bytes)
        fetch(plan, lambda done, total: progress.update(task, completed=done))
