"""The page of a report: one HTML file without a script, which loads nothing. Every figure is the object's own.

Whatever users and models wrote is escaped by the template's environment; the plots escape for themselves.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from comparisons.cost import dollars
from comparisons.report import CORRUPTION
from serving.plots import MAX_LABEL, NAMES, SERIES, Bar, Line, Scale, curves, intervals, sign_of
from serving.report import Report

# Nothing is loaded and nothing runs, whatever an answer tries; the plots have their colours in style attributes.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
GREY = len(SERIES) - 2
Show = Callable[[float], str]


class Measure(NamedTuple):
    """A figure of every target, as the page shows it."""

    name: str
    title: str
    label: str
    scale: Scale
    show: Show


def share(value: float) -> str:
    """0.9333 as 93.3 %."""
    return f"{100 * value:.1f} %"


def milliseconds(value: float) -> str:
    """With three digits, from a second on as seconds."""
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


def signed(value: float) -> str:
    """A difference from -1 to 1."""
    return f"{value:+.3f}"


def size(value: float) -> str:
    """Bytes in thousands."""
    return f"{value / 1000:,.1f} kB" if value >= 1000 else f"{value:,.0f} bytes"


MEASURES = (
    Measure("accuracy", "Right answers", "share answered right, 95 % interval (Wilson)", "share", share),
    Measure("total_ms", "Time to the whole answer", "median, ms, 95 % interval (by rank)", "zero", milliseconds),
    Measure("usd_per_1000", "Cost of 1,000 inputs", "US dollars, 95 % interval (bootstrap)", "zero", dollars),
)


def told(figure: Mapping[str, Any] | None, show: Show) -> str:
    """A figure in words: with its interval where it has one, and always with its n."""
    if figure is None:
        return "not measured"
    bounds = "" if figure["low"] is None else f" ({show(figure['low'])} to {show(figure['high'])})"
    return f"{show(figure['value'])}{bounds}, n = {figure['n']}"


def somebody_wrong(answers: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a target failed, or was not wholly right."""
    return any(not each["ok"] or each["score"] not in (None, 1.0) for each in answers.values())


def page_of(report: Report) -> str:
    """The whole page. Raises Unavailable where Matplotlib is not installed."""
    whole = report.object
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": share, "milliseconds": milliseconds, "dollars": dollars, "signed": signed, "size": size, "told": told,
        "somebody_wrong": somebody_wrong,
    }  # fmt: skip
    series = {each["target"]: place for place, each in enumerate(whole["targets"])}
    return environment.get_template("report.html").render(
        whole,
        policy=POLICY,
        colours=NAMES,
        series=series,
        signs={target: sign_of(place) for target, place in series.items()},
        balance=Markup(_balance(whole["verdict"], series)) if whole["verdict"] else None,
        plots=[(each, Markup(svg)) for each in MEASURES if (svg := _plot(each, whole["targets"]))],
        measures=MEASURES,
        lead=_lead(whole["verdict"]),
        corruptions=[(kind, Markup(svg), ns) for kind, svg, ns in _corruptions(whole["severities"], series)],
        by_severity=[
            (step, {each["target"]: each["accuracy"] for each in group})
            for step, group in groupby(whole["severities"], key=lambda each: f"{each['kind']}, {each['severity']}")
        ],
        show_size=size,
        pictures={row: base64.b64encode(data).decode() for row, data in report.thumbnails.items()},
        corruption_prefix=CORRUPTION,
    )


def _lead(verdict: Mapping[str, Any] | None) -> str | None:
    """The verdict's sentences without the choice, which stands above them."""
    rest = verdict["text"].partition(": ")[2] if verdict else ""
    return rest[:1].upper() + rest[1:] if rest and not rest.startswith("local/") else rest or None


def _balance(verdict: Mapping[str, Any], series: Mapping[str, int]) -> str:
    """The verdict's weighed difference and each priority's own, who is certainly ahead in colour and shape."""
    first, second = verdict["first"], verdict["second"]
    rows = []
    named = [("all, weighed", verdict["advantage"]), *verdict["priorities"].items()]
    for name, found in named:
        if found is None:
            continue
        ahead = {1: series[second], -1: series[first], 0: GREY}[found["sign"]]
        weight = verdict["weights"].get(name)
        label = name if weight is None else f"{name} × {weight:g}"
        told_all = told({**found, "value": found["mean"]}, signed)
        rows.append(
            Bar(label=label, told=told_all, value=found["mean"], low=found["low"], high=found["high"], series=ahead)
        )
    if not rows:
        return ""
    return intervals(
        rows,
        scale="difference",
        label=f"← {_short(first)} ahead · {_short(second)} ahead →",
        title=f"Difference of {second} over {first}: " + "; ".join(f"{row.label} {row.told}" for row in rows),
    )


def _short(target: str) -> str:
    """Enough to tell the two apart under a plot."""
    name = target.removeprefix("local/")
    return name if len(name) <= MAX_LABEL else f"…{name[-MAX_LABEL:]}"


def _plot(measure: Measure, targets: Sequence[Mapping[str, Any]]) -> str:
    """Empty where no target has the figure, and where it is 0 for all."""
    rows = [
        Bar(
            label=each["target"],
            told=told(figure, measure.show),
            value=figure["value"],
            low=figure["low"],
            high=figure["high"],
            series=place,
        )
        for place, each in enumerate(targets)
        if (figure := each[measure.name]) is not None
    ]
    if not any(row.value for row in rows):
        return ""
    title = f"{measure.title}: " + "; ".join(f"{row.label} {row.told}" for row in rows)
    return intervals(rows, scale=measure.scale, label=measure.label, title=title)


def _corruptions(found: Sequence[Mapping[str, Any]], series: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """A plot for each kind, and how many inputs are behind its points."""
    plots = []
    for kind, group in groupby(found, key=lambda each: each["kind"]):
        each_kind = list(group)
        lines = []
        for target, place in series.items():
            shares = [(each["severity"], each["accuracy"]) for each in each_kind if each["target"] == target]
            points = [(float(level), of["value"], of["low"], of["high"]) for level, of in shares]
            if points:
                lines.append(Line(label=target, points=points, series=place))
        counts = {each["accuracy"]["n"] for each in each_kind}
        ns = f"n = {min(counts)}" if len(counts) == 1 else f"n = {min(counts)} to {max(counts)}"
        title = f"Accuracy against the severity of {kind}, {ns} at each point; the table has the figures"
        drawn = curves(lines, x_label="severity; 0: as it is", y_label="answered right", title=title)
        plots.append((kind, drawn, f"{ns} at each point"))
    return plots
