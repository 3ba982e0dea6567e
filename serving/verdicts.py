"""A verdict over stored comparisons, and its object."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import asdict, replace
from typing import Any

from comparisons.decision import Decision, decide
from comparisons.formulas import FORMULAS
from comparisons.pairs import PRIORITIES, is_meant, most_compared, pairs_of, parse_weights
from comparisons.records import Record
from comparisons.store import Filter, Store
from models.errors import InvalidValue
from serving.api.schemas import tidy

TERMS = ("advantage", "at_all_times", "score_interval", "bootstrap", "mcnemar_p", "kappa", "tips_at", "more")
BILL = ("usd_month", "usd_per_right")
TWO_NAMES = "targets: two different names, comma-separated"


def decided(store: Store, where: Filter, *, targets: str | None, weights: str, volume: int) -> Decision:
    """From the records that fit, the oldest first; reads the store. Raises InvalidValue and NotFound.

    `targets`: two names, comma-separated; without them, the two that were asked the most together.
    """
    records = list(store.all(replace(where, hidden=False), whole=False))[::-1]  # or the figures would tell who is who
    return decided_of(records, targets=targets, weights=weights, volume=volume)


def decided_of(records: Sequence[Record], *, targets: str | None, weights: str, volume: int) -> Decision:
    """The same from records that were read already, without those that are to be voted on."""
    weighs = parse_weights(weights)
    known = {arm.target for record in records for arm in record.arms}
    first, second = two_of(targets, known) or most_compared(records)
    return decide(pairs_of(records, first, second), first, second, weights=weighs, volume=volume)


def two_of(targets: str | None, known: Set[str]) -> tuple[str, str] | None:
    """The whole names of two targets, comma-separated. None where none are named. Raises InvalidValue."""
    if not targets:
        return None
    named = [_full(name.strip(), known) for name in targets.split(",") if name.strip()]
    if len(named) != 2 or named[0] == named[1]:
        raise InvalidValue(TWO_NAMES, param="targets")
    return named[0], named[1]


def _full(name: str, known: Set[str]) -> str:
    """A target's whole name, where `local/` or `@recipe` were dropped and only one can be meant."""
    meant = [target for target in known if is_meant(target, name)]
    return meant[0] if len(meant) == 1 else name


def decision_object(decision: Decision) -> dict[str, Any]:
    """The object of `GET /verdict`."""
    words = {"text": decision.text, "reasons": list(decision.reasons), "dissent": list(decision.dissent)}
    facts: dict[str, Any] = tidy(asdict(decision))
    formulas = {name: FORMULAS[name] for name in (*PRIORITIES, *TERMS, *BILL)}
    return {"choice": facts.pop("choice"), "target": facts.pop("target"), **words, **facts, "formulas": formulas}
