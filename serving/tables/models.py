"""Models, the catalog, decoders and verifications as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from serving.tables.figures import megabytes, plain_text, size


def models_table(rows: list[dict[str, Any]], console: Console) -> None:
    """Bundles, one a line, and what to know about them."""
    table = Table(show_header=True, header_style="bold")
    for heading in ("target", "parameters", "size", "licence", "source"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        source = row["source"]
        size = megabytes(row["bytes"])
        table.add_row(row["target"], f"{row['parameters'] / 1e6:.1f} M", size, source["license"] or "-", source["name"])
    console.print(table)
    for notice in dict.fromkeys(row["notice"] for row in rows if row["notice"]):
        console.print(notice, markup=False)


def decoders_table(rows: list[dict[str, Any]], console: Console) -> None:
    """The decoders that `--recipe auto` tried, the fastest first; the one it kept is bold."""
    table = Table(show_header=True, header_style="bold")
    for heading in ("decoder", "prompt step", "size", "prefill tok/s", "decode tok/s", "mean KL", "top-1", "passes"):
        table.add_column(heading, overflow="fold")
    for row in sorted(rows, key=lambda row: float(row["question_s"])):
        kl = "-" if row["mean_kl"] is None else f"{row['mean_kl']:.4f}"
        speeds = (f"{row['prefill_tokens_per_s']:.0f}", f"{row['decode_tokens_per_s']:.0f}")
        figures = (size(row["bytes"]), *speeds, kl, f"{row['top1_agreement']:.3f}", "yes" if row["passes"] else "no")
        table.add_row(row["decoder"], row["prompt_step"], *figures, style="bold" if row["chosen"] else None)
    console.print(table)


def print_catalog(rows: list[dict[str, Any]], console: Console) -> None:
    """The catalog, some lines a model. Sizes are computed from the shapes, claims are others' and not measured here."""
    for row in rows:
        console.print(f"\n[bold]{row['name']}[/bold]")
        for line in _alias_lines(row) if "stands_for" in row else _model_lines(row):
            console.print(Padding(plain_text(line), (0, 0, 0, 2)))


def _alias_lines(row: dict[str, Any]) -> list[str]:
    return [row["notice"], *_claim_lines(row)]


def _model_lines(row: dict[str, Any]) -> list[str]:
    sizes = [
        f"{recipe} {size(each['file_bytes'])} ({size(each['memory_bytes'])})" for recipe, each in row["recipes"].items()
    ]
    there = [f"{each['recipe']} {each['revision'] or ''}".strip() for each in row["installed"]]
    verified = [f"{each['recipe']} verified at {each['revision'][:12]}" for each in row["verified"] or ()]
    return [
        f"{row['parameters'] / 1e6:.0f} M parameters, {row['license']}, {row['source'] or 'embedded'}",
        f"files (memory), computed: {', '.join(sizes)}",
        f"on this machine: {', '.join(there) or 'no'}",
        *_claim_lines(row),
        f"measured: {row['measured'] or 'nothing'}",
        row["verification"] or ", ".join(verified) or "verified in the tests",
        *([row["notice"]] if row["notice"] else []),
    ]


def _claim_lines(row: dict[str, Any]) -> list[str]:
    by_source: dict[str, list[str]] = {}
    for claim in row["claims"]:
        said = claim["measure"] if claim["figure"] is None else f"{claim['measure']} {claim['figure']:g}"
        by_source.setdefault(claim["source"], []).append(said)
    return [f"claimed: {', '.join(said)} ({source})" for source, said in by_source.items()]


def verdict_table(report: dict[str, Any], console: Console) -> None:
    """A verification's checks, and the answers side by side."""
    checks, answers = Table(header_style="bold"), Table(header_style="bold", show_lines=True)
    for heading in ("check", "passed", "found"):
        checks.add_column(heading)
    for each in report["checks"]:
        checks.add_row(each["name"], {True: "yes", False: "no"}.get(each["passed"], "-"), plain_text(each["text"]))
    for heading in ("picture", "question", report["target"], "fp32"):
        answers.add_column(heading, overflow="fold")
    for each in report["answers"]:
        answers.add_row(
            each["picture"], each["question"], plain_text(each["text"]), plain_text(each["reference"] or "-")
        )
    console.print(answers, checks)
    console.print(f"{report['target']}: {'passed' if report['passed'] else 'failed'} in {report['seconds']} s")
