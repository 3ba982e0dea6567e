"""`nearfar bench`: its options, and the contestants they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from models.errors import NearfarError
from serving.cli.console import JsonFlag, fail, settings_from, write_page
from serving.local_models import model_folder


def bench(
    model: Annotated[str | None, typer.Option(help="model, or bundle folder  [default: tiny-scenes]")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="another model or bundle on the same work; repeatable"),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="checkpoint folder: transformers in float32 and bfloat16 beside it")
    ] = None,
    openvino: Annotated[
        list[Path] | None, typer.Option(help="folder that optimum-intel exported, run by it; repeatable")
    ] = None,
    llama_cpp: Annotated[Path | None, typer.Option(help="folder of llama.cpp's programs; needs --gguf")] = None,
    gguf: Annotated[list[Path] | None, typer.Option(help="model file for llama.cpp; repeatable")] = None,
    mmproj: Annotated[Path | None, typer.Option(help="llama.cpp's vision file")] = None,
    tiles: Annotated[str, typer.Option(help="tiles to encode; '' for none")] = "1,4",
    prompts: Annotated[str, typer.Option(help="lengths of prompts; '' for none")] = "128,1024",
    contexts: Annotated[str, typer.Option(help="positions behind which to decode; '' for none")] = "128,1024",
    rows: Annotated[str, typer.Option(help="rows decoded together, behind 128 positions; '' for none")] = "1,4",
    rounds: Annotated[int, typer.Option(min=1, max=100, help="runs of each figure; the best counts")] = 3,
    clients: Annotated[str, typer.Option(help="HTTP clients, one count after the other; '' for none")] = "1,8",
    requests: Annotated[int, typer.Option(min=1, max=100_000, help="requests for each count, within a minute")] = 100,
    slots: Annotated[int, typer.Option(min=1, max=64, help="sequences that each service runs at once")] = 4,
    good_ttft_ms: Annotated[float, typer.Option(min=1, help="latest first token of a good request")] = 2000.0,
    good_gap_ms: Annotated[
        float, typer.Option(min=1, help="largest mean gap between tokens of a good request")
    ] = 200.0,
    picture_px: Annotated[
        int | None, typer.Option(min=1, max=4096, help="ask about a square of noise, split as the reference does")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="write the result as one HTML page with plots")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure on this machine: vision, prompt step, decoding, one request by stages, requests per second."""
    from serving.bench.engine import BundleContestant, Scale
    from serving.bench.load import Limits
    from serving.bench.page import page_of
    from serving.bench.run import bench_table, run_bench

    sizes = {"--tiles": tiles, "--prompts": prompts, "--contexts": contexts, "--rows": rows, "--clients": clients}
    counts = {option: _counts(option, text) for option, text in sizes.items()}
    settings = settings_from()
    try:
        baselines = _baselines(checkpoint, openvino or [], llama_cpp, gguf or [], mmproj)
        folder, *others = [model_folder(name, settings) for name in (model or "tiny-scenes", *(against or ()))]
        result = run_bench(
            clients=counts["--clients"],
            requests=requests,
            slots=slots,
            limits=Limits(ttft_ms=good_ttft_ms, gap_ms=good_gap_ms),
            folder=folder,
            others=[*map(BundleContestant, others), *baselines],
            scales=[
                Scale("vision", counts["--tiles"]),
                Scale("prefill", counts["--prompts"]),
                Scale("decode", counts["--contexts"]),
                Scale("rows", counts["--rows"]),
            ],
            rounds=rounds,
            picture_px=picture_px,
            console=Console(stderr=True),
        )
    except NearfarError as error:
        fail(error.message)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        bench_table(result, Console())
    if html:
        write_page(html, page_of(result))
    if result["process_peak_bytes"] > result["counted_bytes"]:
        fail("the service took more memory than its budget counts for this model (models/memory.py)")


def _counts(option: str, text: str) -> tuple[int, ...]:
    found = [int(count) if count.strip().isdigit() else 0 for count in text.split(",") if text.strip()]
    if not all(1 <= count <= 65_536 for count in found) or (option == "--clients" and max(found, default=1) > 256):
        fail(
            f"{option} takes numbers of 1 to {256 if option == '--clients' else 65_536}, separated by commas", status=2
        )
    return tuple(found)


def _baselines(
    checkpoint: Path | None, openvino: list[Path], programs: Path | None, gguf: list[Path], mmproj: Path | None
) -> list[Any]:
    """Other systems to run beside ours. They live with torch, which the runtime does without."""
    if checkpoint is None and programs is None and not openvino:
        return []
    if programs and not gguf:
        fail("--llama-cpp needs --gguf", status=2)
    try:
        from export.baselines import LlamaCppContestant, OptimumIntelContestant, torch_contestants
    except ModuleNotFoundError as error:
        fail(f"baselines need more packages ({error.name} is missing): pip install 'nearfar[export]'")
    found: list[Any] = torch_contestants(checkpoint) if checkpoint else []
    found += map(OptimumIntelContestant, openvino)
    return [*found, *(LlamaCppContestant(programs, file, mmproj) for file in gguf if programs)]
