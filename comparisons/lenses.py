"""Four ways to look at the same pairs, each computed: the builder's, the skeptic's, the futurist's and the buyer's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from comparisons.cost import dollars
from comparisons.measures import agreements
from comparisons.pairs import Outcome, Pair, Priority, differences
from comparisons.quality import by_slice, quality
from comparisons.statistics import confidence_sequence, later_minus_earlier, wilson

LensName = Literal["builder", "skeptic", "futurist", "buyer"]
LEAST_IN_SLICE = 5  # of which a slice is named as the one that breaks


@dataclass(frozen=True, kw_only=True)
class Lens:
    """What one of them says. `prefers` is a target, or None where the records do not tell for certain."""

    name: LensName
    prefers: str | None
    text: str
    figures: Mapping[str, float | int | None]


@dataclass(frozen=True, kw_only=True)
class View:
    """What they look at. `advantages`: the second's over the first, weighed, of the pairs in their order."""

    first: str
    second: str
    pairs: Sequence[Pair]
    advantages: Sequence[float]
    volume: int  # inputs a month

    @property
    def sides(self) -> tuple[tuple[str, list[Outcome]], tuple[str, list[Outcome]]]:
        return (self.first, [pair.first for pair in self.pairs]), (self.second, [pair.second for pair in self.pairs])

    def leader(self, sign: int) -> str | None:
        return {1: self.second, -1: self.first}.get(sign)

    def prefers(self, priority: Priority) -> str | None:
        """Who is ahead for certain in one priority alone."""
        steps = [differences(pair.first, pair.second)[priority] for pair in self.pairs]
        found = confidence_sequence([step for step in steps if step is not None])
        return self.leader(found.sign if found else 0)


def lenses(view: View) -> tuple[Lens, ...]:
    """All four."""
    looks: tuple[Callable[[View], Lens], ...] = (_builder, _skeptic, _futurist, _buyer)
    return tuple(look(view) for look in looks)


def _builder(view: View) -> Lens:
    """Setup: what must be there first. Integration: answers cut or refused. Errors: answers that never came."""
    said: list[str] = []
    figures: dict[str, float | int | None] = {}
    for side, (target, outcomes) in zip(("first", "second"), view.sides, strict=True):
        n, failed = len(outcomes), Counter(each.error_type for each in outcomes if not each.ok)
        cut = sum(each.finish_reason in ("length", "refusal") for each in outcomes)
        chance = wilson(failed.total(), n)
        kinds = ", ".join(f"{count} {kind}" for kind, count in failed.most_common(3))
        said.append(
            f"{target}: {_setup(outcomes)}; {failed.total()} of {n} failed{f' ({kinds})' if kinds else ''}, at most "
            f"{chance.high:.1%} at 95 %; {cut} cut or refused"
        )
        figures |= {f"{side}_failed": failed.total(), f"{side}_failed_high": chance.high, f"{side}_cut": cut}
    figures["n"] = len(view.pairs)
    return Lens(name="builder", prefers=view.prefers("reliability"), text="; ".join(said), figures=figures)


def _setup(outcomes: Sequence[Outcome]) -> str:
    places = dict.fromkeys(each.destination for each in outcomes if each.destination)
    if places:
        return f"needs {', '.join(places)}"
    model_bytes = next((each.model_bytes for each in outcomes if each.model_bytes), None)
    loads = [each.load_ms for each in outcomes if each.load_ms is not None]
    files = "setup not known" if model_bytes is None else f"needs {model_bytes / 1e6:,.0f} MB of model files"
    return files + (f", loaded in {median(loads) / 1000:.1f} s (median, n = {len(loads)})" if loads else "")


def _skeptic(view: View) -> Lens:
    found = quality(view.pairs)
    if found is None:
        return _agreement(view)
    shares = [
        f"{target} {mean.mean:.1%}" + ("" if mean.low is None else f" ({mean.low:.1%} to {mean.high:.1%})")
        for target, mean in ((view.first, found.first), (view.second, found.second))
    ]
    fixed = "" if found.bootstrap is None else f"; bootstrap {found.bootstrap.low:+.3f} to {found.bootstrap.high:+.3f}"
    text = (
        f"score {' and '.join(shares)}, n = {found.n}; difference {found.difference.mean:+.3f} "
        f"({found.difference.low:+.3f} to {found.difference.high:+.3f} at all times){fixed}; right alone "
        f"{found.first_only} and {found.second_only} times, McNemar p = {found.mcnemar_p:.2g}; {_breaks(view)}"
    )
    figures = {
        "n": found.n,
        "first": found.first.mean,
        "second": found.second.mean,
        "difference": found.difference.mean,
        "low": found.difference.low,
        "high": found.difference.high,
        "mcnemar_p": found.mcnemar_p,
        "neither": found.neither,
    }
    return Lens(name="skeptic", prefers=view.leader(found.difference.sign), text=text, figures=figures)


def _agreement(view: View) -> Lens:
    """Without a reference: only how often they say the same."""
    (found,) = agreements({target: [each.text for each in outcomes] for target, outcomes in view.sides})
    text = f"no input has a reference: what is right is not known; the same answer on {found.same} of {found.n} inputs"
    if found.kappa is not None:
        text += f", kappa {found.kappa:.2f}"
    figures = {"n": found.n, "same": found.same, "kappa": found.kappa}
    return Lens(name="skeptic", prefers=None, text=text, figures=figures)


def _breaks(view: View) -> str:
    """Where each target does worst."""
    slices = {name: found for name, found in by_slice(view.pairs).items() if found.n >= LEAST_IN_SLICE}
    if len(slices) < 2:
        return f"no two slices of {LEAST_IN_SLICE} inputs to tell where it breaks"
    means = {
        view.first: {name: found.first for name, found in slices.items()},
        view.second: {name: found.second for name, found in slices.items()},
    }
    worst = {target: min(of, key=lambda name: of[name].mean) for target, of in means.items()}
    return "; ".join(
        f"{target} breaks most on {name} ({means[target][name].mean:.0%}, n = {means[target][name].n})"
        for target, name in worst.items()
    )


def _futurist(view: View) -> Lens:
    change = later_minus_earlier(view.advantages)
    if change is None:
        text = f"no trend can be told from {len(view.advantages)} inputs: 16 are needed"
        return Lens(name="futurist", prefers=None, text=text, figures={"n": len(view.advantages)})
    sign = int(change.low > 0) - int(change.high < 0)
    leader = view.leader(sign)
    towards = f"the trend goes towards {leader}" if leader else "no trend is certain"
    text = (
        f"{towards}: from the earlier to the later half of {len(view.advantages)} inputs the advantage of "
        f"{view.second} changed by {change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
    )
    figures = {"n": len(view.advantages), "change": change.value, "low": change.low, "high": change.high}
    return Lens(name="futurist", prefers=leader, text=text, figures=figures)


def _buyer(view: View) -> Lens:
    said: list[str] = []
    figures: dict[str, float | int | None] = {"volume": view.volume}
    for side, (target, outcomes) in zip(("first", "second"), view.sides, strict=True):
        prices = [each.usd for each in outcomes if each.usd is not None]
        scores = [each.score for each in outcomes if each.score is not None]
        month = fmean(prices) * view.volume if prices else None
        right = fmean(scores) if scores else 0.0
        per_right = fmean(prices) / right if prices and right else None
        bill = f"{target}: price unknown"
        if month is not None:
            bill = f"{target}: {dollars(month)} a month for {view.volume:,} inputs (mean of n = {len(prices)})"
        said.append(bill + ("" if per_right is None else f", {dollars(per_right)} a right answer"))
        figures |= {f"{side}_usd_month": month, f"{side}_usd_per_right": per_right, f"{side}_n": len(prices)}
    return Lens(name="buyer", prefers=view.prefers("cost"), text="; ".join(said), figures=figures)
