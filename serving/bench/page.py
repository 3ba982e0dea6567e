"""A bench's result as one HTML file that needs nothing else: tables, and plots drawn as SVG."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Series = Mapping[str, Sequence[tuple[float, float]]]
WIDTH, HEIGHT, MARGIN = 640, 300, 56
COLOURS = ("#0b62c4", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be123c", "#475569")
TITLES = (
    ("vision", "Vision"), ("prefill", "Prompt step"), ("decode", "Decoding"), ("rows", "Rows decoded together"),
)  # fmt: skip
STAGES = ("queue_ms", "image_decode_ms", "preprocess_ms", "vision_ms", "prefill_ms", "decode_ms")
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8885 }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: currentColor }
"""


def page_of(result: Mapping[str, Any]) -> str:
    """The whole page. All figures are in it again as JSON, for programs."""
    machine = result["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['instruction_sets'])})"
    parts = [
        f"<h1>nearfar bench: {_text(result['target'])}</h1>",
        f"<p>{_text(where)}, {_text(machine['system'])}, {_text(result['date'])}. "
        "Best of the rounds, all systems in one run, one after the other in each round.</p>",
    ]
    for kind, title in TITLES:
        rows = [row for row in result["engine"] if row["kind"] == kind]
        if rows:
            parts += [f"<h2>{title}, {_text(rows[0]['unit'])}</h2>", _plot(_series(rows)), _engine_table(rows)]
    loads = result["loads"]
    if loads:
        systems = dict.fromkeys(load["system"] for load in loads)
        by_clients = {
            name: [(load["clients"], load["tokens_per_second"]) for load in loads if load["system"] == name]
            for name in systems
        }
        flat = [
            {key: "/".join("-" if each is None else f"{each:g}" for each in value.values())
             if isinstance(value, dict) else value for key, value in load.items()}
            for load in loads
        ]  # fmt: skip
        parts += ["<h2>Tokens per second by clients</h2>", _plot(by_clients)]
        parts += ["<p>Percentiles are p50/p95/p99 by nearest rank, - where n is too small.</p>", _table(flat)]
    stages = {name: value for name, value in result["stages"].items() if name in STAGES and value is not None}
    parts += ["<h2>Where one request's time goes, ms</h2>", f"<p>{_text(result['question'])}</p>", _bars(stages)]
    if result["first_token"]:
        parts += [
            "<h2>First token over HTTP: a new picture, again, behind other text; text alone as long</h2>",
            _table(result["first_token"]),
        ]
    if result["pareto"]:
        parts += ["<h2>Recipes of this model, as its export measured them</h2>", _table(result["pareto"])]
    blob = json.dumps(result).replace("<", "\\u003c")
    parts.append(f'<script type="application/json" id="result">{blob}</script>')
    head = f'<meta charset="utf-8"><title>nearfar bench</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _text(value: object) -> str:
    return html.escape(str(value))


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    names = dict.fromkeys(name for row in rows for name in row["figures"])
    return {name: [(r["size"], r["figures"][name]["best"]) for r in rows if name in r["figures"]] for name in names}


def _plot(series: Series) -> str:
    """Lines over a logarithmic x axis; y begins at 0."""
    points = [point for line in series.values() for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    top = max(y for _, y in points) * 1.1 or 1.0
    span = math.log(right / left) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = MARGIN + math.log(x / left) / span * (WIDTH - 2 * MARGIN)
        return round(across, 1), round(HEIGHT - MARGIN - y / top * (HEIGHT - 2 * MARGIN), 1)

    drawn = [f'<path d="M{MARGIN} {HEIGHT - MARGIN}H{WIDTH - MARGIN}" stroke="currentColor"/>']
    for x in sorted({x for x, _ in points}):
        drawn.append(f'<text x="{place(x, 0)[0]}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">{x:g}</text>')
    for share in (0.25, 0.5, 0.75, 1.0):
        y = place(left, top * share)[1]
        drawn.append(f'<path d="M{MARGIN} {y}H{WIDTH - MARGIN}" stroke="#8884"/>')
        drawn.append(f'<text x="{MARGIN - 6}" y="{y + 4}" text-anchor="end">{top * share:.3g}</text>')
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in line))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in (place(*point) for point in line)]
        drawn.append(f'<text x="{MARGIN}" y="{14 + 15 * number}" style="fill:{colour}">{_text(name)}</text>')
    tall = HEIGHT + 15 * len(series)
    return f'<svg viewBox="0 {-15 * len(series)} {WIDTH} {tall}" role="img">{"".join(drawn)}</svg>'


def _bars(stages: Mapping[str, float]) -> str:
    widest = max(stages.values(), default=0) or 1.0
    drawn = []
    for number, (name, milliseconds) in enumerate(stages.items()):
        y, wide = number * 24, milliseconds / widest * (WIDTH - 260)
        drawn.append(f'<text x="0" y="{y + 15}">{_text(name)}</text>')
        drawn.append(f'<rect x="150" y="{y + 3}" width="{wide:.1f}" height="16" fill="{COLOURS[0]}"/>')
        drawn.append(f'<text x="{156 + wide:.1f}" y="{y + 15}">{milliseconds:.1f}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {24 * len(stages) + 4}" role="img">{"".join(drawn)}</svg>'


def _engine_table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    flat = []
    for row in rows:
        cells = {"size": row["size"]}
        for name in names:
            figure = row["figures"].get(name)
            cells[name] = f"{figure['best']:g} ({row['ratio_to'][name]:.2f}x)" if figure else "-"
        flat.append(cells)
    return _table(flat)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{_text(value)}</td>' for value in row.values())}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
