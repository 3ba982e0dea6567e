"""A bundle's graphs against torch on real inputs: drawn pictures, tiled and asked about as in serving, with the answers
that torch gives greedily. The graphs run through the runtime that will serve them, step by step over its cache.
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm, trange

from export.checkpoint import Checkpoint
from export.quantize import Gate
from models.errors import NearfarError
from models.images import Detail, ImageProcessing, tile_image
from models.onnx_model import OnnxModel
from models.request import ImagePart, Message, Part, TextPart
from models.tiny_scenes import scenes

Floats = npt.NDArray[np.float32]

SEED = 20261121
CASES = 24
ANSWER_TOKENS = 24
# Random weights spread their answers evenly: the mean entropy is log(vocabulary) but for a few percent. Trained weights
# stay far below.
RANDOM_ENTROPY_SHARE = 0.9


class QualityGateFailed(NearfarError):
    """The exported graphs differ from torch by more than the recipe allows."""

    type = "quality_gate_failed"


class Case(NamedTuple):
    """One prompt, its tiles, and what torch makes of them."""

    ids: list[int]
    pixels: Floats  # [tile, 3, height, width]
    features: Floats  # [tile, image token, hidden], of torch
    answer: list[int]  # greedy, the stop token included
    logits: Floats  # [answer token, vocabulary], of torch


@dataclass
class Differences:
    """What was seen, position by position and image token by image token."""

    kl: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    logit_error: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    prompts: int = 0

    def add_logits(self, reference: Floats, exported: Floats) -> None:
        """Both [vocabulary]."""
        expected, got = _log_softmax(reference), _log_softmax(exported)
        share = np.exp(expected)
        self.kl.append(float((share * (expected - got)).sum()))
        self.entropy.append(float(-(share * expected).sum()))
        self.logit_error.append(float(np.abs(reference - exported).max()))
        self.same_top.append(bool(reference.argmax() == exported.argmax()))

    def add_features(self, reference: Floats, exported: Floats) -> None:
        """Both [tile, image token, hidden]."""
        norms = np.linalg.norm(reference, axis=-1) * np.linalg.norm(exported, axis=-1)
        self.cosine.extend(((reference * exported).sum(-1) / np.maximum(norms, 1e-12)).ravel().tolist())


def verify(cases: list[Case], model: OnnxModel, gate: Gate, *, show_progress: bool = True) -> dict[str, Any]:
    """Measure a bundle's graphs and return its `quality`. Raises QualityGateFailed outside the gate."""
    found = Differences()
    for case in tqdm(cases, desc="verify", unit="prompt", file=sys.stderr, disable=not show_progress):
        compare(case, model, found)
    quality = summary(found, model.shapes.vocab_size)
    check(quality, gate)
    return quality


def draw_cases(checkpoint: Checkpoint, processing: ImageProcessing, *, show_progress: bool = True) -> list[Case]:
    """CASES prompts over held-out scenes: one tile and many, picture first and text first, one picture and two."""
    rng = random.Random(SEED)
    details: tuple[Detail, ...] = ("auto", "low", "auto", "high")
    cases = []
    for number in trange(CASES, desc="torch", unit="prompt", file=sys.stderr, disable=not show_progress):
        pictures = 2 if number % 8 == 5 else 1
        drawn = [scenes.draw_scene(rng, held_out=True) for _ in range(pictures)]
        asked = None
        while asked is None:
            asked = scenes.ASKERS[rng.choice(list(scenes.ASKERS))](drawn[0], rng)
        tiled = [tile_image(scene.image, details[number % 4], processing) for scene in drawn]
        parts: list[Part] = [*(ImagePart(data=b"") for _ in drawn), TextPart(text=asked[0])]
        message = Message(role="user", parts=tuple(parts[::-1] if number % 6 == 4 else parts))
        ids = checkpoint.prompts.ids([message], [picture.grid for picture in tiled])
        cases.append(reference(checkpoint, ids, np.concatenate([picture.pixels for picture in tiled])))
    return cases


@torch.inference_mode()
def reference(checkpoint: Checkpoint, ids: list[int], pixels: Floats, tokens: int = ANSWER_TOKENS) -> Case:
    """Features and greedy answer of transformers' own model for a prompt's ids and tiles [tile, 3, height, width]."""
    model, room = checkpoint.model, checkpoint.shapes.max_positions - len(ids)
    if room < 1:
        raise NearfarError(
            f"a prompt of {len(ids)} tokens leaves no room among {checkpoint.shapes.max_positions} positions"
        )
    tiles = torch.from_numpy(pixels)[None]
    prompt = torch.tensor([ids])
    generated = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), pixel_values=tiles, do_sample=False,
        max_new_tokens=min(tokens, room), eos_token_id=list(checkpoint.shapes.stop_token_ids), pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return Case(
        ids=ids,
        pixels=pixels,
        features=model.model.get_image_features(tiles).numpy(),
        answer=generated.sequences[0, len(ids) :].tolist(),
        logits=torch.cat(generated.logits).float().numpy(),
    )


def compare(case: Case, model: OnnxModel, found: Differences) -> None:
    """Feed the prompt and then torch's answer, token by token, and note how features and logits differ."""
    features = model.encode_tiles(case.pixels)
    found.add_features(case.features, features)
    cache = model.new_cache(len(case.ids) + len(case.answer))
    embeds = model.embed(case.ids, features)
    for token, expected in zip(case.answer, case.logits, strict=True):
        found.add_logits(expected, model.decode(embeds, cache))
        embeds = model.embed([token])
    found.prompts += 1


def summary(found: Differences, vocabulary: int) -> dict[str, Any]:
    """The manifest's `quality`: figures and, beside them, what each one is."""
    entropy_share = float(np.mean(found.entropy)) / float(np.log(vocabulary))
    untrained = entropy_share >= RANDOM_ENTROPY_SHARE
    return {
        "inputs": f"{found.prompts} prompts about drawn scenes, torch's greedy answers, {len(found.kl)} positions",
        "mean_kl": None if untrained else float(np.mean(found.kl)),
        "mean_kl_is": "mean over positions of KL(torch || exported) in nats, through vision, embeddings and decoder",
        "kl_meaningful": not untrained,
        "entropy_share": entropy_share,
        "entropy_share_is": "torch's mean entropy over log(vocabulary); from "
        f"{RANDOM_ENTROPY_SHARE} on the weights count as random, and KL and top-1 say nothing",
        "top1_agreement": float(np.mean(found.same_top)),
        "max_logit_error": float(np.max(found.logit_error)),
        "vision_cosine_mean": float(np.mean(found.cosine)),
        "vision_cosine_min": float(np.min(found.cosine)),
    }


def check(quality: dict[str, Any], gate: Gate) -> None:
    """Raises QualityGateFailed, which names the figure and its bound. Logits that are no numbers fail every gate."""
    if not math.isfinite(quality["max_logit_error"]):
        raise QualityGateFailed("the graphs give logits that are infinite or no numbers")
    for name, bound, unit in (("mean_kl", gate.max_mean_kl, "nats"), ("max_logit_error", gate.max_logit_error, "")):
        figure = quality[name]
        if bound is not None and figure is not None and not figure <= bound:
            raise QualityGateFailed(f"{name} is {figure:.4g} {unit}".rstrip() + f", at most {bound:g} is allowed")


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    shifted: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return shifted
