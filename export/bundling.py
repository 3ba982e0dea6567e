"""Checkpoint folder in, bundle folder out: all of it or nothing.

The bundle grows in a hidden folder beside OUT, is verified there, gets its manifest last, and takes OUT's place by a rename.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from export.checkpoint import Checkpoint, load_checkpoint
from export.graphs import build_decoder, save_graph, write_embeddings, write_vision
from export.quantize import RECIPES, RecipePlan, quantize_decoder, quantize_vision
from export.verify import verify
from models.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    Bundle,
    FileEntry,
    GraphEntry,
    GraphName,
    Manifest,
    Processing,
    Recipe,
    Source,
    sha256_of,
)
from models.errors import BadRequest
from models.onnx_model import OnnxModel

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip
MADE_WITH = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai", "optimum-onnx")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def export_bundle(
    source: Path,
    *,
    recipe: str,
    out: Path,
    name: str | None = None,
    license: str | None = None,
    auto_tile_px: int | None = None,
    notice: str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Manifest:
    """Export the checkpoint folder `source` into the bundle folder `out` and return its manifest.

    `auto_tile_px` belongs to `detail: auto` and defaults to the tile size. An existing `out` is replaced where it is empty
    or a bundle; with `overwrite` also where it is another folder. Raises BadRequest for wrong arguments, CheckpointError
    for a folder that cannot be exported, QualityGateFailed where the graphs differ too much from torch; `out` is then as
    it was before.
    """
    chosen = next((known for known in get_args(Recipe) if known == recipe), None)
    if chosen is None:
        raise BadRequest(f"recipe must be one of {', '.join(get_args(Recipe))}, got {recipe!r}", param="recipe")
    source, out = source.resolve(), out.resolve()
    name = name or source.name
    if not NAME.fullmatch(name):
        raise BadRequest(f"a model's name has letters, digits, dot, dash and underscore, got {name!r}", param="name")
    _check_target(source, out, overwrite)
    checkpoint = load_checkpoint(source)
    with _folder_beside(out) as folder:
        _write_texts(checkpoint, folder)
        draft = Manifest(
            format=FORMAT_VERSION,
            name=name,
            recipe=chosen,
            source=Source(name=source.name, sha256=checkpoint.weights_sha256, license=license),
            shapes=checkpoint.shapes,
            processing=_processing(checkpoint, auto_tile_px),
            graphs=_write_graphs(checkpoint, RECIPES[chosen], folder / "onnx", show_progress),
            files={},
            quality={},
            made_with={package: version(package) for package in MADE_WITH},
            notice=notice,
        )
        model = OnnxModel(Bundle(folder, draft))
        quality = verify(checkpoint, model, RECIPES[chosen].gate, show_progress=show_progress)
        manifest = draft.model_copy(update={"quality": quality, "files": _hashes(folder)})
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        _move_into_place(folder, out)
    return manifest


def _check_target(source: Path, out: Path, overwrite: bool) -> None:
    if out == source or out in source.parents:
        raise BadRequest(f"{out} holds the source, which would be lost", param="out")
    if not out.exists():
        return
    if not out.is_dir():
        raise BadRequest(f"{out} is a file", param="out")
    if not overwrite and not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise BadRequest(f"{out} exists and is no bundle", param="out")


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A hidden folder on the same file system as `out`, gone afterwards unless it was moved."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_into_place(folder: Path, out: Path) -> None:
    folder.chmod(0o755)  # mkdtemp makes it for this user alone
    if not out.exists():
        folder.rename(out)
        return
    with _folder_beside(out) as aside:
        old = out.rename(aside / "old")
        try:
            folder.rename(out)
        except OSError:
            old.rename(out)
            raise


def _write_texts(checkpoint: Checkpoint, folder: Path) -> None:
    for name in COPIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)


def _write_graphs(
    checkpoint: Checkpoint, plan: RecipePlan, folder: Path, show_progress: bool
) -> dict[GraphName, GraphEntry]:
    """Write the three graphs and config.json, which names their external data."""
    folder.mkdir()
    paths = {graph: folder / f"{graph}{plan.suffix}.onnx" for graph in get_args(GraphName)}
    with tqdm(total=4, desc="export", unit="step", file=sys.stderr, disable=not show_progress) as bar:
        bar.set_postfix_str("vision encoder")
        if plan.int8_vision_and_embeddings:
            plain = folder / "vision_encoder_float32.onnx"
            write_vision(checkpoint, plain)
            quantize_vision(plain, paths["vision_encoder"])
            for left in folder.glob(plain.name + "*"):
                left.unlink()
        else:
            write_vision(checkpoint, paths["vision_encoder"])
        bar.update()
        bar.set_postfix_str("embeddings")
        write_embeddings(checkpoint, paths["embed_tokens"], int8=plan.int8_vision_and_embeddings)
        bar.update()
        bar.set_postfix_str("decoder")
        decoder = build_decoder(checkpoint)
        bar.update()
        bar.set_postfix_str("decoder weights")
        save_graph(quantize_decoder(decoder, plan), paths["decoder_model_merged"])
        bar.update()
    _write_config(checkpoint, folder)
    return {
        graph: GraphEntry(file=f"onnx/{path.name}", weights=plan.weights[graph]) for graph, path in paths.items()
    }


def _write_config(checkpoint: Checkpoint, graphs: Path) -> None:
    """config.json as transformers.js reads it: counts spelled out even where they are the defaults."""
    config: dict[str, Any] = checkpoint.model.config.to_dict()
    text, shapes = checkpoint.model.config.text_config, checkpoint.shapes
    config["text_config"].update(
        num_hidden_layers=shapes.layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=shapes.kv_heads,
        head_dim=shapes.head_dim,
        vocab_size=shapes.vocab_size,
        hidden_size=shapes.hidden_size,
    )
    split = {data.name.removesuffix("_data"): 1 for data in sorted(graphs.glob("*_data"))}
    config["transformers.js_config"] = {"use_external_data_format": split}
    (graphs.parent / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _processing(checkpoint: Checkpoint, auto_tile_px: int | None) -> Processing:
    own = checkpoint.processing
    if auto_tile_px is not None and auto_tile_px < 1:
        raise BadRequest(f"auto_tile_px must be at least 1, got {auto_tile_px}", param="auto_tile_px")
    return Processing(
        longest_edge=own.longest_edge,
        tile_px=own.tile_px,
        auto_tile_px=auto_tile_px or own.tile_px,
        mean=own.mean,
        std=own.std,
    )


def _hashes(folder: Path) -> dict[str, FileEntry]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder).as_posix()): FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in files
    }
