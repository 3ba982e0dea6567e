"""The manifest of an exported or adopted model, and a folder checked against it.

A bundle is a folder with `manifest.json`, `tokenizer.json`, `tokenizer_config.json`, `config.json` and `onnx/` in the
published three-graph layout. Loading checks format, every file's size and sha256, and that no file, external tensor
data included, lies outside the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from models.errors import BundleError
from models.images import ImageProcessing

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# A model's name, or MODEL+ADAPTER.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\+[A-Za-z0-9][A-Za-z0-9._-]*)?")
TEXT_SUFFIXES = (".json", ".jinja")
# `decoder_prompt` is there where a recipe runs the prompt step in a graph of its own, over the same cache.
GraphName = Literal["vision_encoder", "embed_tokens", "decoder_model_merged", "decoder_prompt"]
REQUIRED_GRAPHS: tuple[GraphName, ...] = ("vision_encoder", "embed_tokens", "decoder_model_merged")
# An exported tier (fp32, int8-fast), or the suffix of published files (q4f16, quantized).
Recipe = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+([-_.][a-z0-9]+)*$", max_length=40)]
CacheKind = Literal["shared", "growing"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Frozen):
    """Where the weights came from. `sha256` is over the checkpoint's weight files, in name order."""

    name: str
    sha256: str
    license: str | None = None
    revision: str | None = None


class Shapes(_Frozen):
    """What the runtime must know to feed the graphs."""

    hidden_size: int
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    image_tokens_per_tile: int
    image_token_id: int
    stop_token_ids: tuple[int, ...]
    parameters: int


class GraphEntry(_Frozen):
    """One ONNX file and, in words, how its weights are stored and what was changed in a published file."""

    file: str
    weights: str
    edit: str | None = None


class FileEntry(_Frozen):
    bytes: int
    sha256: str


class ExportFigures(_Frozen):
    """What making the bundle took."""

    seconds: float
    peak_bytes: int


class Manifest(_Frozen):
    """`manifest.json`. `quality` holds what the export measured against torch, with the text of each measure.

    `cache`: past and present of the decoder share one buffer, or each step hands out a longer copy. `replay` names the
    file with a stored input and what the graphs are to make of it.
    """

    format: Literal[1]
    name: str
    recipe: Recipe
    source: Source
    shapes: Shapes
    processing: ImageProcessing
    graphs: dict[GraphName, GraphEntry]
    files: dict[str, FileEntry]
    quality: dict[str, Any]
    made_with: dict[str, str]
    notice: str | None = None
    cache: CacheKind = "shared"
    replay: str | None = None
    export: ExportFigures | None = None


class Bundle:
    """A checked bundle folder."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """The manifest alone, its files unchecked: for listing, never for loading. Raises BundleError."""
        path = folder / MANIFEST
        if not path.is_file():
            raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}")
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(step) for step in first["loc"])
            raise BundleError(f"{path}: {where}: {first['msg']}") from error
        return cls(folder, manifest)

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read the manifest and check every file. Raises BundleError that names what is wrong."""
        bundle = cls.read(folder)
        manifest = bundle.manifest
        root = hub_root(folder.resolve()) or folder.resolve()
        for name, entry in manifest.files.items():
            file = folder / name
            if root not in file.resolve().parents:
                raise BundleError(f"{name} lies outside the bundle {folder}")
            if not file.is_file():
                raise BundleError(f"{folder}: {name} is missing")
            if file.stat().st_size != entry.bytes or sha256_of(file) != entry.sha256:
                raise BundleError(f"{folder}: {name} does not match its hash in the manifest")
        # What is read by name; a published folder has other graphs, weights and texts beside, which are not.
        for file in folder.iterdir():
            if file.suffix in TEXT_SUFFIXES and file.name not in (*manifest.files, MANIFEST):
                raise BundleError(f"{folder}: {file.name} is not in the manifest")
        missing = [name for name in REQUIRED_GRAPHS if name not in manifest.graphs]
        if missing:
            raise BundleError(f"{folder / MANIFEST}: graphs: {missing[0]} is missing")
        for named in (*(graph.file for graph in manifest.graphs.values()), *filter(None, [manifest.replay])):
            if named not in manifest.files:
                raise BundleError(f"{folder}: {named} has no hash in the manifest")
        return bundle

    @property
    def target(self) -> str:
        return f"local/{self.manifest.name}@{self.manifest.recipe}"

    @property
    def model_bytes(self) -> int:
        """Bytes of the graphs and their external data."""
        return sum(entry.bytes for name, entry in self.manifest.files.items() if name.startswith("onnx/"))

    def graph(self, name: GraphName) -> Path:
        return self.folder / self.manifest.graphs[name].file


def hub_root(folder: Path) -> Path | None:
    """The model's folder in a hub's cache where `folder`, a real path, is a snapshot in it: its files link to blobs."""
    root = folder.parent.parent
    return root if folder.parent.name == "snapshots" and root.name.startswith("models--") else None


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_beside(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write beside `path` and take its place.

    A link, as a hub's cache has them, then leads to a new file beside the one it led to, which stays: a graph's
    external data is looked for there.
    """
    place = path.resolve().with_suffix(".edited") if path.is_symlink() else path
    beside = place.with_name(f".{place.name}.part")
    link = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as opened:
            opened.writelines(pieces)
        beside.replace(place)
        if place != path:
            link.symlink_to(os.path.relpath(place, path.parent.resolve()))
            link.replace(path)
    except OSError as error:
        for left in (beside, link):
            with suppress(OSError):
                left.unlink()
        raise BundleError(f"{path} cannot be written: {error.strerror}") from error
