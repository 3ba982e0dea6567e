"""`nearfar finetune`: an adapter of a checkpoint, trained on a data set's rows but those held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from comparisons.dataset import split
from comparisons.loading import Defaults, as_line, load
from models.errors import BadRequest, NearfarError, NotFound
from models.images import Detail
from models.request import Task
from serving.cli.console import JsonFlag, fail, settings_from
from serving.settings import Settings

HELD_OUT = "held_out.jsonl"


def finetune(
    data: Annotated[Path, typer.Argument(help="questions with their right answers, in a form that evaluate takes")],
    base: Annotated[
        str, typer.Option(help="checkpoint folder, or a model fetched by `nearfar pull MODEL --checkpoint`")
    ],
    out: Annotated[Path, typer.Option(help="folder of the adapter to make")],
    held_out: Annotated[float, typer.Option(help=f"share of the rows kept for evaluation, in OUT/{HELD_OUT}")] = 0.2,
    validation: Annotated[float, typer.Option(help="share of the others that says when to stop; 0: none")] = 0.1,
    epochs: Annotated[float, typer.Option(help="times that every row is learnt")] = 3.0,
    steps: Annotated[int | None, typer.Option(help="updates of the weights, in place of epochs")] = None,
    batch: Annotated[int, typer.Option(help="rows at once")] = 8,
    accumulate: Annotated[int, typer.Option(help="batches per update")] = 1,
    learning_rate: Annotated[float, typer.Option(help="highest; it rises over 3 % and falls by a cosine")] = 2e-4,
    rank: Annotated[int, typer.Option(help="of the adapter's matrices; alpha is twice that")] = 16,
    parts: Annotated[str, typer.Option(help="text, connector (with text), or all: vision too")] = "text",
    patience: Annotated[int, typer.Option(help="validations without a better one that end it; 0: to the end")] = 3,
    every: Annotated[int | None, typer.Option(help="steps between checkpoints  [default: an epoch's]")] = None,
    seed: Annotated[int, typer.Option(help="of the shares, the first weights and the order")] = 0,
    detail: Annotated[Detail, typer.Option(help="of rows that name none")] = "auto",
    auto_tile_px: Annotated[int | None, typer.Option(help="as export takes it  [default: the tile]")] = None,
    save_memory: Annotated[bool, typer.Option("--save-memory", help="compute activations twice")] = False,
    task: Annotated[Task, typer.Option(help="of rows that name none")] = "vqa",
    prompt: Annotated[str | None, typer.Option(help="of rows that have none")] = None,
    images: Annotated[Path | None, typer.Option(help="folder of the pictures  [default: the file's]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint of a run cut off")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an adapter, or begin a run anew")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a LoRA adapter on questions with their right answers: bfloat16 on a GPU, else float32 on the processor.

    Everything is checked before anything is trained. Ctrl-C and worse leave the last checkpoint, and --resume goes on.
    Then: nearfar export BASE --adapter OUT, and nearfar evaluate OUT/held_out.jsonl.
    """
    try:
        from export.finetune import Material, Plan
        from export.finetune import finetune as train_adapter
    except ModuleNotFoundError as error:
        fail(f"fine-tuning needs more packages ({error.name} is missing): pip install 'nearfar[export,finetune]'")
    try:
        plan = Plan(
            epochs=epochs,
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            rank=rank,
            parts=parts,  # type: ignore[arg-type]  # it checks itself
            patience=patience,
            every=every,
            seed=seed,
            detail=detail,
            auto_tile_px=auto_tile_px,
            save_memory=save_memory,
        )
        dataset = load(data, Defaults(prompt=prompt, task=task, images=images))
        kept, apart = split(dataset, held_out, seed)
        train, validating = split(dataset.only(kept), validation, seed)
        material = Material(
            train=train,
            validation=validating,
            beside={HELD_OUT: "".join(f"{as_line(row)}\n" for row in apart)} if apart else {},
            fingerprint=f"{dataset.fingerprint} {held_out:g} {validation:g}",
        )
        record = train_adapter(_checkpoint(base), material, out, plan, resume=resume, overwrite=overwrite)
    except (BadRequest, NotFound) as error:
        fail(error.message, status=2)
    except NearfarError as error:
        fail(error.message)
    except KeyboardInterrupt:
        fail("interrupted: --resume goes on from the last checkpoint", status=130)
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        _show(record, out, len(apart))


def _checkpoint(name: str) -> Path:
    """A folder, or the newest fetched checkpoint of that model. Raises NotFound."""
    if Path(name).is_dir():
        return Path(name)
    settings: Settings = settings_from()
    found = sorted((settings.data_dir / "checkpoints").glob(f"{name}@*"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise NotFound(f"{name} is no checkpoint folder, and no model whose checkpoint is here; fetch it with: "
                       f"nearfar pull {name} --checkpoint")  # fmt: skip
    return found[-1]


def _show(record: dict[str, Any], out: Path, held_out: int) -> None:
    rows, result = record["rows"], record["result"]
    print(f"{out}: adapter of {record['base']['name']}, {record['adapter']['trained_parameters']:,} parameters")
    print(f"  rows: {rows['train']} trained on, {rows['validation']} to validate, {held_out} held out")
    steps = f"{result['steps']} steps{', stopped early' if result['stopped_early'] else ''}"
    if result["step_s"] is not None:
        steps += f", {result['step_s']:.2f} s a step"
    print(f"  {steps}, peak memory {result['peak_bytes'] / 1e9:.1f} GB on {result['device']}")
    if result["best_step"] is not None:
        print(f"  validation loss {result['validation_loss']:.4f}, best at step {result['best_step']}")
