"""Settings, the account of money and the ledger as tables for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serving.settings import Shown
from serving.tables.figures import dollars, plain, plain_text


def spending_table(report: dict[str, Any], console: Console) -> None:
    """What was spent by day, and what is left today of each budget."""
    days, budgets = Table(header_style="bold"), Table(header_style="bold")
    for heading in ("day", "target", "key", "route", "spent", "of it assumed", "held", "requests", "without a price"):
        days.add_column(heading, overflow="fold")
    for row in report["days"]:
        money = (dollars(row[name]) for name in ("usd", "assumed_usd", "held_usd"))
        counts = (str(row["requests"]), str(row["unpriced_requests"]))
        days.add_row(row["day"], row["target"], row["key"] or "-", row["route"] or "-", *money, *counts)
    for heading in ("budget", "a day", "left today"):
        budgets.add_column(heading, overflow="fold")
    for row in report["budgets"]:
        budgets.add_row(row["for"], dollars(row["daily_usd"]), dollars(row["left_usd"]))
    console.print(days if report["days"] else "nothing was spent", budgets if report["budgets"] else "no budget is set")
    console.print(report["basis"], style="dim")


def egress_table(entries: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A ledger's departures, one a line, and what became of each; a dash: its return was never written."""
    returns = {entry["departure"]: entry for entry in entries if entry.get("event") == "return"}
    table = Table(header_style="bold")
    for heading in ("", "time", "target", "destination", "policy", "key", "images", "pixels", "bytes sent", "outcome"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        if entry.get("event") == "departure":
            back = returns.get(entry["number"], {})
            left = [
                entry[name] for name in ("number", "time", "target", "destination", "policy", "key", "images", "pixels")
            ]
            table.add_row(*map(plain_text, map(plain, (*left, back.get("bytes_sent"), back.get("outcome")))))
    console.print(table)


def settings_table(effective: Mapping[str, Shown], console: Console) -> None:
    """Every setting, its value and its origin."""
    table = Table(box=None)
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    for name, shown in effective.items():
        table.add_row(name, escape(json.dumps(shown.value, ensure_ascii=False)), shown.origin)
    console.print(table)
