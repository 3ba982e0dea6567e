"""What so many samples tell: intervals, paired tests, and decisions that may be looked at after every record.

NumPy alone. Everything random has a seed, so that the same records give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist, median
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 4000
LEAST_FOR_BOOTSTRAP = 8  # below it, resampling repeats the few samples' own accident
MAX_STAKE = 0.75  # of the wealth in one bet; all of it could be lost for good
GRID = np.linspace(-1.0, 1.0, 401)  # the means that a confidence sequence tries, 0 among them
HORIZON = 5000  # how many more records are imagined before it is given up
_FUTURES = 100
_AT_ONCE = 1_000_000  # numbers in one piece of a large calculation
_SEED = 20_240_001
_Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate between the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of `n` samples. A percentile is the nearest rank's, and None where not even one sample lies beyond it."""

    n: int
    median: float
    min: float
    max: float
    p90: float | None  # from 10 samples on
    p95: float | None  # from 20
    p99: float | None  # from 100


def spread(samples: Sequence[float]) -> Spread | None:
    """How far the samples lie apart; None of none."""
    if not samples:
        return None
    ordered, n = sorted(samples), len(samples)

    def percentile(share: int) -> float | None:
        return ordered[math.ceil(n * share / 100) - 1] if n * (100 - share) >= 100 else None

    return Spread(
        n=n,
        median=median(ordered),
        min=ordered[0],
        max=ordered[-1],
        p90=percentile(90),
        p95=percentile(95),
        p99=percentile(99),
    )


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """The median between two of the samples, chosen by rank alone, whatever their distribution. None below 6 samples.

    As many of n samples lie below the true median as heads fall in n throws (Conover 1999, 3.2).
    """
    ordered, n, rank = sorted(samples), len(samples), 0
    ways = reached = 1  # of 2**n: that none lies below
    most = math.floor(Fraction((1 - confidence) / 2) * 2**n)  # from 1,024 samples on 2**n is no float any more
    while n and reached <= most:
        ways = ways * (n - rank) // (rank + 1)
        rank, reached = rank + 1, reached + ways
    return Interval(median(ordered), ordered[rank - 1], ordered[n - rank]) if rank else None


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """A share with Wilson's score interval (1927), which holds for few samples and near 0 and 1. `n` is at least 1."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def student_t(degrees: float, confidence: float = CONFIDENCE) -> float:
    """So many standard errors reach to either side of a mean, where the error itself is told from few samples.

    Student's quantile, by Abramowitz and Stegun's expansion (1964, 26.7.5): within 0.5 % from 4 degrees of freedom on.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def mcnemar(first_only: int, second_only: int) -> float:
    """The exact two-sided p-value of McNemar's test, from the questions that one of the two alone has right.

    Of those, each side would have half if the two were alike (McNemar 1947, the binomial test). For a number of
    questions that was fixed before the first was looked at.
    """
    n = first_only + second_only
    tail = sum(math.comb(n, k) for k in range(min(first_only, second_only) + 1))
    return min(1.0, float(2 * tail / 2**n))


def bootstrap_mean(samples: ArrayLike, confidence: float = CONFIDENCE) -> Interval | None:
    """A mean with its bias-corrected and accelerated bootstrap interval (Efron 1987), for a number fixed ahead.

    Of paired differences it is the interval on the difference. None below 8 samples, or where all are equal: then
    resampling cannot tell how far off they are.
    """
    values = np.asarray(samples, dtype=np.float64)
    n = len(values)
    if n < LEAST_FOR_BOOTSTRAP or np.ptp(values) == 0:
        return None
    rng = np.random.default_rng(_SEED)
    # How often each value is drawn: the same as drawing samples, and quick where few values are different.
    different, counts = np.unique(values, return_counts=True)
    drawn = (rng.multinomial(n, counts / n, size=size) for size in _batches(len(different)))
    means = np.concatenate([batch @ different / n for batch in drawn])
    mean, normal = float(values.mean()), NormalDist()
    below = float(((means < mean).sum() + 0.5 * (means == mean).sum()) / len(means))
    bias = normal.inv_cdf(min(max(below, 1 / len(means)), 1 - 1 / len(means)))
    away = mean - values  # the jackknife's: leaving one out moves the mean by so much / (n - 1)
    acceleration = float((away**3).sum() / (6 * (away**2).sum() ** 1.5))

    def bound(share: float) -> float:
        shifted = bias + normal.inv_cdf(share)
        return float(np.quantile(means, normal.cdf(bias + shifted / (1 - acceleration * shifted))))

    tail = (1 - confidence) / 2
    return Interval(mean, bound(tail), bound(1 - tail))


def _batches(width: int) -> list[int]:
    """How many resamples to draw at once, until all are drawn."""
    size = max(1, min(RESAMPLES, _AT_ONCE // width))
    return [size] * (RESAMPLES // size) + ([RESAMPLES % size] if RESAMPLES % size else [])


def wealth(differences: ArrayLike, mean: ArrayLike = 0.0) -> tuple[_Floats, _Floats]:
    """The logarithm of what bets against the claim "the mean is at most `mean`", and "at least", have made of 1.

    `differences` [..., n] lie from -1 to 1, in the order in which they came; the result is [..., n], after each. Where
    the claim is true, the wealth has a chance of at most a to reach 1 / a at any time, however often it is looked at
    (Ville 1939). Each stake knows only what came before it; its size is aGRAPA's of Waudby-Smith and Ramdas,
    Estimating means of bounded random variables by betting, JRSS-B 86 (2024), appendix B.3, brought to [-1, 1].
    """
    above, below = _log_gains(np.asarray(differences, dtype=np.float64), np.asarray(mean, dtype=np.float64))
    return np.cumsum(above, axis=-1), np.cumsum(below, axis=-1)


def _log_gains(x: _Floats, m: _Floats) -> tuple[_Floats, _Floats]:
    """What each bet of the two sides adds to the logarithm of its wealth."""
    count = np.arange(1, x.shape[-1] + 1)
    mean_so_far = np.cumsum(x, axis=-1) / (count + 1)
    spread = (1.0 + np.cumsum((x - mean_so_far) ** 2, axis=-1)) / (count + 1)
    known_mean = np.concatenate([np.zeros_like(x[..., :1]), mean_so_far[..., :-1]], axis=-1)
    known_spread = np.concatenate([np.ones_like(x[..., :1]), spread[..., :-1]], axis=-1)
    edge = known_mean - m
    stake = edge / (known_spread + edge**2)
    above = np.clip(stake, 0.0, MAX_STAKE / (1 + m))
    below = np.clip(stake, -MAX_STAKE / (1 - m), 0.0)
    gain = x - m
    return np.log1p(above * gain), np.log1p(below * gain)


def decisions(differences: ArrayLike, confidence: float = CONFIDENCE) -> NDArray[np.int8]:
    """After each of the differences [..., n]: 1 where their mean is above 0, -1 where below, 0 where it is not known.

    Anytime-valid: where the mean is 0, the chance that any of them is ever another than 0 is 1 - confidence at most.
    """
    above, below = wealth(differences)
    enough = math.log(2 / (1 - confidence))  # two claims are bet against, each with half of the error
    return (above >= enough).astype(np.int8) - (below >= enough).astype(np.int8)


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Of `n` scores from 0 to 1. Wilson's interval where each is 0 or 1, else the bootstrap's, which may be absent."""

    n: int
    mean: float
    low: float | None
    high: float | None


def mean_score(scores: Sequence[float]) -> Mean | None:
    """None of no scores."""
    if not scores:
        return None
    n, total = len(scores), math.fsum(scores)
    found = wilson(total, n) if all(each in (0, 1) for each in scores) else bootstrap_mean(scores)
    return Mean(n=n, mean=total / n, low=found.low if found else None, high=found.high if found else None)


def later_minus_earlier(samples: Sequence[float]) -> Interval | None:
    """The mean of the later half less that of the earlier one, with Welch's interval (1947).

    None where a half has fewer than 8.
    """
    half = len(samples) // 2
    if half < LEAST_FOR_BOOTSTRAP:
        return None
    halves = [np.asarray(part, dtype=np.float64) for part in (samples[:half], samples[-half:])]
    change = float(halves[1].mean() - halves[0].mean())
    errors = [float(part.var(ddof=1)) / half for part in halves]
    reach = 0.0
    if any(errors):
        degrees = (half - 1) * sum(errors) ** 2 / sum(each**2 for each in errors)
        reach = student_t(degrees) * math.sqrt(sum(errors))
    return Interval(change, change - reach, change + reach)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The mean of `n` paired differences from -1 to 1, with bounds that hold at all times together.

    `sign` is 1 or -1 where the mean is known to be above or below 0, else 0.
    """

    n: int
    mean: float
    low: float
    high: float
    sign: int


def confidence_sequence(differences: Sequence[float], confidence: float = CONFIDENCE) -> Estimate | None:
    """What is known of the mean by now, however often it was looked at before; None of no differences.

    The bounds hold every mean against which no bet has won, to the next of `GRID`.
    """
    if len(differences) == 0:
        return None
    x = np.asarray(differences, dtype=np.float64)
    rows = max(1, _AT_ONCE // len(x))
    tried = [GRID[at : min(at + rows, len(GRID) - 1), None] for at in range(1, len(GRID) - 1, rows)]
    gained = [[side.sum(axis=-1) for side in _log_gains(x, means)] for means in tried]
    enough = math.log(2 / (1 - confidence))
    above, below = (np.concatenate([each[side] for each in gained]) >= enough for side in (0, 1))
    # Up to the first mean that stands, from either end: so the bound errs only where a single true claim was bet down.
    low = float(GRID[len(above) if above.all() else int(above.argmin())])
    high = float(GRID[1 if below.all() else len(GRID) - 1 - int(below[::-1].argmin())])
    return Estimate(n=len(x), mean=float(x.mean()), low=low, high=high, sign=int(low >= 0) - int(high <= 0))


def more_to_decide(differences: Sequence[float], confidence: float = CONFIDENCE) -> int | None:
    """About how many more differences would settle the sign of their mean, if they are like those that came.

    The median of 100 futures drawn from what came. None where more than half of them are not settled in `HORIZON`.
    """
    past = np.asarray(differences, dtype=np.float64)
    if not past.any():
        return None
    rng = np.random.default_rng(_SEED)
    horizon = 64
    while True:
        first = sorted(_first_settled(past, rng, horizon, confidence) for _ in range(_FUTURES))[_FUTURES // 2]
        if math.isfinite(first):
            return int(first)
        if horizon >= HORIZON:
            return None
        horizon = min(horizon * 4, HORIZON)


def _first_settled(past: _Floats, rng: np.random.Generator, horizon: int, confidence: float) -> float:
    """After how many of one drawn future; infinite where it ends unsettled."""
    future = past[rng.integers(0, len(past), size=horizon)]
    settled = decisions(np.concatenate([past, future]), confidence)[len(past) :] != 0
    return float(settled.argmax()) + 1 if settled.any() else math.inf
