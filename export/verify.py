"""A bundle's graphs against torch on real inputs: drawn pictures, tiled and asked about as in serving, with the answers
that torch gives greedily; and prose with its true continuations. The graphs run through the runtime that will serve
them, step by step over its cache.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm, trange
from transformers import Idefics3ImageProcessor, Idefics3Processor, PreTrainedTokenizerFast

from export.checkpoint import Checkpoint
from models.bundle import MANIFEST, Manifest
from models.errors import NearfarError
from models.images import Detail, ImageProcessing, tile_image
from models.onnx_model import OnnxModel
from models.prompt import read_template
from models.quality import Case, Differences, Floats, compare, summary
from models.request import ImagePart, Message, Part, TextPart
from models.tiny_scenes import scenes

SEED = 20261121
ANSWER_TOKENS = 24
TEXT_PROMPT, TEXT_ANSWER = 192, 64


class Extent(NamedTuple):
    """How much is asked of torch, which takes seconds a tile and a token with a large model."""

    below_parameters: float
    prompts: int
    details: tuple[Detail, ...]  # in turn
    answer_tokens: int
    texts: int


EXTENTS = (
    Extent(10**8, 24, ("auto", "low", "auto", "high"), ANSWER_TOKENS, 8),
    Extent(10**9, 6, ("low",), 16, 8),
    Extent(math.inf, 3, ("low",), 8, 1),
)


def verify(
    cases: Sequence[Case], texts: Sequence[Case], model: OnnxModel, *, show_progress: bool = True
) -> dict[str, Any]:
    """Measure a bundle's graphs and return its `quality`, whatever it is."""
    seen, read, vocabulary = Differences(), Differences(), model.shapes.vocab_size
    for case in tqdm([*cases, *texts], desc="verify", unit="prompt", file=sys.stderr, disable=not show_progress):
        compare(case, model, seen if len(case.pixels) else read)
    tiles = sorted({len(case.pixels) for case in cases})
    inputs = f"drawn scenes of {tiles[0]}" + (f" to {tiles[-1]}" if len(tiles) > 1 else "") + " tiles, greedy answers"
    quality = summary(seen, vocabulary, reference="torch in float32", inputs=inputs)
    inputs = "pydoc_data.topics, as the text goes on"
    quality["text"] = summary(read, vocabulary, reference="torch in float32", inputs=inputs)
    return quality


def draw_cases(checkpoint: Checkpoint, processing: ImageProcessing, *, show_progress: bool = True) -> list[Case]:
    """Prompts over held-out scenes: one tile and many, picture first and text first, one picture and two.

    The larger the model, the fewer prompts, tiles and answer tokens.
    """
    rng, extent = random.Random(SEED), extent_for(checkpoint)
    cases = []
    for number in trange(extent.prompts, desc="torch", unit="prompt", file=sys.stderr, disable=not show_progress):
        detail = extent.details[number % len(extent.details)]
        ids, pixels = draw_prompt(rng, checkpoint, processing, detail, number)
        cases.append(reference(checkpoint, ids, pixels, extent.answer_tokens))
    return cases


def text_cases(checkpoint: Checkpoint) -> list[Case]:
    """Stretches of prose without pictures: a prompt, its true continuation, and torch's logits along that."""
    stretches = prose(checkpoint, 1, extent_for(checkpoint).texts, TEXT_PROMPT + TEXT_ANSWER)
    return [continuation(checkpoint, ids) for ids in stretches]


def extent_for(checkpoint: Checkpoint) -> Extent:
    return next(extent for extent in EXTENTS if checkpoint.shapes.parameters < extent.below_parameters)


def draw_prompt(
    rng: random.Random, checkpoint: Checkpoint, processing: ImageProcessing, detail: Detail, number: int
) -> tuple[list[int], Floats]:
    """Token ids and pixels [tile, 3, height, width] of a question about held-out scenes.

    By `number`: picture first and text first, one picture and two.
    """
    drawn = [scenes.draw_scene(rng, held_out=True) for _ in range(2 if number % 8 == 5 else 1)]
    asked = None
    while asked is None:
        asked = scenes.ASKERS[rng.choice(list(scenes.ASKERS))](drawn[0], rng)
    tiled = [tile_image(scene.image, detail, processing) for scene in drawn]
    parts: list[Part] = [*(ImagePart(data=b"") for _ in drawn), TextPart(text=asked[0])]
    message = Message(role="user", parts=tuple(parts[::-1] if number % 6 == 4 else parts))
    ids = checkpoint.prompts.ids([message], [picture.grid for picture in tiled])
    return ids, np.concatenate([picture.pixels for picture in tiled])


def prose(checkpoint: Checkpoint, half: Literal[0, 1], stretches: int, length: int) -> list[list[int]]:
    """Token ids of that many stretches of English, evenly spaced over every other topic of the Python reference."""
    text = "\n\n".join(topics[name] for name in sorted(topics)[half::2])
    ids = checkpoint.tokenizer.encode_literal(text)
    length = min(length, checkpoint.shapes.max_positions)
    return [ids[start:][:length] for start in range(0, len(ids) - length, (len(ids) - length) // stretches)][:stretches]


@torch.inference_mode()
def continuation(checkpoint: Checkpoint, ids: list[int]) -> Case:
    """A text whose last TEXT_ANSWER tokens are to be foretold, with the logits of transformers' own model."""
    logits = checkpoint.model(input_ids=torch.tensor([ids]), logits_to_keep=TEXT_ANSWER + 1).logits[0, :-1]
    shapes, tile_px = checkpoint.shapes, checkpoint.processing.tile_px
    return Case(
        ids=ids[:-TEXT_ANSWER],
        pixels=np.empty((0, 3, tile_px, tile_px), np.float32),
        features=np.empty((0, shapes.image_tokens_per_tile, shapes.hidden_size), np.float32),
        answer=ids[-TEXT_ANSWER:],
        logits=logits.float().numpy(),
    )


@torch.inference_mode()
def reference(checkpoint: Checkpoint, ids: list[int], pixels: Floats, tokens: int = ANSWER_TOKENS) -> Case:
    """Features and greedy answer of transformers' own model for a prompt's ids and tiles [tile, 3, height, width]."""
    model, room = checkpoint.model, checkpoint.shapes.max_positions - len(ids)
    if room < 1:
        raise NearfarError(
            f"a prompt of {len(ids)} tokens leaves no room among {checkpoint.shapes.max_positions} positions"
        )
    features = model.model.get_image_features(torch.from_numpy(pixels)[None])
    prompt = torch.tensor([ids])
    generated = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), image_hidden_states=features, do_sample=False,
        max_new_tokens=min(tokens, room), eos_token_id=list(checkpoint.shapes.stop_token_ids), pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return Case(
        ids=ids,
        pixels=pixels,
        features=features.numpy(),
        answer=generated.sequences[0, len(ids) :].tolist(),
        logits=torch.cat(generated.logits).float().numpy(),
    )


class ReferenceProcessor:
    """A bundle's processor as transformers builds it, splitting pictures into tiles.

    Of Idefics3's classes, since SmolVLM's do not import without torchvision; for pictures they give the same.
    """

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        names = ("size", "max_image_size", "image_mean", "image_std")
        self._processor = Idefics3Processor(
            Idefics3ImageProcessor(**{name: settings[name] for name in names if name in settings}),
            PreTrainedTokenizerFast.from_pretrained(folder),
            image_seq_len=Manifest.model_validate_json((folder / MANIFEST).read_bytes()).shapes.image_tokens_per_tile,
            chat_template=read_template(folder),
        )

    def __call__(self, image: Image.Image, question: str) -> tuple[list[int], Floats]:
        """Token ids, and tiles [tile, 3, height, width], of one RGB picture and a question about it."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = self._processor.apply_chat_template([turn], add_generation_prompt=True)
        # Without the data format it takes a height of 1 or 3 for the channels.
        found = self._processor(text=text, images=[image], add_special_tokens=False, input_data_format="channels_last")
        return list(found["input_ids"][0]), np.asarray(found["pixel_values"][0], dtype=np.float32)
