"""Answers, comparisons and records as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from serving.tables.figures import Format, dollars, megabytes, milliseconds, plain, plain_text


def _attempts(attempts: list[dict[str, Any]]) -> str:
    """Of a route: each target that was tried, and what came of it."""
    told = (f"{attempt['target']} {attempt['error_type'] or attempt['outcome']}" for attempt in attempts)
    return "\n".join(told) or "-"


_ROWS: tuple[tuple[str, tuple[str, ...], Format], ...] = (
    ("answer", ("text",), plain),
    ("right", ("correct",), lambda value: {True: "yes", False: "no"}.get(value, "-")),
    ("first token", ("timings", "ttft_ms"), milliseconds),
    ("  thinking", ("timings", "thinking_ms"), milliseconds),
    ("total", ("timings", "total_ms"), milliseconds),
    ("  decode image", ("timings", "image_decode_ms"), milliseconds),
    ("  preprocess", ("timings", "preprocess_ms"), milliseconds),
    ("  vision", ("timings", "vision_ms"), milliseconds),
    ("  prefill", ("timings", "prefill_ms"), milliseconds),
    ("  decode", ("timings", "decode_ms"), milliseconds),
    ("tokens per second", ("timings", "tokens_per_second"), lambda v: "-" if v is None else f"{v:.0f}"),
    ("prompt tokens", ("usage", "prompt_tokens"), plain),
    ("  from a cache", ("usage", "cached_tokens"), plain),
    ("  written to one", ("usage", "cache_write_tokens"), plain),
    ("answer tokens", ("usage", "completion_tokens"), plain),
    ("  of thinking", ("usage", "thinking_tokens"), plain),
    ("attempts", ("attempts",), lambda value: _attempts(value or [])),
    ("model", ("memory", "model_bytes"), megabytes),
    ("peak of its process", ("memory", "process_peak_bytes"), megabytes),
    ("cost", ("cost", "usd"), dollars),
    ("energy", ("energy", "joules"), lambda value: "-" if value is None else f"{value:.3g} J"),
    ("  idling meanwhile", ("energy", "idle_joules"), lambda value: "-" if value is None else f"{value:.3g} J"),
    ("left the device", ("egress", "left_device"), lambda value: {True: "yes", False: "no"}.get(value, "-")),
    ("bytes sent", ("egress", "bytes_sent"), plain),
    ("sent to", ("egress", "destination"), plain),
    ("pixels withheld", ("egress", "withheld", "pixels"), plain),
)


def results_table(results: list[dict[str, Any]], console: Console) -> None:
    """Results side by side, one column a target."""
    table = Table(show_header=True, header_style="bold")
    table.add_column("")
    for result in results:
        table.add_column(result["target"], overflow="fold")
    for label, path, show in _ROWS:
        cells = [_cell(result, path, show) for result in results]
        if any(cell not in ("-", "") for cell in cells):
            table.add_row(label, *map(plain_text, cells))
    failed = [result["error"]["message"] if not result.get("ok", True) else "" for result in results]
    if any(failed):
        table.add_row("error", *map(plain_text, failed), style="red")
    console.print(table)
    for figure in ("cost", "energy"):
        bases = [basis for result in results if (basis := (result.get(figure) or {}).get("basis"))]
        for basis in dict.fromkeys(bases):
            of = [result["target"] for result in results if (result.get(figure) or {}).get("basis") == basis]
            whose = f" of {', '.join(of)}" if len(of) < len(results) else ""
            console.print(plain_text(f"{figure}{whose}: {basis}"), style="dim")


def _cell(result: dict[str, Any], path: tuple[str, ...], show: Format) -> str:
    value: Any = result
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return show(value)


def comparison_table(comparison: dict[str, Any], console: Console) -> None:
    """A comparison's results, how far they lie apart over several rounds, the judge's words, and the verdict."""
    results_table(comparison["results"], console)
    if any("repeats" in result for result in comparison["results"]):
        _spreads_table(comparison, console)
    if "judge" in comparison:
        console.print(plain_text(_judge_line(comparison["judge"])))
    verdict = comparison["verdict"]
    console.print(f"[bold]{verdict['choice']}[/bold]: ", end="")
    console.print(plain_text(verdict["text"]))
    for reason in verdict["reasons"]:
        console.print(plain_text(f"  - {reason}"))


def records_table(rows: list[dict[str, Any]], console: Console) -> None:
    """Kept comparisons, one line an arm."""
    if not rows:
        console.print("no comparison is kept that fits")
        return
    table = Table(show_header=True, header_style="bold")
    for heading in ("comparison", "when", "task", "target", "answer", "right", "confidence", "total"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        named = (row["id"], row["created_at"], row["task"])
        for result in row["results"]:
            if "side" in result:
                table.add_row(*named, f"side {result['side']}", plain_text(result["text"][:60]), "-", "-", "-")
                named = ("", "", "")
                continue
            right = {True: "yes", False: "no"}.get(result["correct"], "-")
            confidence = "-" if result["confidence"] is None else f"{result['confidence']:.3f}"
            answer = plain_text(plain(result["text"])[:60])
            table.add_row(*named, result["target"], answer, right, confidence, milliseconds(result["total_ms"]))
            named = ("", "", "")
    console.print(table)


def _spreads_table(comparison: dict[str, Any], console: Console) -> None:
    """A row a figure, cold and warm, with n, and below them the formulas; what nobody measured is left out."""
    results, formulas = comparison["results"], comparison["formulas"]
    table = Table(show_header=True, header_style="bold", title="median (least to most, n)")
    for heading in ("", *(result["target"] for result in results)):
        table.add_column(heading, overflow="fold")
    told = [result["repeats"] for result in results]
    shown = {}
    for when in ("cold", "warm"):
        for name in told[0][when]:
            spreads = [each[when][name] for each in told]
            if any(spread and spread["max"] for spread in spreads):
                table.add_row(f"{when} {name}", *map(_spread, spreads))
                shown[name] = formulas[name]
    table.add_row("errors", *(f"{sum(each['errors'].values())} of {each['asked']}" for each in told))
    table.add_row("distinct_answers", *(str(each["distinct_answers"]) for each in told))
    console.print(table)
    for name in (*shown, "cold", "warm", "median", "errors", "distinct_answers"):
        console.print(plain_text(f"  {name}: {formulas[name]}"), style="dim")


def _spread(spread: dict[str, Any] | None) -> str:
    if spread is None:
        return "-"
    median, least, most = (f"{spread[name]:.4g}" for name in ("median", "min", "max"))
    return f"{median} (n = 1)" if spread["n"] == 1 else f"{median} ({least} to {most}, n = {spread['n']})"


def _judge_line(judge: dict[str, Any]) -> str:
    return f"judge {judge['target']}: asked {judge['asked']} times, for {dollars(judge['cost']['usd'])} of its own"


def difference_table(found: dict[str, Any], console: Console) -> None:
    """A comparison and its replay, one column each, the arms below one another."""
    table = Table(show_header=True, header_style="bold")
    for heading in ("", found["then"], found["now"]):
        table.add_column(heading, overflow="fold")
    for arm in found["arms"]:
        same = {True: "the same answer", False: "another answer", None: "an answer is missing"}[arm["same_answer"]]
        table.add_row(arm["target"], "", same, style="bold")
        pairs = {name: each for name, each in arm.items() if isinstance(each, (list, tuple))}
        for name, (then, now) in {**pairs, **arm["versions"]}.items():
            if then is not None or now is not None:
                table.add_row(f"  {name}", plain_text(plain(then)), plain_text(plain(now)))
    console.print(table)
