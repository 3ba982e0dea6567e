"""`nearfar egress`: the ledger of what left this device."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from models.errors import NearfarError
from serving.chain import Chain
from serving.chain_check import check, entries_of
from serving.cli.console import JsonFlag, fail, say, settings_from
from serving.ledger import FOLDER

app = typer.Typer(
    help="The ledger of what left this device: one entry before a request leaves, one when it is over.",
    no_args_is_help=True,
)


@app.command("verify")
def egress_verify(
    head: Annotated[str | None, typer.Option(help="a head that was kept elsewhere: NUMBER:HASH, or the hash")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check that every entry follows from the one before, and that the chain leads through a head kept elsewhere.

    With the head it finds out about every entry up to it that was changed, dropped, swapped or cut off. Without one, it
    cannot find an end that was cut off. Who owns this host can write all of the ledger anew: it is evidence against a
    head that they cannot reach, and no proof against them. Exit status 1 where it is not whole.
    """
    found = check(settings_from().data_dir / FOLDER, head)
    if as_json:
        print(json.dumps({**asdict(found), "head": str(found.head), "ok": found.reason is None}, indent=2))
    elif found.reason is None:
        begun = f"from {found.first} on, those before were dropped" if (found.first or 1) > 1 else "from the first"
        print(f"whole: {found.entries} entries {begun}{', with the head that was kept' if head else ''}")
        print(f"head: {found.head}")
    if found.reason:
        fail(found.reason)
    if found.torn_bytes:
        say(f"the last {found.torn_bytes} bytes are of a killed writer; the next entry moves them aside")


@app.command("head")
def egress_head() -> None:
    """Print NUMBER:HASH of the last entry. Keep it on another machine: `nearfar egress verify --head` takes it."""
    try:
        print(Chain(settings_from().data_dir / FOLDER).head())
    except NearfarError as error:
        fail(error.message)


@app.command("list")
def egress_list(as_json: JsonFlag = False) -> None:
    """Show what left, where to and under which policy, the oldest first. With --json, the entries as they stand."""
    from serving.tables.service import egress_table

    try:
        entries = list(entries_of(settings_from().data_dir / FOLDER))
    except ValueError:
        fail("a line of the ledger is no entry: nearfar egress verify")
    if as_json:
        print(json.dumps(entries, indent=2))
    else:
        egress_table(entries, Console())
