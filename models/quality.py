"""How far one set of graphs lies from another, in figures, and what each recipe may lose.

NumPy alone: the export compares with torch, `nearfar verify` with the float32 graphs of the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from models.errors import NearfarError
from models.onnx_model import OnnxModel

Floats = npt.NDArray[np.float32]

# Random weights spread their answers evenly: the mean entropy is log(vocabulary) but for a few percent. Trained weights
# stay far below.
RANDOM_ENTROPY_SHARE = 0.9


class QualityGateFailed(NearfarError):
    """The graphs differ from the reference by more than the recipe allows."""

    type = "quality_gate_failed"


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a bundle must reach. None: not asked of this recipe."""

    max_mean_kl: float | None = None
    max_logit_error: float | None = None
    min_vision_cosine: float | None = None  # mean over image tokens


# By recipe; what stands in no row has the widest bound.
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


class Case(NamedTuple):
    """One prompt, its tiles, and what the reference makes of them."""

    ids: list[int]
    pixels: Floats  # [tile, 3, height, width]
    features: Floats  # [tile, image token, hidden], of the reference
    answer: list[int]  # greedy, the stop token included
    logits: Floats  # [answer token, vocabulary], of the reference


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
        expected, got = log_softmax(reference), log_softmax(exported)
        share = np.exp(expected)
        self.kl.append(float((share * (expected - got)).sum()))
        self.entropy.append(float(-(share * expected).sum()))
        self.logit_error.append(float(np.abs(reference - exported).max()))
        self.same_top.append(bool(reference.argmax() == exported.argmax()))

    def add_features(self, reference: Floats, exported: Floats) -> None:
        """Both [tile, image token, hidden]."""
        self.cosine.extend(cosines(reference, exported).ravel().tolist())


def compare(case: Case, model: OnnxModel, found: Differences) -> None:
    """Feed the prompt and then the reference's answer, token by token, and note how features and logits differ."""
    features = model.encode_tiles(case.pixels) if len(case.pixels) else None
    if features is not None:
        found.add_features(case.features, features)
    cache = model.new_cache(len(case.ids) + len(case.answer))
    embeds = model.embed(case.ids, features)
    for token, expected in zip(case.answer, case.logits, strict=True):
        found.add_logits(expected, model.decode(embeds, cache))
        embeds = model.embed([token])
    found.prompts += 1


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
