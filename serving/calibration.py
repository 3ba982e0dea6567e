"""`nearfar calibrate`: a local target's records become the threshold of a route's hop, told, drawn and written down."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AbstractTable, Array, InlineTable

from comparisons.calibration import Block, Calibration, Goal, Point, Sample, calibrate
from comparisons.cost import dollars
from comparisons.pairs import is_meant
from comparisons.records import ArmRecord, Record
from comparisons.statistics import Interval
from models.errors import InvalidValue, NotFound

SIDE, MARGIN = 360, 48
BLUE, ORANGE = "#0b62c4", "#c2410c"  # told apart by the colour-blind too
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem }
pre { white-space: pre-wrap } figure { display: inline-block; margin: 1rem 1rem 1rem 0 }
svg { max-width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: currentColor }
"""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Records of one local target on one task, as one version of its model answered. `hosted` None: without it.

    `passed_over`: records that do not count, by why.
    """

    local: str
    hosted: str | None
    task: str
    model: str | None
    samples: tuple[Sample, ...]
    passed_over: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A threshold and all that it rests on."""

    evidence: Evidence
    goal: Goal
    seed: int
    day: date
    found: Calibration

    def object(self) -> dict[str, Any]:
        """As JSON."""
        evidence = self.evidence
        return {
            "local": evidence.local,
            "hosted": evidence.hosted,
            "task": evidence.task,
            "model": evidence.model,
            "passed_over": dict(evidence.passed_over),
            "goal": asdict(self.goal),
            "seed": self.seed,
            "day": self.day.isoformat(),
            **{name: _plain(value) for name, value in vars(self.found).items()},
        }

    def hop(self) -> dict[str, Any]:
        """What a route's hop keeps of it."""
        goal, evidence = self.goal, self.evidence
        held = {"target_error": goal.target_error, "max_cloud_rate": goal.max_cloud_rate}
        return {
            "target": evidence.local,
            "escalate_below": self.found.threshold,
            "calibrated": {
                "model": evidence.model,
                "task": evidence.task,
                "n": self.found.n_fitted + self.found.n_reported,
                **{name: value for name, value in held.items() if value is not None},
                "day": self.day.isoformat(),
            },
        }

    def lines(self) -> list[str]:
        """What it comes to, in words."""
        found, evidence, goal = self.found, self.evidence, self.goal
        far = evidence.hosted or "the next target"
        chance, n = found.chance_at_threshold, found.n_reported
        bound = "wrong answers" if goal.target_error is not None else "questions that go on"
        lines = [
            f"{evidence.local}, {evidence.task}, model {evidence.model}: threshold {found.threshold:.4f}, "
            f"which stands for a chance of {chance:.0%} of being right",
            f"fitted on {found.n_fitted} records so that {bound} are at most {goal.bound:.1%} with "
            f"{goal.sureness:.0%} sureness; on {n} others, with 95 % intervals:",
            f"  wrong answers of the route        {percent(found.error)}"
            + ("" if found.counts_hosted else f"   without those of {far}, which too few records know"),
            f"  of the answers that stay, wrong   {percent(found.kept_error)}"
            + ("" if found.expected_kept_error is None else f"   expected {found.expected_kept_error:.1%}"),
            f"  asked of {far}: {percent(found.cloud_rate)}",
            f"  dollars for 1,000 questions       {_spread(found.usd_per_1000)}",
            f"  {evidence.local} alone is wrong in {percent(found.local_error)}",
        ]
        if found.hosted_error is not None:
            lines.append(f"  {far} alone is wrong in {percent(found.hosted_error)}")
        if found.ranking is not None:
            lines.append(f"  a right answer is surer than a wrong one in {found.ranking:.0%} of pairs; 50% is chance")
        lines += [f"  passed over: {count} {why}" for why, count in evidence.passed_over.items() if count]
        return lines


def _plain(value: Any) -> Any:
    """Intervals and points by their names: as plain tuples JSON would have lists of numbers."""
    if isinstance(value, Interval | Block | Point):
        return value._asdict()
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def percent(found: Interval | None) -> str:
    return "-" if found is None else f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"


def _spread(found: Interval | None) -> str:
    return "not known" if found is None else "{} ({} to {})".format(*map(dollars, (found.value, found.low, found.high)))


def evidence_of(records: Iterable[Record], *, local: str, hosted: str | None, task: str) -> Evidence:
    """What records, the newest first, say of a local target, whose name may be shortened, and of a hosted one.

    The newest version of the model counts alone. Raises NotFound where no record has the target.
    """
    passed = {"without a right answer": 0, "without a confidence, or failed": 0, "of another version of the model": 0}
    far_failed = f"to which {hosted} gave no answer"
    passed |= {far_failed: 0} if hosted else {}
    samples: list[Sample] = []
    name, model = None, None
    for record in records:
        arm = next((each for each in record.arms if is_meant(each.target, name or local)), None)
        if record.task != task or arm is None:
            continue
        far = next((each for each in record.arms if hosted and is_meant(each.target, hosted)), None)
        if name is None:
            name, model = arm.target, arm.versions.get("model")
        if arm.versions.get("model") != model:
            passed["of another version of the model"] += 1
        elif arm.confidence is None:
            passed["without a confidence, or failed"] += 1
        elif arm.correct is None:
            passed["without a right answer"] += 1
        elif far and not far.result["ok"]:
            passed[far_failed] += 1
        else:
            samples.append(
                Sample(
                    input_sha256=record.input.sha256,
                    confidence=arm.confidence,
                    right=arm.correct,
                    local_usd=_usd(arm),
                    hosted_right=far.correct if far else None,
                    hosted_usd=_usd(far) if far else None,
                )
            )
    if name is None:
        raise NotFound(f"no record of {task} has {local}: nearfar compare or POST /compare with a reference makes some")
    return Evidence(local=name, hosted=hosted, task=task, model=model, samples=tuple(samples), passed_over=passed)


def calibrated(evidence: Evidence, goal: Goal, *, seed: int, day: date) -> Calibrated:
    """Raises InvalidValue where the records are too few, or hold no such threshold."""
    found = calibrate(evidence.samples, goal, seed=seed)
    return Calibrated(evidence=evidence, goal=goal, seed=seed, day=day, found=found)


def _usd(arm: ArmRecord) -> float | None:
    cost: Mapping[str, Any] = arm.result.get("cost") or {}
    usd: float | None = cost.get("usd")
    return usd


def inline(values: Mapping[str, Any]) -> InlineTable:
    """A table in one line, and those in it."""
    table = tomlkit.inline_table()
    for name, value in values.items():
        table.append(name, inline(value) if isinstance(value, Mapping) else value)
    return table


def written(file: Path, route: str, hop: Mapping[str, Any]) -> None:
    """Put a hop's threshold into that file's route, in its target's place; all else stays as it is, comments too.

    Raises NotFound where the file has no such route, or that no such target.
    """
    try:
        document = tomlkit.parse(file.read_text())
    except OSError as error:
        raise NotFound(f"{file}: {error.strerror}") from error
    except TOMLKitError as error:
        raise InvalidValue(f"{file} is not TOML: {error}") from error
    routes = document.get("routes")
    row = routes.get(route) if isinstance(routes, AbstractTable) else None
    hops = row.get("hops") if isinstance(row, AbstractTable) else row
    if not isinstance(hops, Array | Sequence) or isinstance(hops, str):
        raise NotFound(f"{file} has no route {route}")
    for place, each in enumerate(hops):
        name = each if isinstance(each, str) else each.get("target", "")
        if is_meant(hop["target"], name):
            kept = {} if isinstance(each, str) else dict(each)
            hops[place] = inline({**kept, **hop, "target": str(name)})  # type: ignore[index]
            file.write_text(tomlkit.dumps(document))
            return
    raise NotFound(f"route {route} of {file} does not ask {hop['target']}")


def page_of(made: Calibrated) -> str:
    """The whole page; all figures are in it again as JSON."""
    found = made.found
    curve = [(point.coverage, point.risk) for point in found.curve]
    stays = 1 - found.cloud_rate.value
    chosen = [(stays, found.kept_error.value)] if found.kept_error else []
    steps = [place for block in found.blocks for place in ((block.low, block.right), (block.high, block.right))]
    edge = [(found.threshold, 0.0), (found.threshold, 1.0)]
    top = max([risk for _, risk in curve] + [made.goal.target_error or 0.0, 0.01]) * 1.1
    figures = (
        _figure(
            f"Risk-coverage curve, n = {found.n_reported}; the dot is the threshold",
            _plot("share of questions that stay", "of those, wrong", top, [(curve, BLUE)], chosen),
        ),
        _figure(
            f"Chance of being right by confidence, isotonic, n = {found.n_fitted}; the line is the threshold",
            _plot("confidence", "right", 1.0, [(steps, BLUE), (edge, ORANGE)]),
        ),
    )
    text = html.escape("\n".join(made.lines()))
    blob = json.dumps(made.object()).replace("<", "\\u003c")
    head = f'<meta charset="utf-8"><title>nearfar calibrate</title><style>{STYLE}</style>'
    body = f"<h1>{html.escape(made.evidence.local)}</h1><pre>{text}</pre>{''.join(figures)}"
    data = f'<script type="application/json" id="result">{blob}</script>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}{data}</body></html>\n'


def _figure(caption: str, drawing: str) -> str:
    return f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _plot(across: str, up: str, top: float, lines: Sequence[tuple[Points, str]], dots: Points = ()) -> str:
    """x from 0 to 1, y from 0 to the top."""

    def place(x: float, y: float) -> str:
        return f"{MARGIN + x * (SIDE - 2 * MARGIN):.1f},{SIDE - MARGIN - y / top * (SIDE - 2 * MARGIN):.1f}"

    drawn = [f'<path d="M{place(0, top)}L{place(0, 0)}L{place(1, 0)}" fill="none" stroke="currentColor"/>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place(share, top * share).split(",")
        drawn.append(f'<text x="{x}" y="{SIDE - MARGIN + 16}" text-anchor="middle">{share:g}</text>')
        drawn.append(f'<text x="{MARGIN - 6}" y="{y}" text-anchor="end">{top * share:.2g}</text>')
    for points, colour in lines:
        path = " ".join(place(*point) for point in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for point in dots:
        x, y = place(*point).split(",")
        drawn.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{ORANGE}"/>')
    drawn.append(f'<text x="{SIDE / 2}" y="{SIDE - 12}" text-anchor="middle">{html.escape(across)}</text>')
    drawn.append(f'<text x="{MARGIN}" y="{MARGIN - 14}">{html.escape(up)}</text>')
    return f'<svg viewBox="0 0 {SIDE} {SIDE}" width="{SIDE}" role="img">{"".join(drawn)}</svg>'
