"""Checkpoint folder in, bundle folder out: all of it or nothing.

The bundle grows in a hidden folder beside OUT, is verified there, gets its manifest last, and takes OUT's place by
a rename.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tqdm import tqdm

from export.checkpoint import Checkpoint, load_checkpoint
from export.checkpoint_files import model_name
from export.decoders import DecoderWriter
from export.folders import COPIED, check_target, folder_beside, hashes, move_into_place, share_files
from export.graphs import write_embeddings
from export.quantize import RECIPES, RecipePlan
from export.vision import halve_vision, quantize_vision, write_vision
from models.bundle import (
    MANIFEST,
    NAME,
    Bundle,
    ExportFigures,
    Manifest,
    Source,
)
from models.errors import BadRequest, NearfarError
from models.images import tile_image
from models.machine import process_peak_bytes, return_freed_memory
from models.onnx_model import OnnxModel
from models.prompt import read_template
from models.replay import FILE, write_replay
from models.tiny_scenes.scenes import draw_scene

MADE_WITH = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai", "optimum-onnx")
VISION_PICTURES = 3  # pictures that int8 is checked on, one tile each
BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "int8-fast": 2.6, "auto": 2.6}  # on disk, generously; of all others 1.3


def export_bundle(
    source: Path,
    *,
    recipe: str,
    out: Path,
    adapter: Path | None = None,
    name: str | None = None,
    license: str | None = None,
    auto_tile_px: int | None = None,
    notice: str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Manifest:
    """Export the checkpoint folder `source`, with `adapter` merged, into the folder `out` and return its manifest.

    Its name is the source folder's, with an adapter `SOURCE+ADAPTER`. Files that a bundle beside `out` has too are
    shared with it, by hard links. `auto_tile_px` belongs to `detail: auto` and defaults to the tile size. An existing
    `out` is replaced where it is empty or a bundle; with `overwrite` also where it is another folder. Raises BadRequest
    for wrong arguments, CheckpointError for a folder that cannot be exported, QualityGateFailed where the graphs differ
    too much from torch, NearfarError where the disk is too small; `out` is then as it was before.
    """
    began = time.monotonic()
    if recipe not in RECIPES:
        raise BadRequest(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}", param="recipe")
    source, out = source.resolve(), out.resolve()
    name = name or _usual_name(source, adapter)
    if not NAME.fullmatch(name):
        raise BadRequest(
            f"a model's name has letters, digits, dot, dash and underscore, MODEL+ADAPTER one plus, got {name!r}",
            param="name",
        )
    if auto_tile_px is not None and auto_tile_px < 1:
        raise BadRequest(f"auto_tile_px must be at least 1, got {auto_tile_px}", param="auto_tile_px")
    check_target(source, out, mark=MANIFEST, overwrite=overwrite)
    checkpoint, plan = load_checkpoint(source, adapter), RECIPES[recipe]
    processing = replace(checkpoint.processing, auto_tile_px=auto_tile_px or checkpoint.processing.auto_tile_px)
    with folder_beside(out) as folder:
        _check_space(checkpoint, recipe, folder)
        _write_texts(checkpoint, folder)
        vision_in_words = _write_vision_and_embeddings(checkpoint, plan, folder / "onnx", show_progress)
        draft = Manifest(
            format=1,
            name=name,
            recipe=recipe,
            source=Source(name=_source_name(source, adapter), sha256=checkpoint.weights_sha256, license=license),
            shapes=checkpoint.shapes,
            processing=processing,
            graphs={},
            files={},
            quality={},
            made_with={package: version(package) for package in MADE_WITH},
            notice=notice,
        )
        writer = DecoderWriter(checkpoint, plan, folder, draft, show_progress)
        measured = writer.write()
        write_replay(writer.cases[0], OnnxModel(Bundle(folder, measured)), folder)
        _write_config(checkpoint, folder)
        taken = ExportFigures(seconds=round(time.monotonic() - began, 1), peak_bytes=process_peak_bytes())
        vision = measured.graphs["vision_encoder"].model_copy(update={"weights": vision_in_words})
        graphs = measured.graphs | {"vision_encoder": vision}
        manifest = measured.model_copy(
            update={"graphs": graphs, "files": hashes(folder), "replay": FILE, "export": taken}
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        share_files(folder, manifest.files, out.parent)
        move_into_place(folder, out)
    return manifest


def _usual_name(source: Path, adapter: Path | None) -> str:
    model = model_name(source)
    return model if adapter is None else f"{model}+{adapter.resolve().name}"


def _source_name(source: Path, adapter: Path | None) -> str:
    return source.name if adapter is None else f"{source.name} with adapter {adapter.resolve().name}"


def _check_space(checkpoint: Checkpoint, recipe: str, folder: Path) -> None:
    vision = sum(weight.numel() for weight in checkpoint.model.model.vision_model.parameters())
    # The vision graph is written in float32 first, whatever becomes of it.
    needed = 4 * vision + int(BYTES_PER_WEIGHT.get(recipe, 1.3) * checkpoint.shapes.parameters)
    free = shutil.disk_usage(folder).free
    if free < needed:
        have = f"{folder.parent} has {free / 1e6:,.0f} MB free"
        raise NearfarError(f"the bundle needs about {needed / 1e6:,.0f} MB of disk, {have}")


def _write_texts(checkpoint: Checkpoint, folder: Path) -> None:
    for name in COPIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    path = folder / "tokenizer_config.json"  # where transformers.js looks for the chat template of these models
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(config | {"chat_template": read_template(folder)}, indent=2) + "\n")


def _write_vision_and_embeddings(checkpoint: Checkpoint, plan: RecipePlan, folder: Path, show_progress: bool) -> str:
    """Returns in words how the vision graph's weights are stored."""
    folder.mkdir()
    words: str = plan.beside
    vision = folder / plan.file("vision_encoder")
    with tqdm(total=2, desc="export", unit="graph", file=sys.stderr, disable=not show_progress) as bar:
        if plan.beside == "float32":
            write_vision(checkpoint, vision)
        else:
            with tempfile.TemporaryDirectory(dir=folder) as plain:
                write_vision(checkpoint, Path(plain, vision.name))
                if plan.beside == "int8":
                    pictures = [draw_scene(Random(seed), held_out=True).image for seed in range(VISION_PICTURES)]
                    tiles = [tile_image(picture, "low", checkpoint.processing).pixels for picture in pictures]
                    words = quantize_vision(Path(plain, vision.name), vision, np.concatenate(tiles))
                else:
                    halve_vision(Path(plain, vision.name), vision)
        bar.update()
        path = folder / plan.file("embed_tokens")
        write_embeddings(checkpoint, path, weights=plan.beside)
        bar.update()
    # What tracing leaves, of 256M 1.3 GB before and 0.3 after: the verification of large graphs has room in it then.
    gc.collect()
    return_freed_memory()
    return words


def _write_config(checkpoint: Checkpoint, folder: Path) -> None:
    """config.json as transformers.js reads it: counts spelled out even where they are the defaults."""
    config: dict[str, Any] = checkpoint.model.config.to_dict()
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("_name_or_path", None)  # a path of this machine
    text, shapes = checkpoint.model.config.text_config, checkpoint.shapes
    config["text_config"].update(
        num_hidden_layers=shapes.layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=shapes.kv_heads,
        head_dim=shapes.head_dim,
        vocab_size=shapes.vocab_size,
        hidden_size=shapes.hidden_size,
    )
    split = {data.name.removesuffix("_data"): 1 for data in sorted((folder / "onnx").glob("*_data"))}
    config["transformers.js_config"] = {"use_external_data_format": split}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
