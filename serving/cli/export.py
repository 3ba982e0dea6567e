"""`nearfar export`: a checkpoint becomes a bundle, or an MLX folder where mlx-vlm is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from models.errors import BadRequest, NearfarError
from serving.cli.console import JsonFlag, fail, settings_from

if TYPE_CHECKING:
    from models.bundle import Manifest


def export(
    source: Annotated[Path, typer.Argument(help="checkpoint folder of a SmolVLM or Idefics3 model, safetensors")],
    out: Annotated[Path, typer.Option(help="folder to make")],
    recipe: Annotated[
        str,
        typer.Option(
            help="fp32, int8, int8-fast or int4; auto: the fastest decoder that passes; for a GPU fp16 or q4f16; "
            "for MLX int8 or int4"
        ),
    ] = "int8",
    form: Annotated[
        Literal["onnx", "mlx"], typer.Option("--format", help="onnx: a bundle; mlx: a folder for mlx-vlm")
    ] = "onnx",
    adapter: Annotated[Path | None, typer.Option(help="PEFT LoRA adapter folder to merge first; not for MLX")] = None,
    name: Annotated[str | None, typer.Option(help="model name  [default: the folder's, with +ADAPTER's]")] = None,
    license: Annotated[str | None, typer.Option(help="licence of the weights, for the manifest")] = None,
    auto_tile_px: Annotated[
        int | None, typer.Option(help="picture pixels per tile at detail=auto  [default: the tile]; not for MLX")
    ] = None,
    notice: Annotated[str | None, typer.Option(help="what users of the bundle must know; not for MLX")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="for MLX: fp32 bundle of the same weights to compare answers with  [default: the one here, else the "
            "weights before their conversion]"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace a folder that was not made by an export")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Turn a checkpoint into a verified, quantized bundle, or MLX folder. A failed gate leaves nothing and exits 1."""
    if form == "mlx":
        given = {"adapter": adapter, "auto_tile_px": auto_tile_px, "notice": notice}
        _refuse_for_mlx([option for option, value in given.items() if value is not None])
        _to_mlx(source, out, recipe, name, license, reference, overwrite, as_json)
        return
    if reference is not None:
        fail("--reference is for --format mlx: a bundle is compared with its checkpoint", status=2)
    try:
        from export.bundling import export_bundle
    except ModuleNotFoundError as error:
        fail(f"export needs more packages ({error.name} is missing): pip install 'nearfar[export]'")
    try:
        manifest = export_bundle(
            source,
            recipe=recipe,
            out=out,
            adapter=adapter,
            name=name,
            license=license,
            auto_tile_px=auto_tile_px,
            notice=notice,
            overwrite=overwrite,
        )
    except NearfarError as error:
        _fail(error)
    print(manifest.model_dump_json(indent=2)) if as_json else _tell(out, manifest)


def _refuse_for_mlx(given: list[str]) -> None:
    if "adapter" in given:
        fail("--format mlx takes no adapter: merge it into a checkpoint first (PEFT's merge_and_unload)", status=2)
    if given:
        fail(f"--{given[0].replace('_', '-')} is for bundles, not for --format mlx", status=2)


def _to_mlx(
    source: Path,
    out: Path,
    recipe: str,
    name: str | None,
    license: str | None,
    reference: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    try:
        from export.mlx import export_mlx
    except ImportError as error:  # also where transformers is there, and too old
        fail(
            f"export to MLX needs an environment of its own ({error.name or error} is missing): pip install "
            "'mlx-vlm>=0.7.10,<0.8' 'mlx[cpu]' onnxruntime pydantic-settings, then pip install --no-deps nearfar"
        )
    from serving.local_models import local_bundles

    try:
        manifest = export_mlx(
            source,
            recipe=recipe,
            out=out,
            reference=reference,
            here=local_bundles(settings_from()),
            name=name,
            license=license,
            overwrite=overwrite,
        )
    except NearfarError as error:
        _fail(error)
    if as_json:
        print(manifest.model_dump_json(indent=2))
        return
    size = sum(entry.bytes for entry in manifest.files.values())
    print(f"{out}: {manifest.name}, MLX, {manifest.bits} bits in groups of {manifest.group_size}, {size / 1e6:.1f} MB")
    print(f"  made in {manifest.export.seconds:.0f} s, peak memory {manifest.export.peak_bytes / 1e9:.1f} GB")
    for measure, value in manifest.quality.items():
        print(f"  {measure}: {value}")


def _fail(error: NearfarError) -> NoReturn:
    fail(error.message, status=2 if isinstance(error, BadRequest) else 1)


def _tell(out: Path, manifest: Manifest) -> None:
    size = sum(entry.bytes for entry in manifest.files.values())
    print(f"{out}: {manifest.name}@{manifest.recipe}, {size / 1e6:.1f} MB")
    if manifest.export is not None:
        print(f"  made in {manifest.export.seconds:.0f} s, peak memory {manifest.export.peak_bytes / 1e9:.1f} GB")
    for measure, value in manifest.quality.items():
        if measure != "pareto":
            print(f"  {measure}: {value}")
    if "pareto" in manifest.quality:
        from rich.console import Console

        from serving.tables.models import decoders_table

        decoders_table(manifest.quality["pareto"], Console())
