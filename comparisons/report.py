"""The figures of a report: of each target, of each slice and of each severity, every one with its n and interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from comparisons.corruptions import KINDS
from comparisons.evidence import Case, Evidence
from comparisons.measures import distinct
from comparisons.pairs import Outcome, Pair
from comparisons.statistics import Interval, bootstrap_mean, mean_score, median_interval, spread, wilson

CORRUPTION = "corruption="  # what the slices of corrupted rows begin with


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Of `n` inputs. The bounds are of a 95 % interval; None where there are too few, or all are equal."""

    n: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class TargetFigures:
    """One target on the inputs that it was asked, those with corrupted pictures left out. None: nothing was measured.

    Times, dollars and bytes are of the first asking of each input. `accuracy` and `score` are of `Figure.n` inputs with
    a reference. `total_ms_p95` is None below 20. `left`: of how many inputs something left the device.
    """

    target: str
    inputs: int
    failed: int
    accuracy: Figure | None
    score: Figure | None
    total_ms: Figure | None
    total_ms_p95: float | None
    ttft_ms: Figure | None
    usd_per_1000: Figure | None
    bytes_sent: Figure | None
    left: int


@dataclass(frozen=True, kw_only=True)
class Severity:
    """How one target did on pictures that are so much worse; 0: on the same pictures as they are."""

    kind: str
    severity: int
    target: str
    accuracy: Figure


def figures(target: str, cases: Iterable[Case]) -> TargetFigures:
    """Of a target over the inputs that it was asked."""
    asked = [case for case in cases if not case.is_corrupted and case.answers.get(target)]
    firsts = [case.answers[target][0] for case in asked]
    scores = [fmean(each.score or 0.0 for each in case.answers[target]) for case in asked if case.references]
    of_scores = mean_score(scores)
    total = _measured(firsts, lambda each: each.total_ms)
    times = spread(total)
    return TargetFigures(
        target=target,
        inputs=len(asked),
        failed=sum(not each.ok for each in firsts),
        accuracy=accuracy(target, asked),
        score=Figure(n=of_scores.n, value=of_scores.mean, low=of_scores.low, high=of_scores.high)
        if of_scores
        else None,
        total_ms=_median(total),
        total_ms_p95=times.p95 if times else None,
        ttft_ms=_median(_measured(firsts, lambda each: each.ttft_ms)),
        usd_per_1000=_mean([1000 * usd for usd in _measured(firsts, lambda each: each.usd)]),
        bytes_sent=_mean(_measured(firsts, lambda each: each.bytes_sent)),
        left=sum(bool(each.left_device) for each in firsts),
    )


def accuracy(target: str, cases: Iterable[Case]) -> Figure | None:
    """The share of inputs with a reference that were answered right; asked several times, one counts by its mean."""
    judged = [case.answers[target] for case in cases if case.references and case.answers.get(target)]
    if not judged:
        return None
    found = wilson(sum(fmean(each.score == 1.0 for each in given) for given in judged), len(judged))
    return Figure(n=len(judged), value=found.value, low=found.low, high=found.high)


def severities(evidence: Evidence) -> list[Severity]:
    """Accuracy against severity, by kind, severity and target. Empty where no row was corrupted."""
    found = []
    for kind in KINDS:
        prefix = f"{CORRUPTION}{kind}-"
        by_level: dict[int, list[Case]] = {}
        for case in evidence.cases:
            for name in case.slices:
                if name.startswith(prefix):
                    by_level.setdefault(int(name.removeprefix(prefix)), []).append(case)
        if by_level:
            by_level[0] = [case for case in evidence.cases if not case.is_corrupted]
        for level in sorted(by_level):
            for target in evidence.targets:
                if (share := accuracy(target, by_level[level])) is not None:
                    found.append(Severity(kind=kind, severity=level, target=target, accuracy=share))
    return found


def slices(evidence: Evidence) -> Mapping[str, Mapping[str, Figure]]:
    """Accuracy by slice and target, without the corrupted rows."""
    members: dict[str, list[Case]] = {}
    for case in evidence.cases:
        for name in () if case.is_corrupted else case.slices:
            if not name.startswith(CORRUPTION):
                members.setdefault(name, []).append(case)
    found: dict[str, dict[str, Figure]] = {}
    for name, inside in sorted(members.items()):
        shares = {target: accuracy(target, inside) for target in evidence.targets}
        known = {target: share for target, share in shares.items() if share is not None}
        if known:
            found[name] = known
    return found


def pairs(evidence: Evidence, first: str, second: str) -> list[Pair]:
    """What both were asked, corrupted pictures left out, in the order in which it came."""
    return [
        Pair(input_id=case.case_id, first=case.answers[first][0], second=case.answers[second][0], slices=case.slices)
        for case in evidence.cases
        if not case.is_corrupted and case.answers.get(first) and case.answers.get(second)
    ]


def differs(case: Case) -> bool:
    """Whether the targets' first answers differ in more than form, or one failed where another did not."""
    firsts = [given[0] for given in case.answers.values()]
    texts = [each.text or "" for each in firsts if each.ok]
    return len(distinct(texts)) > 1 or 0 < len(texts) < len(firsts)


def chosen(cases: Sequence[Case], most: int) -> list[Case]:
    """At most so many: those on which the targets differ, then the others, corrupted ones last; each in its order."""
    return sorted(cases, key=lambda case: (not differs(case), case.is_corrupted))[:most]


def _measured(outcomes: Iterable[Outcome], of: Callable[[Outcome], float | None]) -> list[float]:
    return [value for each in outcomes if each.ok and (value := of(each)) is not None]


def _median(samples: Sequence[float]) -> Figure | None:
    return _figure(len(samples), median(samples), median_interval(samples)) if samples else None


def _mean(samples: Sequence[float]) -> Figure | None:
    return _figure(len(samples), fmean(samples), bootstrap_mean(samples)) if samples else None


def _figure(n: int, value: float, found: Interval | None) -> Figure:
    return Figure(n=n, value=value, low=found.low if found else None, high=found.high if found else None)
