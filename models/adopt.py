"""A folder in the published ONNX layout becomes a bundle: read from its JSON files, hashed once, its manifest written.

Needs neither torch nor transformers nor onnx. A graph file is protobuf, and its messages are walked by their field
numbers in onnx.proto: ModelProto.graph, GraphProto.node and .initializer, NodeProto.op_type, .domain and .attribute,
and graphs inside attributes. All other bytes are copied. A changed file says so in ModelProto.metadata_props.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from models.bundle import (
    MANIFEST,
    NAME,
    REQUIRED_GRAPHS,
    TEXT_SUFFIXES,
    Bundle,
    FileEntry,
    GraphEntry,
    GraphName,
    Manifest,
    Shapes,
    Source,
    hub_root,
    sha256_of,
    write_beside,
)
from models.catalog import Shape
from models.errors import BadRequest, BundleError
from models.files import read_object
from models.images import ImageProcessing
from models.onnx_model import OnnxModel
from models.prompt import read_template
from models.tokenizer import TextTokenizer

# What `adopt` takes where nothing is asked for, the first that is there. Decoder: 4-bit weights are the fastest on a
# CPU and the smallest; then full precision; what is made for a GPU; dynamic int8 last, for its loss in quality. Vision
# and embeddings: what loses nothing, and of that the smaller file where the CPU does not have to widen it each time.
SUFFIX_ORDER: Mapping[GraphName, tuple[str, ...]] = {
    "vision_encoder": ("", "_fp16", "_q4", "_q4f16", "_bnb4", "_int8", "_uint8", "_quantized"),
    "embed_tokens": ("_fp16", "", "_int8", "_uint8", "_quantized", "_q4", "_q4f16", "_bnb4"),
    "decoder_model_merged": ("_q4", "", "_fp16", "_q4f16", "_bnb4", "_int8", "_uint8", "_quantized"),
}
MODEL_TYPES = ("smolvlm", "idefics3")
LANCZOS = 1  # `resample` in preprocessor_config.json
END_OF_UTTERANCE = "<end_of_utterance>"
DOMAINS = frozenset(("", "ai.onnx", "com.microsoft"))
ACCURACY_LEVEL = b"\x0a\x0eaccuracy_level"  # AttributeProto.name
ACCURACY_LEVEL_INT8 = ACCURACY_LEVEL + b"\x18\x04\xa0\x01\x02"  # i: 4, type: INT
EDITED = b"nearfar.edited"  # key in metadata_props
Pieces = list[bytes | memoryview]


def adopt(
    folder: Path,
    *,
    suffixes: Mapping[GraphName, str] | None = None,
    name: str | None = None,
    recipe: str | None = None,
    source: Source | None = None,
) -> Manifest:
    """Write `manifest.json` into a folder in the published layout and return it.

    `suffixes` choose a graph's file (`""`, `"_q4"`); the rest follow SUFFIX_ORDER. `name` defaults to the folder's
    name, `recipe` to the decoder's suffix. `source` may say where the files came from; its sha256 is filled in. A
    folder that was adopted with these choices before is checked and left as it is. Raises BadRequest for wrong choices,
    BundleError for a folder that is none or is damaged.
    """
    if not folder.is_dir():
        raise BadRequest(f"{folder} is no folder", param="folder")
    known = Bundle.load(folder).manifest if (folder / MANIFEST).is_file() else None
    if known and not (suffixes or name or recipe):
        return known
    chosen = _choose(folder, suffixes or {})
    name = name or _name_of(folder)
    recipe = recipe or chosen["decoder_model_merged"].lstrip("_") or "fp32"
    if not NAME.fullmatch(name):
        raise BadRequest(f"a model's name has letters, digits, dot, dash and underscore, got {name!r}", param="name")
    if known:
        files = {graph: f"onnx/{graph}{suffix}.onnx" for graph, suffix in chosen.items()}
        if (name, recipe, files) == (known.name, known.recipe, {key: it.file for key, it in known.graphs.items()}):
            return known
        if "adopt" not in known.made_with:
            raise BadRequest(f"{folder} is a bundle already: {known.name}@{known.recipe}", param="folder")
    draft = _draft(folder, name, recipe, chosen, source or Source(name=name, sha256=""))
    manifest = draft.model_copy(update={"cache": OnnxModel(Bundle(folder, draft)).find_cache_kind()})
    write_beside(folder / MANIFEST, [manifest.model_dump_json(indent=2).encode(), b"\n"])
    return manifest


def _draft(folder: Path, name: str, recipe: str, chosen: Mapping[GraphName, str], source: Source) -> Manifest:
    """The manifest without what only running the graphs shows. Edits the graphs that need it."""
    names = {path.name for path in folder.iterdir() if path.suffix in TEXT_SUFFIXES} - {MANIFEST}
    config, settings = _read_json(folder, "config.json"), _read_json(folder, "preprocessor_config.json")
    shapes, tile_px = _shapes(folder, config), config["vision_config"]["image_size"]
    processing = read_processing(settings, folder / "preprocessor_config.json", tile_px)
    read_template(folder)
    graphs = {}
    for graph, suffix in chosen.items():
        file = f"onnx/{graph}{suffix}.onnx"
        external_data, edit = edit_graph(_inside(folder, file))
        graphs[graph] = GraphEntry(file=file, weights=f"as published, suffix {suffix or 'none'}", edit=edit)
        names |= {file, *(f"onnx/{data}" for data in external_data)}
    files = {each: _entry(folder, each) for each in sorted(names)}
    weights = "".join(f"{each} {entry.sha256}\n" for each, entry in files.items() if each.startswith("onnx/"))
    return Manifest(
        format=1,
        name=name,
        recipe=recipe,
        source=source.model_copy(update={"sha256": hashlib.sha256(weights.encode()).hexdigest()}),
        shapes=shapes,
        processing=processing,
        graphs=graphs,
        files=files,
        quality={},
        made_with={"adopt": "1"},
    )


def _shapes(folder: Path, config: Mapping[str, Any]) -> Shapes:
    if config.get("model_type") not in MODEL_TYPES:
        raise BundleError(f"{folder}: model_type is {config.get('model_type')!r}, only {' or '.join(MODEL_TYPES)} run")
    try:
        shape = Shape.from_config(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BundleError(f"{folder / 'config.json'}: a dimension is missing or no number: {error}") from error
    generation = _read_json(folder, "generation_config.json")
    if not isinstance(config.get("image_token_id"), int):
        raise BundleError(f"{folder / 'config.json'} has no image_token_id")
    return Shapes(
        hidden_size=shape.hidden,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_positions=shape.max_positions,
        image_tokens_per_tile=shape.image_tokens_per_tile,
        image_token_id=config["image_token_id"],
        stop_token_ids=read_stop_tokens(generation, read_tokenizer(folder), folder),
        parameters=shape.parameters,
    )


def _choose(folder: Path, asked: Mapping[GraphName, str]) -> dict[GraphName, str]:
    chosen: dict[GraphName, str] = {}
    for graph in REQUIRED_GRAPHS:
        there = [suffix for suffix in SUFFIX_ORDER[graph] if (folder / f"onnx/{graph}{suffix}.onnx").is_file()]
        if not there:
            raise BundleError(f"{folder} is not in the published layout: it has no onnx/{graph}.onnx of any suffix")
        if asked.get(graph, there[0]) not in there:
            have = ", ".join(suffix.lstrip("_") or "fp32" for suffix in there)
            raise BadRequest(f"there is no onnx/{graph}{asked[graph]}.onnx; there are: {have}", param="suffix")
        chosen[graph] = asked.get(graph, there[0])
    return chosen


def parse_suffixes(texts: list[str]) -> dict[GraphName, str]:
    """`q4` for all graphs, or `vision_encoder=fp16` for one; `fp32` is no suffix. Raises BadRequest."""
    suffixes: dict[GraphName, str] = {}
    for text in texts:
        graph, _, suffix = text.rpartition("=")
        known = [each for each in REQUIRED_GRAPHS if graph in (each, "")]
        if not known or f"_{suffix}" not in (*SUFFIX_ORDER["embed_tokens"], "_fp32"):
            raise BadRequest(f"{text!r} is no SUFFIX or GRAPH=SUFFIX: fp32, fp16, q4, ...", param="suffix")
        suffixes |= dict.fromkeys(known, "" if suffix == "fp32" else f"_{suffix}")
    return suffixes


def _name_of(folder: Path) -> str:
    """The folder's name; in a hub's cache, where that is a commit, the repository's."""
    root = hub_root(folder.resolve())
    name = folder.resolve().name if root is None else root.name.rpartition("--")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "model"


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    return read_object(folder, name, BundleError, otherwise="not in the published layout")


def read_tokenizer(folder: Path) -> TextTokenizer:
    """The folder's tokenizer.json. Raises BundleError where there is none, or it is damaged."""
    try:
        return TextTokenizer(folder / "tokenizer.json")
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"{folder / 'tokenizer.json'} does not load: {str(error).splitlines()[0][:200]}") from error


def read_processing(settings: Mapping[str, Any], where: Path, tile_px: int) -> ImageProcessing:
    """The image processor's settings from preprocessor_config.json, for a vision model of tiles of that size."""
    try:
        asked = settings["max_image_size"]["longest_edge"]
        wanted = {"longest_edge": settings["size"]["longest_edge"], "tile_px": asked, "auto_tile_px": asked}
        wanted |= {name: settings[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in settings}
        processing = TypeAdapter(ImageProcessing).validate_python(wanted)
    except (KeyError, TypeError, ValidationError) as error:
        raise BundleError(f"{where}: a setting of the image processor is missing, or no number") from error
    if asked != tile_px:
        raise BundleError(f"{where}: tiles of {asked} px do not fit a vision model for {tile_px} px")
    if settings.get("resample", LANCZOS) != LANCZOS or not math.isclose(
        settings.get("rescale_factor", 1 / 255), 1 / 255
    ):
        raise BundleError(f"{where} asks for another resampling than LANCZOS or another scale than 1/255")
    return processing


def read_stop_tokens(generation: Mapping[str, Any], tokenizer: TextTokenizer, where: Path) -> tuple[int, ...]:
    """Those of generation_config.json, and the end of an utterance: text_config's eos is not what ends an answer."""
    stops = generation.get("eos_token_id")
    found = set(stops if isinstance(stops, list) else [] if stops is None else [stops])
    if END_OF_UTTERANCE in tokenizer.special_tokens():
        found.add(tokenizer.marker(END_OF_UTTERANCE))
    if not found:
        raise BundleError(f"{where}: no stop token, generation_config.json needs eos_token_id")
    return tuple(sorted(found))


def _inside(folder: Path, name: str) -> Path:
    root = hub_root(folder.resolve()) or folder.resolve()
    if root not in (folder / name).resolve().parents:
        raise BundleError(f"{name} lies outside {folder}")
    if not (folder / name).is_file():
        raise BundleError(f"{folder}: {name} is missing")
    return folder / name


def _entry(folder: Path, name: str) -> FileEntry:
    path = _inside(folder, name)
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))


def edit_graph(path: Path) -> tuple[set[str], str | None]:
    """Names of a graph's external data, and what this or an earlier call changed: accuracy_level, set to 4 where unset.

    Raises BundleError for operators of an unknown domain.
    """
    walk = _Walk()
    try:
        with path.open("rb") as opened:
            data = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        pieces = walk.model(data)
    except (ValueError, IndexError, KeyError, RecursionError) as error:
        raise BundleError(f"{path.name} is damaged, or no ONNX graph") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    unknown = sorted(walk.domains - DOMAINS)
    if unknown:
        raise BundleError(f"{path.name} has operators of the domain {unknown[0]!r}, which is not known")
    if walk.edited:
        walk.note = f"accuracy_level set to 4 in {walk.edited} MatMulNBits nodes"
        note = [*_wrapped(1, [EDITED]), *_wrapped(2, [walk.note.encode()])]
        write_beside(path, [*pieces, *_wrapped(14, note)])
    return walk.external_data, walk.note


class _Field(NamedTuple):
    """One field of a protobuf message: `whole` with its tag, and its value as bytes or as an integer."""

    number: int
    whole: memoryview
    value: memoryview
    integer: int


def _fields(data: memoryview) -> Iterator[_Field]:
    """Raises IndexError or ValueError for what is no protobuf message."""
    at = 0
    while at < len(data):
        start = at
        tag, at = _varint(data, at)
        integer, size = 0, {1: 8, 5: 4}.get(tag & 7, 0)
        if tag & 7 == 0:
            integer, at = _varint(data, at)
        elif tag & 7 == 2:
            size, at = _varint(data, at)
        elif not size:
            raise ValueError(f"wire type {tag & 7}")
        if at + size > len(data):
            raise ValueError("truncated")
        yield _Field(tag >> 3, data[start : at + size], data[at : at + size], integer)
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if not data[at - 1] & 0x80:
            return value, at
        if shift > 63:
            raise ValueError("varint")


def _wrapped(number: int, pieces: Pieces) -> Pieces:
    """A message as a field of another one."""
    header = bytearray()
    for value in (number << 3 | 2, sum(map(len, pieces))):
        while value > 0x7F:
            header.append(value & 0x7F | 0x80)
            value >>= 7
        header.append(value)
    return [bytes(header), *pieces]


class _Walk:
    """Copies a ModelProto with accuracy_level set, and remembers what it saw. Numbers are those of onnx.proto."""

    def __init__(self) -> None:
        self.edited = 0
        self.domains: set[str] = set()
        self.external_data: set[str] = set()
        self.note: str | None = None

    def model(self, data: memoryview) -> Pieces:
        function = partial(self._copied, inner={7: self._node})
        return self._copied(data, {7: self._graph, 14: self._property, 25: function})

    def _graph(self, data: memoryview) -> Pieces:
        return self._copied(data, {1: self._node, 5: self._tensor})

    def _property(self, data: memoryview) -> Pieces:
        pair = {field.number: bytes(field.value) for field in _fields(data)}
        if pair.get(1) == EDITED:
            self.note = pair[2].decode()
        return [data]

    def _attribute(self, data: memoryview) -> Pieces:
        return self._copied(data, {5: self._tensor, 6: self._graph, 10: self._tensor, 11: self._graph})

    @staticmethod
    def _copied(data: memoryview, inner: Mapping[int, Callable[[memoryview], Pieces]]) -> Pieces:
        pieces: Pieces = []
        for field in _fields(data):
            change = inner.get(field.number)
            pieces += _wrapped(field.number, change(field.value)) if change else [field.whole]
        return pieces

    def _node(self, data: memoryview) -> Pieces:
        fields = list(_fields(data))
        self.domains |= {str(field.value, "utf-8") for field in fields if field.number == 7} or {""}
        unset = b"MatMulNBits" in [field.value for field in fields if field.number == 4]
        pieces: Pieces = []
        for field in fields:
            if field.number != 5:
                pieces.append(field.whole)
            elif not unset or not bytes(field.value).startswith(ACCURACY_LEVEL):
                pieces += _wrapped(5, self._attribute(field.value))
            elif any(each.number == 3 and each.integer for each in _fields(field.value)):
                pieces.append(field.whole)
                unset = False
        if unset:
            self.edited += 1
            pieces += _wrapped(5, [ACCURACY_LEVEL_INT8])
        return pieces

    def _tensor(self, data: memoryview) -> Pieces:
        for field in _fields(data):
            if field.number == 13:  # external_data: key and value
                pair = {each.number: bytes(each.value) for each in _fields(field.value)}
                if pair.get(1) == b"location":
                    self.external_data.add(pair[2].decode())
        return [data]
