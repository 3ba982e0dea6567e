"""`nearfar models`, `pull`, `adopt` and `verify`: the models on this machine, and how they get here."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from models.bundle import Bundle
from models.errors import BadRequest, NearfarError
from serving.cli.console import JsonFlag, ModelsOption, OfflineFlag, YesFlag, fail, settings_from
from serving.cli.fetching import fetched
from serving.local_models import local_bundles, model_folder, model_folders


def models(model: ModelsOption = None, as_json: JsonFlag = False) -> None:
    """List the models on this machine, and the catalog: source, licence, size, memory, what is claimed of them."""
    from serving.api.schemas import catalog_objects, model_object
    from serving.tables.models import models_table, print_catalog

    settings = settings_from(models=tuple(model or ()))
    try:
        rows = [model_object(Bundle.read(folder)) for folder in model_folders(settings)]
    except NearfarError as error:
        fail(error.message)
    catalog = catalog_objects(local_bundles(settings))
    if as_json:
        print(json.dumps({"models": rows, "catalog": catalog}, indent=2))
    else:
        console = Console()
        models_table(rows, console)
        print_catalog(catalog, console)


def pull(
    model: Annotated[str, typer.Argument(help="a model of the catalog: nearfar models lists it")],
    recipe: Annotated[
        str | None, typer.Option(help="fp32, fp16, int8, int8-fast, int4, q4f16, auto  [default: int4]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit  [default: the newest]")] = None,
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="fetch the weights for nearfar export")] = False,
    yes: YesFlag = False,
    offline: OfflineFlag = False,
) -> None:
    """Fetch a model from the hub into the data folder, checked by its hashes; what was cut goes on where it was.

    The published ONNX files where the recipe has such, else the checkpoint, which is exported where the export extra is
    installed. Names of files leave the machine, never an input, so every policy allows it. HF_ENDPOINT and HF_TOKEN are
    honoured; without HF_TOKEN no token is sent.
    """
    settings = settings_from(offline=offline or None)
    try:
        folder = fetched(settings, model, recipe=recipe, revision=revision, checkpoint=checkpoint, yes=yes)
    except NearfarError as error:
        fail(error.message, status=2 if error.param == "recipe" else 1)
    print(folder)


def adopt(
    folder: Annotated[Path, typer.Argument(help="folder in the published layout: config.json, tokenizer.json, onnx/")],
    suffix: Annotated[
        list[str] | None,
        typer.Option(
            help="files to take, fp32 or q4f16 or such; GRAPH=SUFFIX for one graph; repeatable  [default: best]"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="model name  [default: the folder's]")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a folder of published ONNX files a bundle: hash it, write its manifest. Twice changes nothing."""
    from models.adopt import adopt as adopt_folder
    from models.adopt import parse_suffixes

    try:
        manifest = adopt_folder(folder, suffixes=parse_suffixes(suffix or []), name=name)
    except NearfarError as error:
        fail(error.message, status=2 if isinstance(error, BadRequest) else 1)
    if as_json:
        print(manifest.model_dump_json(indent=2))
    else:
        print(f"{folder}: {manifest.name}@{manifest.recipe}, {manifest.cache} cache")
        for graph in manifest.graphs.values():
            print(f"  {graph.file}{': ' + graph.edit if graph.edit else ''}")


def verify(
    model: Annotated[str, typer.Argument(help="model on this machine: target name or bundle folder")],
    reference: Annotated[
        str | None, typer.Option(help="fp32 bundle of the same weights  [default: the one here]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="about 20 seconds; does without a reference")] = False,
    report: Annotated[Path | None, typer.Option(help="JSON file to keep: machine, versions, figures, hashes")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a model on this machine against fp32: ten pictures and a text, and the reference processor."""
    from serving.tables.models import verdict_table
    from serving.verify import find_reference, save_report, verify_bundle

    settings = settings_from()
    if report and (report.is_dir() or not report.parent.is_dir()):
        fail(f"{report} is not a file that can be written", status=2)
    try:
        bundle = Bundle.read(model_folder(model, settings))
        found = find_reference(bundle, local_bundles(settings))
        base = model_folder(reference, settings) if reference else found.folder if found else None
        if base is None and not quick and bundle.manifest.recipe != "fp32":
            name = bundle.manifest.name
            fail(f"no fp32 model of the same weights is here: nearfar pull {name} --recipe fp32, or --reference FOLDER")
        processor = None if quick else _reference_processor(bundle.folder)
        verdict = verify_bundle(
            bundle.folder, reference=base, quick=quick, processor=processor, console=Console(stderr=True)
        )
        result = verdict.report(datetime.now(UTC))
        if report:
            save_report(result, report)
    except NearfarError as error:
        fail(error.message)
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        verdict_table(result, Console())
    if verdict.reason:
        fail(verdict.reason)


def _reference_processor(folder: Path) -> Any:
    try:
        from export.verify import ReferenceProcessor
    except ModuleNotFoundError:
        return None
    return ReferenceProcessor(folder)
