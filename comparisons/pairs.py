"""The same inputs through two targets: what each answer was worth, by how much they differ, and what that weighs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from comparisons.records import Record
from models.errors import InvalidValue, NotFound

Priority = Literal["quality", "reliability", "speed", "cost", "privacy"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
# Quality decides; each of the others is worth 5 or 10 points of it, which settles between targets almost alike.
DEFAULT_WEIGHTS: Mapping[Priority, float] = {
    "quality": 1.0,
    "reliability": 0.1,
    "speed": 0.05,
    "cost": 0.05,
    "privacy": 0.05,
}
MAX_WEIGHT = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One target's answer to one input. None: not measured, or there was nothing to measure.

    `score` is 0 where a target failed on an input that has a reference, and None without a reference.
    """

    ok: bool
    score: float | None = None
    text: str | None = None
    total_ms: float | None = None
    usd: float | None = None
    left_device: bool | None = None
    confidence: float | None = None
    error_type: str | None = None
    finish_reason: str | None = None
    load_ms: float | None = None
    model_bytes: int | None = None
    destination: str | None = None
    ttft_ms: float | None = None
    bytes_sent: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    cache_saved_usd: float | None = None
    process_peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One input and what both targets made of it. `slices` are the groups it counts in, such as `task=vqa`."""

    input_id: str
    first: Outcome
    second: Outcome
    slices: tuple[str, ...] = ()


def outcome(result: Mapping[str, Any], *, has_reference: bool) -> Outcome:
    """An arm's object of `POST /compare`, as records keep it."""
    if not result["ok"]:
        return Outcome(ok=False, score=0.0 if has_reference else None, error_type=result["error"]["type"])
    timings, correct, usage = result["timings"], result.get("correct"), result.get("usage", {})
    told = result.get("score", None if correct is None else float(correct))  # older records have `correct` alone
    repeated = (result.get("repeats") or {}).get("score")
    return Outcome(
        ok=True,
        score=(repeated["mean"] if repeated else told) if has_reference else None,
        text=result["text"],
        total_ms=None if result["contended"] else timings["total_ms"],
        usd=result["cost"]["usd"],
        left_device=result["egress"]["left_device"],
        confidence=result.get("confidence"),
        finish_reason=result["finish_reason"],
        load_ms=timings.get("load_ms"),
        model_bytes=result["memory"]["model_bytes"],
        destination=result["egress"]["destination"],
        ttft_ms=None if result["contended"] else timings.get("ttft_ms"),
        bytes_sent=result["egress"].get("bytes_sent"),
        prompt_tokens=usage.get("prompt_tokens"),
        cached_tokens=usage.get("cached_tokens"),
        cache_saved_usd=usage.get("cache_saved_usd"),
        process_peak_bytes=result["memory"].get("process_peak_bytes"),
    )


def pairs_of(records: Sequence[Record], first: str, second: str) -> list[Pair]:
    """Of the records that have both targets, in their order. Sides that are hidden until a vote stay so."""
    found = []
    for record in records:
        arms = {arm.target: arm.result for arm in record.arms}
        if first in arms and second in arms and not record.is_hidden():
            marked = bool(record.reference and record.reference.strip())
            sides = [outcome(arms[target], has_reference=marked) for target in (first, second)]
            slices = (f"task={record.task}",)
            found.append(Pair(input_id=record.input.sha256, first=sides[0], second=sides[1], slices=slices))
    return found


def most_compared(records: Sequence[Record]) -> tuple[str, str]:
    """The two targets that were asked the most together, a local and a hosted one before two of a kind.

    Raises NotFound where no record has two targets.
    """
    count: Counter[tuple[str, str]] = Counter()
    for record in records:
        if not record.is_hidden():
            count.update(combinations(sorted(arm.target for arm in record.arms), 2))
    if not count:
        raise NotFound("there is no comparison of two targets", param="targets")
    first, second = max(count, key=lambda pair: (is_local(pair[0]) != is_local(pair[1]), count[pair]))
    return (second, first) if is_local(second) and not is_local(first) else (first, second)


def is_local(target: str) -> bool:
    """By its name."""
    return target.startswith("local/")


def is_meant(target: str, name: str) -> bool:
    """Whether a target goes by that name: `local/` and `@recipe` may be dropped."""
    short = target.removeprefix("local/")
    return name == target or (
        target.startswith("local/") and name in (short, short.partition("@")[0], target.partition("@")[0])
    )


def parse_weights(text: str) -> dict[Priority, float]:
    """`quality=1,cost=0.2` as weights of all priorities: those not named keep their own. Raises InvalidValue."""
    given: dict[str, float] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, _, value = part.partition("=")
        try:
            given[name.strip()] = float(value)
        except ValueError as error:
            raise InvalidValue(f"weights: quality=1,cost=0.2 and such, got {part[:60]!r}", param="weights") from error
    return checked_weights(given)


def checked_weights(given: Mapping[str, float]) -> dict[Priority, float]:
    """All priorities' weights. Raises InvalidValue for an unknown name, a negative or NaN weight, or none above 0."""
    for name, weight in given.items():
        if name not in PRIORITIES:
            names = ", ".join(PRIORITIES)
            raise InvalidValue(f"weights: there is no priority {name[:60]!r}, only {names}", param="weights")
        if not 0 <= weight <= MAX_WEIGHT:
            raise InvalidValue(f"weights: {name} must be 0 to {MAX_WEIGHT:,}, got {weight}", param="weights")
    whole = {name: float(given.get(name, weight)) for name, weight in DEFAULT_WEIGHTS.items()}
    if not any(whole.values()):
        raise InvalidValue("weights: one at least must be above 0", param="weights")
    return whole


def differences(first: Outcome, second: Outcome) -> dict[Priority, float | None]:
    """By how much the second is better, from -1 to 1 for each priority; None where a figure is missing.

    quality: its score less the first's. reliability: 1 for an answer, 0 for a failure, less the first's. speed and
    cost: (the first's - its own) / their sum, of milliseconds in all and of dollars. privacy: 1 where the first's input
    alone left the device, -1 where its own did.
    """
    quality = None if first.score is None or second.score is None else second.score - first.score
    privacy = None
    if first.left_device is not None and second.left_device is not None:
        privacy = float(first.left_device - second.left_device)
    return {
        "quality": quality,
        "reliability": float(second.ok - first.ok),
        "speed": _relative(first.total_ms, second.total_ms),
        "cost": _relative(first.usd, second.usd),
        "privacy": privacy,
    }


def weighed(parts: Mapping[Priority, float | None], weights: Mapping[Priority, float]) -> float:
    """The differences as one, from -1 to 1. What is missing says nothing for either side."""
    return sum(weights[name] * (part or 0.0) for name, part in parts.items()) / sum(weights.values())


def once_each(pairs: Iterable[Pair]) -> list[Pair]:
    """Of each input the first with a reference, else the first: asked again, the same input is no new sample."""
    found: dict[str, Pair] = {}
    for pair in pairs:
        known = found.get(pair.input_id)
        if known and known.first.score is None and pair.first.score is not None:
            del found[pair.input_id]  # it counts from now on, in its place among those that came since
        found.setdefault(pair.input_id, pair)
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a route would have done: the near target first, the other where its confidence is below a threshold.

    Each input's threshold was the best one for the inputs before it, so that none is judged by what it helped to
    choose. `over_near` and `over_far` are the weighed differences, in the order of the inputs; `asked_far` is the share
    that the latest threshold would send on.
    """

    threshold: float
    asked_far: float
    over_near: tuple[float, ...]
    over_far: tuple[float, ...]


THRESHOLDS = np.linspace(0.0, 1.0, 21)


def routing(pairs: Sequence[tuple[Outcome, Outcome]], weights: Mapping[Priority, float]) -> Routing | None:
    """Of pairs (near, far). None where no answer of the near target has a confidence."""
    if all(near.confidence is None for near, _ in pairs):
        return None
    kept = np.array([weighed(differences(far, near), weights) for near, far in pairs])  # over far; over near it is 0
    sent = [_sent_on(near, far) for near, far in pairs]
    sent_over_near = np.array(
        [weighed(differences(near, on), weights) for (near, _), on in zip(pairs, sent, strict=True)]
    )
    sent_over_far = np.array([weighed(differences(far, on), weights) for (_, far), on in zip(pairs, sent, strict=True)])
    confidence = np.array([near.confidence if near.ok and near.confidence is not None else -1.0 for near, _ in pairs])
    keeps = confidence >= THRESHOLDS[:, None]  # [threshold, input]
    over_near = np.where(keeps, 0.0, sent_over_near)
    over_far = np.where(keeps, kept, sent_over_far)
    gained: NDArray[np.float64] = np.cumsum(over_near + over_far, axis=1)
    best = np.concatenate([[len(THRESHOLDS) // 2], gained.argmax(axis=0)])  # before the first input, the middle one
    at = np.arange(len(pairs))
    return Routing(
        threshold=float(THRESHOLDS[best[-1]]),
        asked_far=float(1 - keeps[best[-1]].mean()),
        over_near=tuple(over_near[best[:-1], at].tolist()),
        over_far=tuple(over_far[best[:-1], at].tolist()),
    )


def _sent_on(near: Outcome, far: Outcome) -> Outcome:
    """The far target's answer, paid and waited for on top of the near one's."""
    return Outcome(
        ok=far.ok,
        score=far.score,
        total_ms=_sum(near.total_ms, far.total_ms),
        usd=_sum(near.usd, far.usd),
        left_device=None if far.left_device is None else bool(far.left_device or near.left_device),
    )


def _sum(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left + right


def _relative(first: float | None, second: float | None) -> float | None:
    if first is None or second is None:
        return None
    return (first - second) / (first + second) if first + second > 0 else 0.0
