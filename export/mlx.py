"""A checkpoint becomes an MLX folder: mlx-vlm converts it, loads it back, and must answer as the same weights do here.

Runs in an environment of its own, since mlx-vlm needs transformers 5 and the export of bundles an older one. Knows no
torch.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_vlm import generate, load
from mlx_vlm.convert import convert
from mlx_vlm.prompt_utils import apply_chat_template
from PIL import Image
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from export.checkpoint_files import (
    CheckpointError,
    check_config,
    model_name,
    read_json,
    sha256_together,
    stored_weights,
    weight_files,
)
from export.folders import COPIED, check_target, folder_beside, hashes, move_into_place
from models.adopt import read_processing, read_tokenizer
from models.bundle import NAME, Bundle, ExportFigures, FileEntry, Source
from models.catalog import Shape
from models.errors import BadRequest
from models.images import Detail, ImageProcessing, tile_image
from models.machine import process_peak_bytes
from models.onnx_model import OnnxModel
from models.prompt import PromptRenderer
from models.quality import GATES, Case, Differences, Floats, QualityGateFailed, check, observe, summary
from models.request import ImagePart, Message, TextPart
from models.tiny_scenes import scenes
from models.tokenizer import TextTokenizer

MANIFEST = "nearfar.json"
BITS = {"int8": 8, "int4": 4}
# Weights that share a scale and an offset. mlx-vlm itself takes 64; SmolLM2-135M's text weights in 4 bits, over 2,048
# tokens of prose: mean KL 0.50 in groups of 64, 0.36 in groups of 32 (README.md).
GROUP_SIZES = {"int8": (64, 32), "int4": (32,)}
MODULES = ("model.vision_model", "model.connector", "model.text_model")
TEXT_MODEL_TYPES = ("llama",)  # mlx-vlm has no other below a SmolVLM
MADE_WITH = ("mlx", "mlx-vlm", "transformers")
MIN_EQUAL_ANSWERS = 0.75  # of the 8-bit folder's; what one token turns, the rest of an answer follows
SEED, PROMPTS = 20261121, 12
UNQUANTIZED = "mlx-vlm with the weights as stored"


class MlxManifest(BaseModel):
    """`nearfar.json`. `source` is that of a bundle of the same weights; `quality` has the text of each measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: str
    recipe: str
    source: Source
    bits: int
    group_size: int
    files: dict[str, FileEntry]
    quality: dict[str, Any]
    made_with: dict[str, str]
    export: ExportFigures


class Extent(NamedTuple):
    """How much is asked, which takes seconds a tile and a token: MLX's build for processors has no fast kernels."""

    detail: Detail
    answer_tokens: int


SMALL_PARAMETERS = 10**8
SMALL, LARGE = Extent("high", 24), Extent("low", 16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """One question about one drawn picture, as our own processor gives it to a model."""

    picture: Image.Image
    question: str
    ids: list[int]
    pixels: Floats  # [tile, 3, height, width]


@dataclass(frozen=True, kw_only=True, eq=False)
class Folder:
    """A checkpoint folder that mlx-vlm can convert, its weights unread."""

    path: Path
    weights: list[Path]
    sha256: str
    shape: Shape
    group_size: int
    tokenizer: TextTokenizer
    renderer: PromptRenderer
    processing: ImageProcessing

    @classmethod
    def read(cls, path: Path, group_sizes: Sequence[int]) -> Folder:
        """Raises CheckpointError, or BundleError for what stands beside the weights."""
        config = read_json(path, "config.json")
        check_config(config, path, TEXT_MODEL_TYPES)
        weights = weight_files(path)
        _check_modules(stored_weights(weights), path)
        try:
            shape = Shape.from_config(config)
            tile_px = config["vision_config"]["image_size"]
            group_size = _group_size(config, path, group_sizes)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{path / 'config.json'}: a dimension is missing or no number: {error}") from error
        tokenizer, settings = read_tokenizer(path), "preprocessor_config.json"
        return cls(
            path=path,
            weights=weights,
            sha256=sha256_together(weights),
            shape=shape,
            group_size=group_size,
            tokenizer=tokenizer,
            renderer=PromptRenderer.from_folder(path, tokenizer, shape.image_tokens_per_tile),
            processing=read_processing(read_json(path, settings), path / settings, tile_px),
        )

    @property
    def extent(self) -> Extent:
        return SMALL if self.shape.parameters < SMALL_PARAMETERS else LARGE


def export_mlx(
    source: Path,
    *,
    recipe: str,
    out: Path,
    reference: Path | None = None,
    here: Iterable[Bundle] = (),
    name: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> MlxManifest:
    """Convert the checkpoint folder `source` into the MLX folder `out` and return what `nearfar.json` there says.

    `reference` is an fp32 bundle of the same weights, or else one among the bundles `here`; without any the converted
    weights are compared with the unconverted in mlx-vlm. An existing `out` is replaced where it is empty or was made
    here; with `overwrite` any folder is. Raises BadRequest for wrong arguments, CheckpointError for a folder that does
    not convert, QualityGateFailed where the 8-bit folder answers otherwise, NearfarError where it cannot be written;
    `out` is then as it was before.
    """
    began = time.monotonic()
    if recipe not in BITS:
        raise BadRequest(f"for MLX the recipe must be {' or '.join(BITS)}, got {recipe!r}", param="recipe")
    source, out = source.resolve(), out.resolve()
    name = name or model_name(source)
    if not NAME.fullmatch(name):
        raise BadRequest(f"a model's name has letters, digits, dot, dash and underscore, got {name!r}", param="name")
    check_target(source, out, mark=MANIFEST, overwrite=overwrite)
    checkpoint = Folder.read(source, GROUP_SIZES[recipe])
    compared = _reference(reference, here, checkpoint)
    asked = list(_draw(checkpoint))
    with folder_beside(out) as folder, _links(checkpoint) as links, redirect_stdout(sys.stderr):
        cases = _answers_near(compared, asked, checkpoint) if compared else _answers_mlx(links, asked, checkpoint)
        _convert(links, folder, bits=BITS[recipe], group_size=checkpoint.group_size)
        quality = _measure(folder, asked, cases, checkpoint, compared, show_progress)
        _judge(quality, recipe)
        _sign(folder, checkpoint.sha256)
        manifest = MlxManifest(
            name=name,
            recipe=recipe,
            source=Source(name=source.name, sha256=checkpoint.sha256, license=license),
            bits=BITS[recipe],
            group_size=checkpoint.group_size,
            files=hashes(folder),
            quality=quality,
            made_with={package: version(package) for package in MADE_WITH},
            export=ExportFigures(seconds=round(time.monotonic() - began, 1), peak_bytes=process_peak_bytes()),
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        move_into_place(folder, out)
    return manifest


def _check_modules(names: Iterable[str], path: Path) -> None:
    """mlx-vlm tells of a missing weight, and does without a module that has none at all."""
    found = {".".join(name.split(".")[:2]) for name in names}
    missing = [module for module in MODULES if module not in found]
    if missing:
        raise CheckpointError(f"{path}: all weights of {' and '.join(missing)} are missing")


def _group_size(config: dict[str, Any], path: Path, sizes: Sequence[int]) -> int:
    """The first that divides what the text model's matrices read; mlx-vlm would leave others as they are."""
    text = config["text_config"]
    reads = (text["hidden_size"], text["intermediate_size"])
    found = next((size for size in sizes if not any(width % size for width in reads)), None)
    if found is None:
        raise CheckpointError(
            f"{path}: MLX quantizes in groups of {' or '.join(map(str, sizes))} weights, which do not divide "
            f"hidden_size {reads[0]} and intermediate_size {reads[1]}"
        )
    return found


def _reference(named: Path | None, here: Iterable[Bundle], checkpoint: Folder) -> Bundle | None:
    def fits(bundle: Bundle) -> bool:
        return bundle.manifest.recipe == "fp32" and bundle.manifest.source.sha256 == checkpoint.sha256

    if named is None:
        found = next(filter(fits, here), None)
        return found and Bundle.load(found.folder)
    bundle = Bundle.load(named)
    if not fits(bundle):
        raise BadRequest(f"{named} is no fp32 bundle of the weights in {checkpoint.path}", param="reference")
    return bundle


@contextmanager
def _links(checkpoint: Folder) -> Iterator[Path]:
    """A folder of links to what is converted, and to nothing else: the converter copies folders and code beside it."""
    with tempfile.TemporaryDirectory(prefix="nearfar-") as folder:
        for path in (*(checkpoint.path / name for name in ("config.json", *COPIED)), *checkpoint.weights):
            if path.is_file():
                (Path(folder) / path.name).symlink_to(path)
        yield Path(folder)


def _draw(checkpoint: Folder) -> Iterator[Asked]:
    rng, extent = random.Random(SEED), checkpoint.extent
    for _ in range(PROMPTS):
        scene, question = scenes.draw_scene(rng, held_out=True), None
        while question is None:
            question = scenes.ASKERS[rng.choice(list(scenes.ASKERS))](scene, rng)
        tiled = tile_image(scene.image, extent.detail, checkpoint.processing)
        message = Message(role="user", parts=(ImagePart(data=b""), TextPart(text=question[0])))
        ids = checkpoint.renderer.ids([message], [tiled.grid])
        yield Asked(picture=scene.image, question=question[0], ids=ids, pixels=tiled.pixels)


def _answers_near(bundle: Bundle, asked: Sequence[Asked], checkpoint: Folder) -> list[Case]:
    model = OnnxModel(bundle)
    return [observe(model, each.ids, each.pixels, tokens=checkpoint.extent.answer_tokens) for each in asked]


def _answers_mlx(folder: Path, asked: Sequence[Asked], checkpoint: Folder) -> list[Case]:
    model, processor = _load(folder, checkpoint.extent.detail)
    texts = [_greedy(model, processor, each, checkpoint.extent) for each in asked]
    answers = [checkpoint.tokenizer.encode_literal(text) for text in texts]
    return [_observe(model, each, answer) for each, answer in zip(asked, answers, strict=True)]


def _load(folder: Path, detail: Detail) -> tuple[Any, Any]:
    """mlx-vlm's model and processor. Raises CheckpointError."""
    try:
        model, processor = load(str(folder), trust_remote_code=False)
    except Exception as error:  # mlx and transformers raise many kinds for damaged files
        raise CheckpointError(f"mlx-vlm cannot load it: {_one_line(error)}") from error
    processor.image_processor.do_image_splitting = detail == "high"
    return model, processor


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _greedy(model: Any, processor: Any, asked: Asked, extent: Extent) -> str:
    """What a user of mlx-vlm gets: its template, its processor, its loop."""
    prompt = apply_chat_template(processor, model.config, asked.question, num_images=1)
    found = generate(
        model, processor, prompt, image=[asked.picture], max_tokens=extent.answer_tokens, temperature=0.0, verbose=False
    )
    return str(found.text).strip()


def _observe(model: Any, asked: Asked, answer: list[int]) -> Case:
    """Features and logits along `answer`, of the ids and tiles that our processor makes."""
    ids = mx.array([asked.ids + answer[:-1]])
    embeds = model.get_input_embeddings(ids, mx.array(asked.pixels)[None]).inputs_embeds
    logits = model.language_model(ids, inputs_embeds=embeds).logits[0, len(asked.ids) - 1 :]
    found: Floats = np.array(embeds[0].astype(mx.float32))
    features = found[np.array(ids[0]) == model.config.image_token_id].reshape(len(asked.pixels), -1, found.shape[-1])
    return Case(asked.ids, asked.pixels, features, answer, np.array(logits.astype(mx.float32)))


def _convert(links: Path, folder: Path, *, bits: int, group_size: int) -> None:
    try:
        convert(str(links), str(folder), quantize=True, q_bits=bits, q_group_size=group_size, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # mlx and transformers raise many kinds for damaged files
        if "Unable to write" in str(error):  # mlx's own kind; the system's reason is lost
            raise OSError("mlx could not write its weights, is the disk full?") from error
        raise CheckpointError(f"mlx-vlm cannot convert it: {_one_line(error)}") from error


def _measure(
    folder: Path,
    asked: Sequence[Asked],
    cases: Sequence[Case],
    checkpoint: Folder,
    compared: Bundle | None,
    show_progress: bool,
) -> dict[str, Any]:
    model, processor = _load(folder, checkpoint.extent.detail)
    found, equal = Differences(), []
    pairs = list(zip(asked, cases, strict=True))
    for each, case in tqdm(pairs, desc="compare", unit="prompt", file=sys.stderr, disable=not show_progress):
        found.add(case, _observe(model, each, case.answer))
        text = _greedy(model, processor, each, checkpoint.extent)
        equal.append(text == checkpoint.tokenizer.decode(case.answer).strip())
    reference = f"{compared.target} under onnxruntime" if compared else UNQUANTIZED
    quality = summary(found, checkpoint.shape.vocab, reference=reference, inputs="drawn scenes, greedy answers")
    return quality | {
        "equal_answers": sum(equal) / len(equal),
        "equal_answers_is": f"share of the prompts that mlx-vlm, by its own processor, answers as {reference} does",
    }


def _judge(quality: dict[str, Any], recipe: str) -> None:
    """8 bits must pass the gate of the recipe; of 4 bits, which are rounded to nearest, the figures are told."""
    if recipe != "int8":
        return
    check(quality, GATES[recipe])
    if quality["kl_meaningful"] and quality["equal_answers"] < MIN_EQUAL_ANSWERS:
        raise QualityGateFailed(
            f"equal_answers is {quality['equal_answers']:.2f}, at least {MIN_EQUAL_ANSWERS} is asked for"
        )


def _sign(folder: Path, sha256: str) -> None:
    with (folder / "README.md").open("a") as opened:
        opened.write(f"\nConverted by mlx-vlm {version('mlx-vlm')} from weights of sha256 {sha256}: see {MANIFEST}.\n")
