"""What a model is checked on, how far one set of graphs lies from another, and what each recipe may lose.

NumPy alone: the export compares with torch, `nearfar verify` with the float32 graphs of the same weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from models.errors import NearfarError
from models.images import Detail
from models.onnx_model import OnnxModel

SPECIMENS_FOLDER, REPORTS = Path(__file__).parent / "specimens", Path(__file__).parent / "reports"
Floats = npt.NDArray[np.float32]

# Random weights spread their answers evenly: the mean entropy is log(vocabulary) but for a few percent. Trained weights
# stay far below.
RANDOM_ENTROPY_SHARE = 0.9


class Specimen(NamedTuple):
    """One picture, the question about it, and how finely it is cut."""

    file: str
    question: str
    detail: Detail = "auto"

    def read(self) -> bytes:
        return (SPECIMENS_FOLDER / self.file).read_bytes()


# In the order in which a check that has little time takes them: unlike ones first.
SPECIMENS = tuple(Specimen(**row) for row in json.loads((SPECIMENS_FOLDER / "questions.json").read_text()))


def prose() -> str:
    """About 200 words of plain English prose, on one line."""
    return " ".join((SPECIMENS_FOLDER / "text.txt").read_text(encoding="utf-8").split())


class QualityGateFailed(NearfarError):
    """The graphs differ from the reference by more than the recipe allows."""

    type = "quality_gate_failed"


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a bundle must reach. None: not asked of this recipe."""

    max_mean_kl: float | None = None
    max_logit_error: float | None = None
    min_vision_cosine: float | None = None  # mean over image tokens


# By recipe. `gate_of` gives the last row to what stands in none: files that somebody else has quantized.
GATES: Mapping[str, Gate] = MappingProxyType(
    {
        "fp32": Gate(max_logit_error=1e-3),
        "fp16": Gate(max_mean_kl=0.005),
        "int8": Gate(max_mean_kl=0.02, min_vision_cosine=0.999),
        "int8-fast": Gate(max_mean_kl=0.10, min_vision_cosine=0.999),
        "auto": Gate(max_mean_kl=0.10, min_vision_cosine=0.999),
        "int4": Gate(max_mean_kl=0.20, min_vision_cosine=0.999),
    }
)


# From the one that loses most to the one that loses nothing.
BY_SAFETY = ("q4", "q4f16", "int4", "auto", "int8-fast", "quantized", "int8", "fp16", "fp32")


def safer_recipes(recipe: str) -> tuple[str, ...]:
    """What to take instead where a recipe fails, the nearest first."""
    return BY_SAFETY[BY_SAFETY.index(recipe) + 1 :] if recipe in BY_SAFETY else ("int8", "fp16", "fp32")


def gate_of(recipe: str) -> Gate:
    """The bounds of a recipe; those of `int4` for a recipe that is not of this project's making."""
    return GATES.get(recipe, GATES["int4"])


class Case(NamedTuple):
    """One prompt, its tiles, and what a model makes of them. Text alone has no tile and no features."""

    ids: list[int]
    pixels: Floats  # [tile, 3, height, width]
    features: Floats  # [tile, image token, hidden]
    answer: list[int]  # greedy with the stop token, or what was fed
    logits: Floats  # [answer token, vocabulary]


NO_PIXELS, NO_FEATURES = np.empty((0, 3, 1, 1), np.float32), np.empty((0, 1, 1), np.float32)


@dataclass
class Differences:
    """What was seen, position by position and image token by image token."""

    kl: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    logit_error: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    prompts: int = 0

    def add(self, reference: Case, exported: Case) -> None:
        """Two models' views of one prompt and one answer."""
        if len(reference.pixels):
            self.add_features(reference.features, exported.features)
        for expected, got in zip(reference.logits, exported.logits, strict=True):
            self.add_logits(expected, got)
        self.prompts += 1

    def add_logits(self, reference: Floats, exported: Floats) -> None:
        """Both [vocabulary]."""
        expected, got = log_softmax(reference), log_softmax(exported)
        share = np.exp(expected)
        self.kl.append(float((share * (expected - got)).sum()))
        self.entropy.append(float(-(share * expected).sum()))
        self.logit_error.append(float(np.abs(reference - exported).max()))
        self.same_top.append(bool(reference.argmax() == exported.argmax()))

    def add_features(self, reference: Floats, exported: Floats) -> None:
        """Both [tile, image token, hidden]."""
        self.cosine.extend(cosines(reference, exported).ravel().tolist())


def observe(
    model: OnnxModel, ids: Sequence[int], pixels: Floats, *, tokens: int = 0, forced: Sequence[int] = ()
) -> Case:
    """Features of the tiles, and logits along `forced`, or else along the greedy answer of at most `tokens`."""
    features = model.encode_tiles(pixels) if len(pixels) else NO_FEATURES
    length = min(len(forced) or tokens, model.shapes.max_positions - len(ids))
    cache = model.new_cache(len(ids) + length)
    embeds, rows = model.embed(ids, features if len(pixels) else None), []
    answer: list[int] = []
    while len(answer) < length:
        row = model.decode(embeds, cache)
        rows.append(row)
        answer.append(forced[len(answer)] if forced else int(row.argmax()))
        if not forced and answer[-1] in model.shapes.stop_token_ids:
            break
        embeds = model.embed(answer[-1:])
    return Case(list(ids), pixels, features, answer, np.stack(rows))


def compare(case: Case, model: OnnxModel, found: Differences) -> None:
    """Feed the prompt and then the case's answer, and note how features and logits differ."""
    found.add(case, observe(model, case.ids, case.pixels, forced=case.answer))


def surprise(case: Case) -> npt.NDArray[np.float64]:
    """-log p of each token of the continuation, in nats."""
    chosen: npt.NDArray[np.float64] = -log_softmax(case.logits)[np.arange(len(case.answer)), case.answer]
    return chosen


def summary(found: Differences, vocabulary: int, *, reference: str, inputs: str) -> dict[str, Any]:
    """Figures and, beside them, what each one is. `reference` and `inputs` name what was compared with, over what."""
    entropy_share = float(np.mean(found.entropy)) / float(np.log(vocabulary))
    untrained = entropy_share >= RANDOM_ENTROPY_SHARE
    figures = {
        "inputs": f"{found.prompts} prompts about {inputs}, {len(found.kl)} positions",
        "mean_kl": None if untrained else float(np.mean(found.kl)),
        "mean_kl_is": f"mean over positions of KL({reference} || exported) in nats, through all graphs used",
        "kl_meaningful": not untrained,
        "entropy_share": entropy_share,
        "entropy_share_is": f"{reference}'s mean entropy over log(vocabulary); from "
        f"{RANDOM_ENTROPY_SHARE} on the weights count as random, and KL and top-1 say nothing",
        "top1_agreement": float(np.mean(found.same_top)),
        "max_logit_error": float(np.max(found.logit_error)),
    }
    if found.cosine:
        figures |= {
            "vision_cosine_mean": float(np.mean(found.cosine)),
            "vision_cosine_min": float(np.min(found.cosine)),
        }
    return figures


def check(quality: Mapping[str, Any], gate: Gate) -> None:
    """Raises QualityGateFailed, which names the figure and its bound. Logits that are no numbers fail every gate.

    Figures over text alone, where there are any, stand under `text` and pass the same gate.
    """
    if not math.isfinite(quality["max_logit_error"]):
        raise QualityGateFailed("the graphs give logits that are infinite or no numbers")
    for name, bound, unit in (("mean_kl", gate.max_mean_kl, "nats"), ("max_logit_error", gate.max_logit_error, "")):
        figure = quality[name]
        if bound is not None and figure is not None and not figure <= bound:
            raise QualityGateFailed(f"{name} is {figure:.4g} {unit}".rstrip() + f", at most {bound:g} is allowed")
    cosine, least = quality.get("vision_cosine_mean"), gate.min_vision_cosine
    if cosine is not None and least is not None and quality["kl_meaningful"] and not cosine >= least:
        raise QualityGateFailed(f"vision_cosine_mean is {cosine:.6g}, at least {least:g} is asked for")
    if "text" in quality:
        check(quality["text"], gate)


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    shifted: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return shifted


def cosines(reference: Floats, exported: Floats) -> npt.NDArray[np.float64]:
    """Along the last axis of two equal shapes, in float64."""
    first, second = reference.astype(np.float64), exported.astype(np.float64)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    found: npt.NDArray[np.float64] = (first * second).sum(-1) / np.maximum(norms, 1e-12)
    return found


def published_reports(hub_id: str | None, folder: Path = REPORTS) -> list[dict[str, Any]]:
    """What `nearfar verify` found on a repository's weights: whole verifications of a commit, against fp32, passed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [
        {"recipe": each["recipe"], "revision": each["source"]["revision"], "made": each["made"]}
        for each in found
        if each["source"]["name"] == hub_id and each["source"]["revision"]
        and each["passed"] and each["reference"] and not each["quick"]
    ]  # fmt: skip
