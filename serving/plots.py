"""Plots as SVG that goes into a page: colours are the page's own, so that light, dark and print each have theirs.

Eight colours that the colour-blind tell apart (Okabe and Ito 2008), each with a shape of its own. Where Matplotlib is.
"""

from __future__ import annotations

import html
import io
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from models.errors import Unavailable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What is drawn, and what the page calls it: `--c0` and so on are the series.
INK, MUTED, LINE, GROUND = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8a7a00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SIGNS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")  # the same shapes in text
NAMES: Mapping[str, str] = {INK: "--ink", MUTED: "--muted", LINE: "--line", GROUND: "--card"} | {
    colour: f"--c{place}" for place, colour in enumerate(SERIES)
}
WIDTH_IN, ROW_IN, HEIGHT_IN = 4.5, 0.46, 2.5
MAX_LABEL = 30  # characters, beside figures in words; who draws names it in full elsewhere
ENLARGED = 1.35  # at most, on a wide screen
Scale = Literal["share", "zero", "difference"]
WIDE = 20.0  # beyond such a ratio a scale from 0 would press the small ones together
_STYLE: Any = {  # of keys that Matplotlib types one by one
    "svg.fonttype": "none",
    "svg.hashsalt": "nearfar",
    "text.parse_math": False,  # a dollar sign is one
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_LONG = re.compile(r"(\.\d\d)\d+")
_DRAWING = threading.Lock()  # Matplotlib is not for several threads at once


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A row: a value and its interval, named and told in words, which have its n. `series`: its colour and shape."""

    label: str
    told: str
    value: float
    low: float | None = None
    high: float | None = None
    series: int = 0


@dataclass(frozen=True, kw_only=True)
class Line:
    """Values with their intervals (x, value, low, high) of one series."""

    label: str
    points: Sequence[tuple[float, float, float, float]]
    series: int = 0


def intervals(rows: Sequence[Bar], *, scale: Scale, label: str, title: str) -> str:
    """A row each: what it is and its figures in words, below them the value with its interval."""
    with _Drawing(height_in=ROW_IN * len(rows) + 0.62) as drawing:
        axes, count = drawing.axes, len(rows)
        for place, row in enumerate(rows):
            y = count - 1 - place
            colour, marker = style_of(row.series)
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [y, y], color=colour, lw=2.2, solid_capstyle="butt")
                axes.plot([row.low, row.high], [y, y], color=colour, ls="none", marker="|", ms=8, mew=1.4)
            axes.plot([row.value], [y], color=colour, marker=marker, ms=7, ls="none")
            short = row.label if len(row.label) <= MAX_LABEL else f"{row.label[: MAX_LABEL - 1]}…"
            words: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "bottom"}
            words["bbox"] = {"facecolor": GROUND, "edgecolor": "none", "pad": 1.0}
            axes.text(0, y + 0.3, short, ha="left", **words)
            axes.text(1, y + 0.3, row.told, ha="right", color=MUTED, **words)
        axes.set_ylim(-0.45, count - 0.1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        _scale(axes, scale, rows)
        axes.set_xlabel(label)
    return drawing.svg(title)


def curves(lines: Sequence[Line], *, x_label: str, y_label: str, title: str) -> str:
    """Shares over whole steps, each with its interval; the series stand a little apart, so that none hides another."""
    with _Drawing(height_in=HEIGHT_IN, width_in=WIDTH_IN * 0.8) as drawing:
        from matplotlib.ticker import PercentFormatter

        axes = drawing.axes
        for place, line in enumerate(lines):
            colour, marker = style_of(line.series)
            aside = (place - (len(lines) - 1) / 2) * 0.16
            x = [at + aside for at, *_ in line.points]
            y = [value for _, value, _, _ in line.points]
            reach = [[v - low for _, v, low, _ in line.points], [high - v for _, v, _, high in line.points]]
            axes.errorbar(x, y, yerr=reach, color=colour, marker=marker, ms=6, lw=1.4, elinewidth=1.2, capsize=3)
        axes.set_ylim(-0.02, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xticks(sorted({at for line in lines for at, *_ in line.points}))
        axes.grid(axis="y", color=LINE, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return drawing.svg(title)


def style_of(series: int) -> tuple[str, str]:
    """Colour and shape; beyond the eighth the colours come again with other shapes."""
    return SERIES[series % len(SERIES)], MARKERS[(series + series // len(SERIES)) % len(MARKERS)]


def sign_of(series: int) -> str:
    """The shape in text."""
    return SIGNS[(series + series // len(SERIES)) % len(SIGNS)]


def _scale(axes: Axes, scale: Scale, rows: Sequence[Bar]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    ends = [end for row in rows for end in (row.low, row.value, row.high) if end is not None]
    axes.grid(axis="x", color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    match scale:
        case "share":
            axes.set_xlim(-0.01, 1.01)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        case "zero" if 0 < min(ends) * WIDE < max(ends):
            axes.set_xscale("log")
            axes.set_xlim(min(ends) / 1.6, max(ends) * 1.6)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        case "zero":
            axes.set_xlim(0, max(ends) * 1.08 or 1.0)
        case "difference":
            reach = min(1.02, max(abs(end) for end in ends) * 1.15 or 1.0)
            axes.set_xlim(-reach, reach)
            axes.axvline(0, color=MUTED, lw=1)


class _Drawing:
    """A figure under this module's style. Raises Unavailable without Matplotlib."""

    def __init__(self, *, height_in: float, width_in: float = WIDTH_IN) -> None:
        self._size_in = (width_in, height_in)

    def __enter__(self) -> _Drawing:
        try:
            from matplotlib import rc_context
            from matplotlib.figure import Figure
        except ImportError as error:
            raise Unavailable("plots need Matplotlib: pip install 'nearfar[report]'") from error
        except OSError as error:  # it keeps a list of fonts in the home folder, or where MPLCONFIGDIR says
            raise Unavailable(f"Matplotlib does not start: {error}") from error
        with ExitStack() as opening:
            opening.enter_context(_DRAWING)
            opening.enter_context(rc_context(_STYLE))
            self._figure: Figure = Figure(figsize=self._size_in, layout="constrained")
            self.axes: Axes = self._figure.add_subplot()
            self._opened = opening.pop_all()
        return self

    def __exit__(self, *told: Any) -> None:
        with self._opened:
            if told[0] is None:
                stream = io.StringIO()
                nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
                self._figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
                self._drawn = stream.getvalue()

    def svg(self, title: str) -> str:
        """The element alone, in the page's colours and type."""
        drawn = self._drawn[self._drawn.index("<svg") :]
        view = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', drawn)
        name = html.escape(title)
        width_px = round(float(view[1]) * ENLARGED) if view else 0
        head = f'<svg class="plot" role="img" aria-label="{name}" style="max-width:{width_px}px" {view and view[0]}>'
        drawn = head + drawn[drawn.index(">") + 1 :]
        drawn = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", drawn, flags=re.DOTALL)
        drawn = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", drawn)  # groups that nothing refers to
        drawn = re.sub(r"xlink:href", "href", drawn)
        drawn = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: _LONG.sub(r"\1", found[0]), drawn)
        drawn = re.sub(r"font-family: [^;\"]*", "font-family: inherit", drawn)
        return re.sub("|".join(NAMES), lambda found: f"var({NAMES[found[0]]})", drawn)
