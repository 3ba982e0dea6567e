"""Verdicts, evaluations, break-even and leaderboard as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from comparisons.formulas import FORMULAS
from comparisons.scoreboard import Scoreboard, Standing
from comparisons.statistics import Spread
from serving.tables.figures import Format, bounded, dollars, milliseconds, plain, plain_text


def decision_table(verdict: dict[str, Any], console: Console) -> None:
    """The choice, what speaks against it, why, the four lenses and the slices."""
    console.print(plain_text(verdict["text"]), style="bold")
    for heading, lines in (("dissent", verdict["dissent"]), ("why", verdict["reasons"])):
        for line in lines:
            console.print(plain_text(f"  {heading}: {line}"))
    for lens in verdict["lenses"]:
        console.print(plain_text(f"  {lens['name']} ({lens['prefers'] or 'undecided'}): {lens['text']}"))
    if not verdict["slices"]:
        return
    table = Table(show_header=True, header_style="bold")
    for heading in ("slice", "n", f"score of {verdict['first']}", f"score of {verdict['second']}", "difference"):
        table.add_column(heading, overflow="fold")
    for name, found in verdict["slices"].items():
        steps = found["difference"]
        difference = f"{steps['mean']:+.3f} ({steps['low']:+.3f} to {steps['high']:+.3f})"
        means = [f"{found[side]['mean']:.3f}" for side in ("first", "second")]
        table.add_row(plain_text(name), str(found["n"]), *means, difference)
    console.print(table)


def evaluation_tables(board: Scoreboard, decisions: Sequence[dict[str, Any]], console: Console) -> None:
    """Every target over all rows; then by task, by slice and by field, where there are several; the decisions."""
    table = Table(header_style="bold")
    for heading in ("", *(each.target for each in board.targets)):
        table.add_column(heading, overflow="fold")
    for label, show in _STANDING_ROWS:
        cells = [show(each) for each in board.targets]
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells)
    console.print(table)
    for title, groups in (("task", board.tasks), ("slice", board.slices)):
        if len(groups) > 1:
            _groups_table(title, groups, console)
    if board.fields:
        _fields_table(board.fields, console)
    for each in board.agreements:
        kappa = "" if each.kappa is None else f", kappa {each.kappa:.2f}"
        same = f"gave the same answer {each.same} of {each.n} times{kappa}"
        console.print(plain_text(f"{each.first} and {each.second} {same}"))
    for decision in decisions:
        console.print(plain_text(f"\n{decision['first']} or {decision['second']}?"))
        decision_table({**decision, "slices": {}}, console)
    for figure in ("accuracy", "score", "score_interval", "total_ms"):
        console.print(f"{'right' if figure == 'accuracy' else figure}: {FORMULAS[figure]}", style="dim", markup=False)


def _time(spread: Spread | None, figure: str) -> str:
    return milliseconds(getattr(spread, figure)) if spread else "-"


def _share(standing: Standing) -> str:
    if standing.accuracy is None:
        return "-"
    return bounded(*standing.accuracy)


_STANDING_ROWS: tuple[tuple[str, Callable[[Standing], str]], ...] = (
    ("right", _share),
    ("score", lambda each: "-" if each.score is None else bounded(each.score.mean, each.score.low, each.score.high)),
    ("rows with a reference", lambda each: str(each.n)),
    ("answers", lambda each: str(each.answers)),
    ("  errors", lambda each: str(each.errors) if each.errors else "-"),
    ("  from a cache, in part", lambda each: str(each.warm) if each.warm else "-"),
    ("right at one time only", lambda each: str(each.changed) if each.changed else "-"),
    ("first token, p50", lambda each: _time(each.ttft_ms, "median")),
    ("  p95", lambda each: _time(each.ttft_ms, "p95")),
    ("whole answer, p50", lambda each: _time(each.total_ms, "median")),
    ("  p95", lambda each: _time(each.total_ms, "p95")),
    ("asked at once", lambda each: str(each.at_once) if each.at_once > 1 else "-"),
    ("cost", lambda each: f"at least {dollars(each.usd_known)}" if each.usd is None else dollars(each.usd)),
    ("bytes sent", lambda each: plain(each.bytes_sent)),
)


def _fields_table(fields: Mapping[str, Mapping[str, tuple[int, int]]], console: Console) -> None:
    table = Table(header_style="bold")
    for heading in ("field", *fields):
        table.add_column(heading, overflow="fold")
    for name in dict.fromkeys(name for shares in fields.values() for name in shares):
        found = [shares.get(name) for shares in fields.values()]
        table.add_row(plain_text(name), *("-" if share is None else f"{share[0]} of {share[1]}" for share in found))
    console.print(table)


def _groups_table(title: str, groups: Mapping[str, Sequence[Standing]], console: Console) -> None:
    table = Table(header_style="bold")
    for heading in (title, "n", *(each.target for each in next(iter(groups.values())))):
        table.add_column(heading, overflow="fold")
    for name, standings in groups.items():
        most = max(each.n for each in standings)
        cells = [_share(each) + (f", n={each.n}" if each.n != most else "") for each in standings]
        table.add_row(plain_text(name), str(most), *cells)
    console.print(table)


def break_even_tables(result: dict[str, Any], console: Console) -> None:
    """The inputs, what 1,000 accepted images cost with each target, and from which volume on here is cheaper."""
    inputs, costs, crossings = Table(box=None), Table(header_style="bold"), Table(header_style="bold")
    for column in ("input", "value", "", "why"):
        inputs.add_column(column, overflow="fold")
    for each in result["inputs"]:
        value = "-" if each["value"] is None else f"{each['value']:g}"
        inputs.add_row(each["name"], value, each["unit"], each["reason"], style=None if _is_default(each) else "bold")
    for column in ("target", "stands for", "$ an image", "$ per 1,000 accepted", "95 %", "$ a month", ""):
        costs.add_column(column, overflow="fold")
    for each in result["targets"]:
        cost, price = each["usd_per_1000_accepted"], each["price_usd_per_image"]
        figures = (f"{cost['value']:.2f}", f"{cost['low']:.2f} to {cost['high']:.2f}", f"{each['usd_per_month']:,.2f}")
        costs.add_row(
            each["target"], each["label"], "-" if price is None else f"{price:.5f}", *figures, each["note"] or ""
        )
    for column in ("local", "against", "cheaper from, images a month", "95 %", "without a crossing"):
        crossings.add_column(column, overflow="fold")
    for each in result["crossings"]:
        volume, never = each["volume"], f"{each['share_of_draws_without']:.1%}"
        span = f"{_images(volume['low'])} to {_images(volume['high'])}"
        crossings.add_row(each["local"], each["hosted"], _images(volume["value"]), span, never)
    console.print(inputs, f"\nAt {result['volume']:,.0f} images a month:", costs, crossings)
    console.print(result["method"], markup=False)


def _is_default(each: dict[str, Any]) -> bool:
    return bool(each["origin"] == "default")


def _images(count: float | None) -> str:
    return "never" if count is None else f"{count:,.0f}"


def leaderboard_table(result: dict[str, Any], console: Console) -> None:
    """Targets by their votes. An interval or the reason why there is none, never a share without its n."""
    if not result["targets"]:
        console.print("no votes yet: the page asks for them, and POST /compare with blind and /compare/ID/vote")
        return
    table = Table(show_header=True, header_style="bold")
    headings = ("target", "share of wins, 95 %", "n", "won-lost-tied", "both bad", "strength", "cost", "total", "sent")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in result["targets"]:
        share, strength, medians = row["share"], row["strength"], row["medians"]
        votes = f"{row['wins']}-{row['losses']}-{row['ties']}"
        table.add_row(
            row["target"],
            row["note"] or f"{share['value']:.2f} ({share['low']:.2f} to {share['high']:.2f})",
            str(row["comparisons"]),
            votes,
            str(row["both_bad"]),
            f"{strength['value']:+.2f} ({strength['low']:+.2f} to {strength['high']:+.2f})" if strength else "-",
            _median(medians["usd"], dollars),
            _median(medians["total_ms"], milliseconds),
            _median(medians["bytes_sent"], lambda value: f"{value:,.0f} bytes"),
        )
    console.print(table)
    console.print(f"{result['votes']} votes on {result['comparisons']} comparisons; {result['basis']}.", markup=False)


def _median(middle: dict[str, Any], show: Format) -> str:
    return "-" if middle["value"] is None else f"{show(middle['value'])} (n {middle['n']})"
