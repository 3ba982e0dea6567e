"""What an evaluation came to: per target, per task and per slice, each figure with the number of rows behind it.

A row counts once: asked several times, by the mean of its answers, since a target's answers to one row are no new rows.
An error is an answer that is not right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from comparisons.dataset import Row
from comparisons.decision import VOLUME, Decision, decide
from comparisons.formulas import FORMULAS
from comparisons.measures import Agreement, agreements, field_shares
from comparisons.pairs import Outcome, Pair, Priority
from comparisons.run_file import Answered, Ask
from comparisons.statistics import Interval, Mean, Spread, mean_score, spread, wilson

FIGURES = ("accuracy", "score", "score_interval", "ttft_ms", "total_ms", "median", "p95", "usd", "bytes_sent", "kappa")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One target over some rows. None: there was nothing to measure, or it is not known.

    `n`: rows with a reference. `rows`: all that were asked. `changed`: of those asked again, how many were answered
    right at one time and not at another. `warm`: answers that read from a cache. `usd_known` leaves out what is not.
    """

    target: str
    rows: int
    answers: int
    errors: int
    n: int
    accuracy: Interval | None
    score: Mean | None
    changed: int
    warm: int
    at_once: int
    total_ms: Spread | None
    ttft_ms: Spread | None
    usd: float | None
    usd_known: float
    bytes_sent: int | None


@dataclass(frozen=True, kw_only=True)
class Scoreboard:
    """Every table of a run. `fields`: of JSON answers, right and asked by field and target.

    `decisions`: the first target against each of the others, on the rows that both were asked. Corrupted pictures do
    not count there: they are no inputs of their own. `agreements`: of every pair of targets, reference or not.
    """

    targets: tuple[Standing, ...]
    tasks: Mapping[str, tuple[Standing, ...]]
    slices: Mapping[str, tuple[Standing, ...]]
    fields: Mapping[str, Mapping[str, tuple[int, int]]]
    decisions: tuple[Decision, ...]
    agreements: tuple[Agreement, ...]

    def as_json(self) -> dict[str, Any]:
        """With intervals and percentiles by name; without the decisions."""
        return {
            "targets": [_as_json(each) for each in self.targets],
            "tasks": {name: [_as_json(each) for each in table] for name, table in self.tasks.items()},
            "slices": {name: [_as_json(each) for each in table] for name, table in self.slices.items()},
            "fields": {
                target: {name: {"right": right, "n": n} for name, (right, n) in shares.items()}
                for target, shares in self.fields.items()
            },
            "agreements": [each._asdict() for each in self.agreements],
            "formulas": {name: FORMULAS[name] for name in FIGURES},
        }


def scoreboard(
    rows: Sequence[Row],
    targets: Sequence[str],
    answers: Mapping[Ask, Answered],
    *,
    weights: Mapping[Priority, float] | None = None,
    volume: int = VOLUME,
) -> Scoreboard:
    """Of the answers to those rows, as many as there are yet. `weights`, `volume`: as `decide` takes them."""
    by_target: dict[str, dict[str, list[Answered]]] = {target: {} for target in targets}
    for ask, answered in answers.items():
        if ask.target in by_target:
            by_target[ask.target].setdefault(ask.row_id, []).append(answered)

    def table(chosen: Iterable[Row]) -> tuple[Standing, ...]:
        asked = list(chosen)
        return tuple(standing(target, asked, by_target[target]) for target in targets)

    return Scoreboard(
        targets=table(rows),
        tasks={name: table(chosen) for name, chosen in _grouped(rows, lambda row: [row.task]).items()},
        slices={name: table(chosen) for name, chosen in _grouped(rows, lambda row: row.slices).items()},
        fields={target: shares for target in targets if (shares := _fields(rows, by_target[target]))},
        decisions=tuple(
            decide(pairs, targets[0], second, weights=weights, volume=volume)
            for second, pairs in _pairs(rows, targets, answers).items()
        ),
        agreements=tuple(agreements({target: _texts(rows, target, answers) for target in targets})),
    )


def _texts(rows: Sequence[Row], target: str, answers: Mapping[Ask, Answered]) -> list[str | None]:
    given = [answers.get(Ask(row.row_id, target, 0)) for row in rows]
    return [answered.text if answered else None for answered in given]


def _pairs(rows: Sequence[Row], targets: Sequence[str], answers: Mapping[Ask, Answered]) -> dict[str, list[Pair]]:
    """The first target with each of the others, by the other's name, in the order in which the answers came."""
    clean = {row.row_id: row for row in rows if not row.is_corrupted}
    outcomes = {
        ask: outcome_of(answered, has_reference=bool(clean[ask.row_id].references))
        for ask, answered in answers.items()
        if ask.repeat == 0 and ask.row_id in clean
    }
    asked = list(dict.fromkeys(ask.row_id for ask in outcomes))
    first, *others = targets
    found = {}
    for second in others:
        both = [(row_id, outcomes.get(Ask(row_id, first, 0)), outcomes.get(Ask(row_id, second, 0))) for row_id in asked]
        pairs = [
            Pair(input_id=row_id, first=one, second=other, slices=clean[row_id].slices)
            for row_id, one, other in both
            if one and other
        ]
        if pairs:
            found[second] = pairs
    return found


def outcome_of(answered: Answered, *, has_reference: bool) -> Outcome:
    """An answer of a run's file, as a comparison's would be."""
    if answered.error is not None:
        return Outcome(ok=False, score=0.0 if has_reference else None, error_type=answered.error_type)
    return Outcome(
        ok=True,
        score=answered.score,
        text=answered.text,
        total_ms=answered.total_ms if answered.at_once == 1 else None,
        usd=answered.usd,
        left_device=answered.left_device,
        confidence=answered.confidence,
        finish_reason=answered.finish_reason,
        load_ms=answered.load_ms,
        model_bytes=answered.model_bytes,
        destination=answered.destination,
        ttft_ms=answered.ttft_ms if answered.at_once == 1 else None,
        bytes_sent=answered.bytes_sent,
        prompt_tokens=answered.prompt_tokens,
        cached_tokens=answered.cached_tokens,
        cache_saved_usd=answered.cache_saved_usd,
        process_peak_bytes=answered.process_peak_bytes,
    )


def standing(target: str, rows: Sequence[Row], answers: Mapping[str, Sequence[Answered]]) -> Standing:
    """One target over those rows that it was asked. `answers`: by the row's id."""
    asked = [(row, answers[row.row_id]) for row in rows if answers.get(row.row_id)]
    every = [answered for _, given in asked for answered in given]
    judged = [given for row, given in asked if row.references]
    right = sum(_mean(float(answered.correct or False) for answered in given) for given in judged)
    costs = [answered.usd for answered in every]
    sent = [answered.bytes_sent for answered in every]
    done = [answered for answered in every if answered.error is None]
    return Standing(
        target=target,
        rows=len(asked),
        answers=len(every),
        errors=len(every) - len(done),
        n=len(judged),
        accuracy=wilson(right, len(judged)) if judged else None,
        score=mean_score([_mean(answered.score or 0.0 for answered in given) for given in judged]),
        changed=sum(len({answered.correct for answered in given}) > 1 for given in judged),
        warm=sum(bool(answered.cached_tokens) for answered in done),
        at_once=max((answered.at_once for answered in every), default=1),
        total_ms=spread([answered.total_ms for answered in done if answered.total_ms is not None]),
        ttft_ms=spread([answered.ttft_ms for answered in done if answered.ttft_ms is not None]),
        usd=sum(cost for cost in costs if cost is not None) if costs and None not in costs else None,
        usd_known=sum(cost for cost in costs if cost is not None),
        bytes_sent=sum(size for size in sent if size is not None) if sent and None not in sent else None,
    )


def _grouped(rows: Iterable[Row], names: Callable[[Row], Sequence[str]]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        for name in names(row):
            found.setdefault(name, []).append(row)
    return dict(sorted(found.items()))


def _fields(rows: Sequence[Row], answers: Mapping[str, Sequence[Answered]]) -> dict[str, tuple[int, int]]:
    scores = [
        row.score(answered.text or "")
        for row in rows
        if row.measure == "json" and row.references
        for answered in answers.get(row.row_id, ())
    ]
    return field_shares(score for score in scores if score)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _as_json(standing: Standing) -> dict[str, Any]:
    intervals = {"accuracy": standing.accuracy._asdict() if standing.accuracy else None}
    return {**asdict(standing), **intervals}
